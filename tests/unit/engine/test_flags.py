"""Every flag of ours stands in --help with its default, and in docs/flags.md."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.common.routing_methods import DEFAULT_TOPK, METHODS
from megatron_btx.engine.checks import arguments
from tests.support import flags_page

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_page_of_flags_is_what_the_parsers_say():
    """docs/flags.md is written by ``python -m tests.support.flags_page``."""
    assert flags_page.PAGE.read_text(encoding="utf-8") == flags_page.page()


@pytest.mark.parametrize("heading", flags_page.own_flags())
def test_every_flag_says_its_default(heading):
    """Or that it must be given."""
    for action in flags_page.own_flags()[heading]._actions:
        assert "(default: " in action.help or "(required)" in action.help, action.option_strings


def routing_table() -> str:
    """The methods as a table for docs/routing.md."""
    lines = ["| `mix.routing`, `ROUTING` | meaning | flags | drops tokens |", "|---|---|---|---|"]
    for method in METHODS.values():
        words = []
        for name, value in method.flags(experts=4).items():
            words.append(f"--{name}" if value is True else f"--{name} {value}")
        text = " ".join(words)
        if method.takes_topk:
            text = text.replace(f"topk {DEFAULT_TOPK}", "topk K")
        if method.takes_all:
            text = text.replace("topk 4", "topk N")
        drops = "no"
        if method.capacity is not None:
            drops = "yes"
        lines.append(f"| `{method.name}` | {method.meaning} | `{text}` | {drops} |")
    return "\n".join(lines)


def test_the_table_of_routing_methods():
    """docs/routing.md has it as it is."""
    assert routing_table() in (REPOSITORY / "docs" / "routing.md").read_text(encoding="utf-8")


PROGRAMS = {
    "-m megatron_btx.pretrain": "--btx-check",
    "-m megatron_btx.evaluate": "--btx-eval-model",
    "tools/init_router.py": "--btx-init-model",
    "tools/analyze_routing.py": "--btx-route-model",
}


def help_of(program: str, word: str) -> str:
    command = [sys.executable, "-X", "importtime", *program.split(), word]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    # It answers at once: nothing large is imported for it.
    assert word != "--help" or not {"torch", "megatron"} & {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines()
    }
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers(program):
    """Every program's --help shows its own flags and ours, and says where Megatron's are."""
    text = help_of(program, "--help")
    assert {PROGRAMS[program], "--btx-freeze", "--help-megatron"} <= set(text.replace("]", " ").split())
    others = {PROGRAMS[other] for other in PROGRAMS if other != program}
    assert not others & set(text.split())


def test_help_of_megatron_answers():
    """Megatron 0.19's own --help ends in an error of argparse."""
    text = help_of("-m megatron_btx.pretrain", "--help-megatron")
    assert {"--btx-freeze", "--moe-router-topk", "--num-layers"} <= set(text.split())


def test_missing_flags_are_named_our_own_first(monkeypatch):
    """Megatron would assert its own first, in code, which says nothing to who has given no flag of ours."""
    from megatron_btx.engine import program as parsing

    given = argparse.Namespace(yaml_cfg=None, use_checkpoint_args=False, micro_batch_size=None, hidden_size=32)
    given.num_layers = given.num_attention_heads = given.max_position_embeddings = None
    with pytest.raises(InputError, match=r"^missing: --num-layers, --num-att.*megatron_args.txt beside a mixture"):
        parsing.check_model_flags(given)
    given.use_checkpoint_args = True
    with pytest.raises(InputError, match="^--micro-batch-size is missing"):
        parsing.check_model_flags(given)
    given.micro_batch_size = 1
    parsing.check_model_flags(given)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("megatron_btx.pretrain", "missing: --num-layers, --hidden-size"),
        ("megatron_btx.evaluate", "--btx-eval-model is missing"),
        ("megatron_btx.evaluation.analyze_routing", "--btx-route-model is missing"),
    ],
)
def test_a_program_without_flags(program, said, zygote, tmp_path):
    """What is missing first, of the program's own or of the model."""
    assert f"error: {said}" in zygote.run(1, [], tmp_path / "log", entry=program, expect=2).text()


def test_the_page_lists_what_is_refused_and_nothing_else():
    """Each flag of the table is one of the check, and each of the check is in the table."""

    class Given:
        def __getattr__(self, name: str) -> str:
            return "NAME"

    checks = (arguments.of_other_programs, arguments.of_the_schedule, arguments.that_fail_late)
    refused = {flag for check in checks for flag, _, _ in check(Given())}
    page = (REPOSITORY / "docs/checks.md").read_text().partition("## Flags that do nothing")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert set(re.findall("`([^`]*)`", " ".join(rows))) == refused
