"""Changes of a finished run's recipe: what each does to which stage, and that nothing is removed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx import cli
from megatron_btx.common import manifest as manifests
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.load import load_recipe
from megatron_btx.runner import api
from megatron_btx.runner import local as runner
from megatron_btx.runner.decisions import decide
from megatron_btx.runner.local import Machine
from tests.unit.runner.running import run_stages

RECIPE = Path(__file__).parents[3] / "examples" / "recipes" / "quickstart.yaml"

pytestmark = pytest.mark.usefixtures("in_quickstart_folder")
PICO = [
    *("seed.tokens=20_480", "finetune.tokens=8_192", "evaluate.tokens=4_096"),
    *(f"experts.{domain}.tokens=8_192" for domain in ("math", "code", "knowledge")),
]
EXPERTS = {"expert-math", "expert-code", "expert-knowledge"}
EVALUATIONS = {"evaluate-experts", "evaluate-dense", "evaluate-moe"}
BEHIND_MIX = {"mix", "finetune", "evaluate-moe"}
BEHIND_SEED = {"seed", *EXPERTS, *BEHIND_MIX, "average", "dense-domains", "dense", *EVALUATIONS}


class Silent:
    """A reporter that says nothing."""

    def set(self, stage: str, state: str, why: str = "") -> None: ...
    def update(self) -> None: ...


def standing_in(stage: Stage) -> Stage:
    """The stage with a cheap command that leaves the same product."""
    product = f"{stage.name}/{stage.product}"
    script = f"mkdir -p $(dirname {product}); echo {stage.iterations} > {product}"
    return replace(stage, program=("bash", "-c", script), processes=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, quickstart_folder: Path) -> Path:
    """A run directory in which every stage of the pico recipe is finished, made by the runner."""
    run = tmp_path_factory.mktemp("changes") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(quickstart_folder)
        stages = [standing_in(stage) for stage in plan_stages(load_recipe(RECIPE, PICO))]
        patch.setattr(runner, "POLL_SECONDS", 0.01)
        patch.setattr(manifests, "versions", dict)
        assert run_stages(stages, run, Machine((), 16), Silent()) == 0
    return run


def files_in(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file() and path.parent != directory)
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


NOTHING: set[str] = set()
CHANGES = {
    # What decides nothing: every stage stays finished.
    "training.log-interval=7": NOTHING,
    "training.save-interval=50": NOTHING,
    "seed.layout={processes: 1}": NOTHING,
    "seed.layout.threads=2": NOTHING,
    "seed.megatron.micro-batch-size=1": NOTHING,
    "finetune.layout={processes: 2, expert-model-parallel-size: null}": NOTHING,
    "data.workers=1": NOTHING,
    "training.num-workers=0": NOTHING,
    "training.exit-duration-in-mins=60": NOTHING,
    "seed.megatron.recompute-activations=true": NOTHING,
    "training={clip-grad: 1, weight-decay: 0.10, adam-beta2: 0.95, adam-beta1: 0.9, lr-decay-style: cosine, "
    "global-batch-size: 4, micro-batch-size: 4, eval-iters: 0, save-interval: 9}": NOTHING,
    "seed.megatron.lr=0.003": NOTHING,
    "seed.megatron.lr='3e-3'": NOTHING,
    "finetune.blend={general: 4, math: 2, code: 2, knowledge: 2}": NOTHING,
    "name=another": NOTHING,
    # What decides: the stage, and all that is made from it.
    "evaluate.tokens=2_048": EVALUATIONS,
    "evaluate.split=test": EVALUATIONS,
    "seed.tokens=30_720": BEHIND_SEED,
    "random-seed=7": BEHIND_SEED,
    "model.hidden-dropout=0.1": BEHIND_SEED,
    "data.seed=7": {"data", *BEHIND_SEED},
    "experts.math.megatron.lr=1.0e-3": {"expert-math", "average", *BEHIND_MIX, *EVALUATIONS},
    "experts.math.blend={math: 90, general: 10}": {
        *("expert-math", "average", "dense-domains", "dense", *BEHIND_MIX, *EVALUATIONS)
    },
    "mix.router-seed=5": BEHIND_MIX,
    "mix.experts=[code, math, knowledge, seed]": {"average", *BEHIND_MIX, "evaluate-dense"},
    "mix.megatron.moe-aux-loss-coeff=0.02": {"finetune", "evaluate-moe"},
    "finetune.megatron.micro-batch-size=1": {"finetune", "evaluate-moe"},
    "finetune.megatron.lr=1.0e-3": {"finetune", "evaluate-moe"},
    "finetune.megatron.btx-freeze=[experts]": {"finetune", "evaluate-moe"},
    "finetune.tokens=16_384": {"finetune", "evaluate-moe", "dense", "evaluate-dense"},
    "baselines.dense.domains.megatron.lr=1.0e-3": {"dense-domains", "dense", "evaluate-dense"},
}


@pytest.mark.parametrize(("change", "kept"), CHANGES.items(), ids=list(CHANGES))
def test_a_change_of_a_finished_run_removes_nothing(
    change: str, kept: set[str], finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files_in(finished)
    changes = [*PICO, change]
    actions = decide(plan_stages(load_recipe(RECIPE, changes)), finished)
    assert {name for name, action in actions.items() if action.verb == "keep"} == kept
    assert {name for name, action in actions.items() if action.verb != "skip"} == kept | ({"report"} if kept else set())
    for more in (["--dry-run"], []):
        code = cli.main(["run", str(RECIPE), "--output", str(finished), "--cpu", "--set", *changes, *more])
        said = capfd.readouterr()
        assert code == (2 if kept else 0), said.err
        *lines, last = said.err.splitlines() or [""]
        assert {line.partition(":")[0] for line in lines} == kept
        assert not kept or f"--rerun {' '.join(name for name in actions if name in kept)}" in last
        assert "rm -rf" not in said.out
    assert files_in(finished) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("finetune.megatron.lr=1.0e-3", "finetune: lr: 0.003 -> 0.001"),
        ("finetune.megatron.lr=1.0e-3", "evaluate-moe: made from another finetune"),
        ("seed.tokens=30_720", "seed: lr-decay-iters: 20 -> 30; train-iters: 20 -> 30"),
        ("finetune.megatron.btx-freeze=[experts]", "finetune: btx-freeze: not given -> experts"),
        ("mix.experts=[code, math, knowledge, seed]", "mix: experts: value 1 of 4: math -> code"),
    ],
)
def test_what_changed_is_said(change: str, said: str, finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(RECIPE), "--output", str(finished), "--set", *PICO, change]) == 2
    assert said in capfd.readouterr().err.splitlines()


def test_the_command_that_is_proposed_is_one_that_goes_on(
    finished: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names every stage; its dry run sets each old folder aside and removes none."""
    monkeypatch.setattr(api, "check_with_megatron", lambda *_: None)
    assert cli.main(["run", str(RECIPE), "--output", str(finished), "--set", *PICO, "evaluate.tokens=2_048"]) == 2
    again = re.search(r"btx (run .*)", capfd.readouterr().err)
    assert again
    assert cli.main([*shlex.split(again[1]), "--dry-run"]) == 0
    script = capfd.readouterr().out
    for stage in EVALUATIONS:
        assert re.search(rf"^mv {stage} {stage}\.\d{{8}}-\d{{6}}$", script, re.MULTILINE)
    assert not re.search(r"\brm\b", script) and "\nmv seed" not in script


