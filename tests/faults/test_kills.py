"""A signal at the worst moments: the same command goes on, and ends as if nothing had happened.

The faults are in program.py.
"""

from __future__ import annotations

import signal

import pytest

from megatron_btx.checkpoint.iterations import read_tracker, resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests.support import pico
from tests.support.runner import read_losses

STEPS, EVERY = 6, 2
PROGRAM = "tests.faults.program"


def fault(at, step, ranks, number):
    """The environment that names a fault."""
    return {"FAULT_AT": at, "FAULT_STEP": str(step), "FAULT_RANKS": ranks, "FAULT_SIGNAL": number}


def flags(corpus, folder, more=()):
    """Two data-parallel ranks that resume by themselves; dropout and a schedule would show a state that was lost."""
    arguments = pico.train(corpus, STEPS, folder / "metrics.jsonl") + pico.READERS
    arguments += ["--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint")]
    arguments += ["--attention-dropout", "0.1", "--hidden-dropout", "0.1", "--use-distributed-optimizer"]
    arguments += ["--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--min-lr", "1e-3"]
    return [*arguments, "--save-interval", str(EVERY), *more]


@pytest.fixture(scope="module")
def undisturbed(zygote, corpus, tmp_path_factory):
    """The losses of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    zygote.run(2, flags(corpus, folder), folder / "log")
    return read_losses(folder / "metrics.jsonl")


CASES = {
    # name: point, step, ranks that it hits, signal
    "in a step, rank 0": ("in_step", 4, "0", "SIGKILL"),
    "in a step, rank 1": ("in_step", 4, "1", "SIGKILL"),
    "in a step, SIGTERM": ("in_step", 4, "1", "SIGTERM"),
    "while saving, rank 0": ("while_saving", 4, "0", "SIGKILL"),
    "while saving, rank 1": ("while_saving", 4, "1", "SIGKILL"),
    "while saving, SIGTERM": ("while_saving", 4, "0", "SIGTERM"),
    "before the tracker": ("before_tracker", 4, "all", "SIGKILL"),
    "while loading": ("while_loading", 2, "1", "SIGKILL"),
    "while loading, SIGTERM": ("while_loading", 2, "0", "SIGTERM"),
}
WITH_HANDLER = {"in a step": ("in_step", 3, "1", 3), "while saving": ("while_saving", 2, "0", 3)}


@pytest.mark.parametrize("case", CASES)
def test_killed(case, zygote, corpus, undisturbed, tmp_path):
    """The run ends, what loads is whole, and the rest of the curve is the same to the last bit."""
    at, step, ranks, number = CASES[case]
    if at == "while_loading":
        zygote.run(2, flags(corpus, tmp_path, ["--exit-interval", "2"]), tmp_path / "before")
    run = zygote.start(2, flags(corpus, tmp_path), tmp_path / "first", PROGRAM, fault(at, step, ranks, number))
    zygote.wait(run, expect=None, grace_seconds=0)
    assert -getattr(signal, number) in run.codes, run.text()[-2000:]
    root = tmp_path / "checkpoint"
    assert read_tracker(root) == 2
    TorchDistReader(resolve_iteration(root))
    zygote.run(2, flags(corpus, tmp_path), tmp_path / "second")
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed


@pytest.mark.parametrize("case", WITH_HANDLER)
def test_asked_to_end(case, zygote, corpus, undisturbed, tmp_path):
    """Megatron's own handler: one rank gets SIGTERM, all save after the step and leave with status 0."""
    at, step, ranks, saved = WITH_HANDLER[case]
    arguments = flags(corpus, tmp_path, ["--exit-signal-handler"])
    zygote.run(2, arguments, tmp_path / "first", entry=PROGRAM, environment=fault(at, step, ranks, "SIGTERM"))
    assert read_tracker(tmp_path / "checkpoint") == saved
    zygote.run(2, arguments, tmp_path / "second")
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed


def test_a_node_disappears(zygote, corpus, four_experts, tmp_path):
    """Two of four ranks under expert parallelism are gone at once; the run goes on from the last checkpoint."""
    start = ["--pretrained-checkpoint", str(four_experts), "--expert-model-parallel-size", "2"]

    def arguments(folder):
        return flags(corpus, folder, [*pico.MOE, *start])

    zygote.run(4, arguments(tmp_path / "undisturbed"), tmp_path / "undisturbed/log")
    run = zygote.start(4, arguments(tmp_path), tmp_path / "first", PROGRAM, fault("in_step", 4, "2,3", "SIGKILL"))
    zygote.wait(run, expect=None, grace_seconds=0)
    assert run.codes[2:] == [-signal.SIGKILL] * 2
    zygote.run(4, arguments(tmp_path), tmp_path / "second")
    assert read_losses(tmp_path / "metrics.jsonl") == read_losses(tmp_path / "undisturbed/metrics.jsonl")
