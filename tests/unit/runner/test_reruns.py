"""A --rerun that was stopped: the same command goes on, does nothing twice, and another one begins anew."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.common import manifest as manifests
from megatron_btx.plan.stage import Stage
from megatron_btx.runner import local as runner
from megatron_btx.runner.decisions import decide
from megatron_btx.runner.local import Machine
from megatron_btx.runner.scripts import shell_script
from tests.unit.runner.running import run_stages

BOTH = ("finetune", "evaluate")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests are about folders, not about how often the runner looks or which packages there are."""
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(manifests, "versions", dict)


class Stopper:
    """A reporter that sends this process a SIGINT once ``when`` lies there."""

    def __init__(self, when: Path | None) -> None:
        self.when = when

    def set(self, stage: str, state: str, why: str = "") -> None: ...

    def update(self) -> None:
        if self.when is not None and self.when.exists():
            self.when = None
            os.kill(os.getpid(), signal.SIGINT)


def working(name: str, *parents: str, resumable: bool = False) -> Stage:
    """A stage that leaves a checkpoint, waits while a file ``NAME.waits`` lies in the run, and makes its product."""
    script = (
        f"mkdir -p {name}/checkpoint; touch {name}/checkpoint/x; echo {name} >> trace\n"
        f"while [ -e {name}.waits ]; do sleep 0.05; done; touch {name}/out"
    )
    return Stage(name, ("bash", "-c", script), parents, product="out", resumable=resumable)


def stages() -> list[Stage]:
    return [working("mix"), working("finetune", "mix", resumable=True), working("evaluate", "finetune")]


def run(directory: Path, rerun: tuple[str, ...] = (), stop_in: str = "") -> int:
    """Run the stages; stopped as by Ctrl-C in the middle of ``stop_in``."""
    waits = directory / f"{stop_in}.waits"
    if stop_in:
        waits.touch()
    when = directory / stop_in / "checkpoint" / "x" if stop_in else None
    if when is not None and when.exists():
        when.unlink()  # of the folder that is about to be set aside: the new one's is waited for
    code = run_stages(stages(), directory, Machine((), 2), Stopper(when), rerun=rerun)
    waits.unlink(missing_ok=True)
    return code


def verbs(directory: Path, rerun: tuple[str, ...] = (), of: list[Stage] | None = None) -> dict[str, str]:
    return {name: action.verb for name, action in decide(of or stages(), directory, rerun).items()}


def trace(directory: Path) -> list[str]:
    return (directory / "trace").read_text().split()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run that is finished, with an earlier --rerun behind it."""
    assert run(tmp_path) == 0 and run(tmp_path, BOTH) == 0
    (tmp_path / "trace").unlink()
    return tmp_path


def test_what_was_training_goes_on_and_what_had_not_begun_runs_again(finished: Path) -> None:
    assert run(finished, BOTH, stop_in="finetune") == 130
    (finished / "finetune" / "checkpoint" / "new").touch()
    for again in (BOTH, BOTH[::-1]):
        assert verbs(finished, again) == {"mix": "skip", "finetune": "resume", "evaluate": "rerun"}
    assert run(finished, BOTH) == 0
    assert trace(finished) == ["finetune", "finetune", "evaluate"]
    assert (finished / "finetune" / "checkpoint" / "new").exists()
    assert len(list(finished.glob("finetune.2*"))) == len(list(finished.glob("evaluate.2*"))) == 2


def test_what_finished_before_the_stop_is_not_run_twice(finished: Path) -> None:
    assert run(finished, BOTH, stop_in="evaluate") == 130
    actions = decide(stages(), finished, BOTH)
    assert (actions["finetune"].verb, actions["finetune"].why) == ("skip", "finished since this --rerun began")
    assert actions["evaluate"].verb == "run"
    assert run(finished, BOTH) == 0
    assert trace(finished) == ["finetune", "evaluate", "evaluate"]


def test_a_rerun_that_is_done_begins_anew_when_asked_again(finished: Path) -> None:
    assert verbs(finished, BOTH) == {"mix": "skip", "finetune": "rerun", "evaluate": "rerun"}
    assert run(finished, BOTH) == 0 and trace(finished) == ["finetune", "evaluate"]
    assert run(finished, ("finetune",)) == 0
    assert verbs(finished, BOTH) == {"mix": "skip", "finetune": "rerun", "evaluate": "rerun"}


def test_a_rerun_that_a_plain_run_brought_to_its_end_is_done(finished: Path) -> None:
    assert run(finished, BOTH, stop_in="evaluate") == 130
    assert run(finished) == 0
    assert verbs(finished, BOTH) == {"mix": "skip", "finetune": "rerun", "evaluate": "rerun"}


def test_other_settings_or_other_stages_begin_anew(finished: Path) -> None:
    assert run(finished, BOTH, stop_in="finetune") == 130
    assert verbs(finished, ("finetune",))["finetune"] == "rerun"
    mix, finetune, evaluate = stages()
    changed = [mix, replace(finetune, settings={"lr": 1}), evaluate]
    assert verbs(finished, BOTH, changed) == {"mix": "skip", "finetune": "rerun", "evaluate": "rerun"}


def test_the_printed_script_is_remembered_as_well(finished: Path) -> None:
    """Its first stage done by hand, and then a stop."""
    script = shell_script(stages(), decide(stages(), finished, BOTH), finished)
    subprocess.run(["bash", "-c", script.partition("\n# evaluate:")[0]], check=True)
    assert verbs(finished, BOTH) == {"mix": "skip", "finetune": "resume", "evaluate": "rerun"}


def test_what_is_made_from_a_stage_that_runs_anew_runs_anew_too(finished: Path) -> None:
    """Both were rerun; then one folder was moved away by hand, so that the --rerun looks as if it were not done."""
    (finished / "finetune").rename(finished / "mine")
    assert verbs(finished, BOTH) == {"mix": "skip", "finetune": "run", "evaluate": "rerun"}


@pytest.mark.parametrize("rerun", [5, "x", [], {"stages": list(BOTH), "number": "1"}, {"number": True}])
def test_an_odd_memory_of_a_rerun_is_none(rerun: object, finished: Path, edit: Callable[..., None]) -> None:
    edit(finished / "finetune", status="stopped", rerun=rerun)
    assert verbs(finished, BOTH) == {"mix": "skip", "finetune": "rerun", "evaluate": "rerun"}


@pytest.fixture
def edit() -> Callable[..., None]:
    """Changes a stage's manifest."""

    def change(directory: Path, **content: object) -> None:
        manifest = manifests.read_manifest(directory) or {}
        manifests.write_manifest(directory, manifest | content)

    return change