@pytest.fixture
def given(tmp_path: Path) -> Callable[..., list[Stage]]:
    """Plans a recipe whose data, tokenizer and seed are given, and lie in the folder named."""

    def plan(folder: str) -> list[Stage]:
        place = tmp_path / folder
        changes = [
            f"data={{domains: {{math: {{train: [{place}/math], valid: [{place}/math]}}, code: {{train: [{place}/code], "
            f"valid: [{place}/code]}}}}, tokenizer: {{tokenizer-type: SentencePieceTokenizer, "
            f"tokenizer-model: {place}/tokenizer.model}}}}",
            *("domains=null", "experts=null", "mix=null", "finetune=null", "baselines=null", "evaluate=null"),
            f"seed={{from: {place}/seed}}",
            "experts={math: {blend: {math: 9, code: 1}, tokens: 8_192, megatron: {lr: 1.0e-3}}}",
        ]
        return plan_stages(load_recipe(RECIPE, changes))

    place = tmp_path / "here"
    (place / "seed" / "iter_0000005").mkdir(parents=True)
    (place / "seed" / "iter_0000001").mkdir()
    (place / "seed" / "latest_checkpointed_iteration.txt").write_text("5")
    for name in ("math.bin", "math.idx", "code.bin", "code.idx", "tokenizer.model", "seed/iter_0000005/x.distcp"):
        (place / name).write_bytes(name.encode() * 3000)
    return plan


def test_what_lies_outside_counts_by_its_content_alone(given: Callable[..., list[Stage]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    stages = given("here")
    assert [stage.name for stage in stages] == ["expert-math"]
    assert run_stages([standing_in(stage) for stage in stages], run, Machine((), 1), Silent()) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there" / "seed" / "iter_0000001").rmdir()
    assert decide(given("there"), run)["expert-math"].verb == "skip"
    for name, setting in {
        "math.bin": "train-data-path: value 2 of 4: content of",
        "code.idx": "train-data-path: value 4 of 4: content of",
        "tokenizer.model": "tokenizer-model: content of",
        "seed/iter_0000005/x.distcp": "pretrained-checkpoint: content of",
    }.items():
        file = tmp_path / "there" / name
        content = file.read_bytes()
        file.write_bytes(b"!" + content[1:])
        action = decide(given("there"), run)["expert-math"]
        assert action.verb == "keep" and action.why.startswith(setting)
        file.write_bytes(content)
    assert decide(given("there"), run)["expert-math"].verb == "skip"
