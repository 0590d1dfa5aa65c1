"""Every training program under srun without torchrun: the tasks of a step are one run, or one line says why not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import pico
from tests.support.runner import Zygote, read_losses
from tests.support.srun import ENTRY

PROGRAMS = ("pretrain", "evaluate", "evaluation.init_router", "evaluation.analyze_routing")


def step(program: str, **variables: str) -> dict[str, str]:
    """The environment of a step of Slurm that runs a program."""
    return {ENTRY: f"megatron_btx.{program}", "SLURM_JOB_ID": str(1000 + os.getpid() % 100), **variables}


@pytest.mark.parametrize("program", PROGRAMS)
def test_tasks_that_know_no_meeting_place(program, zygote: Zygote, corpus: Path, tmp_path: Path):
    """Each would be a run of its own: all end with one line, before anything is written."""
    words = [*pico.train(corpus, 1, moe=True), "--save", str(tmp_path / "save")]
    run = zygote.start(2, words, tmp_path / "log", entry="tests.support.srun", environment=step(program))
    zygote.wait(run, expect=None)
    assert run.codes == [2, 2]
    first, second = (line for line in run.text().splitlines() if "error: " in line)
    assert "Traceback" not in run.text() and first.startswith("error: 2 tasks were started")
    assert second == f"rank 1: {first}"
    assert not (tmp_path / "save").exists()


def test_tasks_of_one_step_are_one_run(zygote: Zygote, corpus: Path, tmp_path: Path):
    """Two data-parallel ranks, and one checkpoint of both."""
    save, metrics = tmp_path / "save", tmp_path / "metrics"
    words = [*pico.train(corpus, 2, metrics), "--save", str(save), "--save-interval", "2"]
    environment = step("pretrain", SLURM_STEP_NODELIST="localhost,n[2-3]")
    run = zygote.run(2, words, tmp_path / "log", entry="tests.support.srun", environment=environment)
    assert "world size: 2, data-parallel size: 2" in run.text()
    assert sorted(read_losses(metrics)) == [1, 2]
    written = {file.name for file in (save / "iter_0000002").glob("*.distcp")}
    assert {name.split("_")[2] for name in written} == {"0", "1"}
