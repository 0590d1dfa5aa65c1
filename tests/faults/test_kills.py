"""A signal at the worst moments: the same command goes on, and ends as if nothing had happened."""

from __future__ import annotations

import signal

import pytest

from megatron_btx.checkpoint.iterations import read_tracker, resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests import pico
from tests.runner import read_losses

STEPS, EVERY = 6, 2


def flags(corpus, folder, more=()):
    """Two data-parallel ranks that resume by themselves; dropout and a schedule would show a state that was lost."""
    arguments = pico.train(corpus, STEPS, folder / "metrics.jsonl")
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


@pytest.mark.parametrize(
    ("at", "step", "ranks", "number", "saved"),
    [
        ("in_step", 4, "0", "SIGKILL", 2),
        ("in_step", 4, "1", "SIGTERM", 2),
        ("while_saving", 4, "0", "SIGKILL", 2),
        ("while_saving", 4, "1", "SIGTERM", 2),
        ("before_tracker", 4, "all", "SIGKILL", 2),
    ],
)
def test_killed(at, step, ranks, number, saved, zygote, corpus, undisturbed, tmp_path):
    """The run ends, what loads is whole, and the rest of the curve is the same to the last bit."""
    fault = {"FAULT_AT": at, "FAULT_STEP": str(step), "FAULT_RANKS": ranks, "FAULT_SIGNAL": number}
    run = zygote.start(2, flags(corpus, tmp_path), tmp_path / "first", "tests.faults.program", fault)
    zygote.wait(run, expect=None, grace_seconds=0)
    assert -getattr(signal, number) in run.codes, run.text()[-2000:]
    root = tmp_path / "checkpoint"
    assert read_tracker(root) == saved
    TorchDistReader(resolve_iteration(root))
    zygote.run(2, flags(corpus, tmp_path), tmp_path / "second")
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed
