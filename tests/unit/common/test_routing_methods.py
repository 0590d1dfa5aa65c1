"""The table of routing methods, and what a launcher gets from it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_btx.common.routing_methods import find_method


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_btx.common.routing_methods", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("top-k", {"moe-router-topk": 2}),
        ("top-k-pre-softmax", {"moe-router-topk": 2, "moe-router-pre-softmax": True}),
        ("switch", {"moe-router-topk": 1, "moe-router-pre-softmax": True, "moe-expert-capacity-factor": 1.5}),
        ("soft", {"moe-router-topk": 5}),
        ("sample-top1", {"moe-router-topk": 1, "moe-router-pre-softmax": True, "btx-sample-top1": True}),
    ],
)
def test_flags(name: str, flags: dict[str, object]) -> None:
    """Of every method, with the paper's numbers."""
    method = find_method(name)
    assert method is not None and method.flags(experts=5) == flags


def test_words_keep_what_was_given() -> None:
    """A capacity as it was written; empty values count as not given."""
    words = ask("--routing=switch", "--capacity=2", "--topk=", "--balancing=none").stdout.split()
    expected = "--moe-router-topk 1 --moe-router-pre-softmax --moe-expert-capacity-factor 2"
    assert words == [*expected.split(), "--moe-router-load-balancing-type", "none"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routing=sofd"], "ROUTING=sofd: expected top-k, top-k-pre-softmax, switch, soft or sample-top1"),
        (["--routing=soft", "--topk=2"], "TOPK=2 with ROUTING=soft, which has its own k; leave one of them out"),
        (["--capacity=2"], "CAPACITY=2 with ROUTING=top-k, which drops no token; leave one of them out"),
        (["--balancing=some"], "BALANCING=some: expected megatron, paper or none"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    """One line, status 2, and the launcher's variable by name."""
    answer = ask(*arguments)
    assert (answer.returncode, answer.stderr, answer.stdout) == (2, f"error: {message}\n", "")
