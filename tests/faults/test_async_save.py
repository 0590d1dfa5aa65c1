"""Saves in the background: the same bytes, the same faults, and nothing that waits for ever."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_btx.checkpoint.iterations import TRACKER, read_tracker, resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests.faults.test_kills import PROGRAM, STEPS, fault, flags
from tests.support.runner import read_losses

# Megatron's other format stores a buffer whole, with what lay in memory between the parameters.
BY_PARAMETER = ["--dist-ckpt-optim-fully-reshardable"]
ASYNC = ["--async-save", *BY_PARAMETER]


@pytest.fixture(scope="module")
def undisturbed(zygote, corpus, tmp_path_factory):
    """A run that waited for each of its saves."""
    folder = tmp_path_factory.mktemp("undisturbed")
    zygote.run(2, flags(corpus, folder, BY_PARAMETER), folder / "log")
    return folder


def tensors(folder):
    """All tensors of a checkpoint: weights and optimizer."""
    reader = TorchDistReader(folder)
    return {name: reader.read(name, (0,) * len(of.shape), of.shape) for name, of in reader.tensors.items()}


def test_the_same_checkpoints(zygote, corpus, undisturbed, tmp_path):
    """Bit for bit those of a run that waited, while the steps went on; and old ones are removed as usual.

    The last one is saved after the last step, when Megatron has ended the process that writes.
    """
    more = [*ASYNC, "--btx-keep-last", "2", "--save-interval", "4"]
    run = zygote.run(2, flags(corpus, tmp_path, more), tmp_path / "log")
    assert "scheduled an async checkpoint save at iteration" in run.text()
    assert read_losses(tmp_path / "metrics.jsonl") == read_losses(undisturbed / "metrics.jsonl")
    assert read_tracker(tmp_path / "checkpoint") == STEPS
    assert sorted(path.name for path in (tmp_path / "checkpoint").glob("iter_*")) == ["iter_0000004", "iter_0000006"]
    for step in (4, 6):
        found = tensors(tmp_path / f"checkpoint/iter_{step:07d}")
        expected = tensors(undisturbed / f"checkpoint/iter_{step:07d}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("at", "step", "ranks", "number"),
    [("while_saving", 6, "all", "SIGKILL"), ("in_step", 5, "1", "SIGKILL"), ("in_step", 5, "0", "SIGTERM")],
)
def test_killed_with_a_save_in_flight(at, step, ranks, number, zygote, corpus, undisturbed, tmp_path):
    """What the tracker names is whole, if it is there already, and the run goes on to the same end."""
    more = [*ASYNC, *(["--exit-signal-handler"] if number == "SIGTERM" else [])]
    run = zygote.start(2, flags(corpus, tmp_path, more), tmp_path / "first", PROGRAM, fault(at, step, ranks, number))
    zygote.wait(run, expect=None, grace_seconds=0)
    root = tmp_path / "checkpoint"
    if (root / TRACKER).exists():
        assert read_tracker(root) < STEPS
        TorchDistReader(resolve_iteration(root))
    zygote.run(2, flags(corpus, tmp_path, more), tmp_path / "second")
    assert read_losses(tmp_path / "metrics.jsonl") == read_losses(undisturbed / "metrics.jsonl")


def test_a_writer_that_is_gone_ends_the_run(zygote, corpus, undisturbed, tmp_path):
    """Megatron would wait for it for ever: one line that names it, and the last whole checkpoint stands."""
    began = time.monotonic()
    run = zygote.start(2, flags(corpus, tmp_path, ASYNC), tmp_path / "first", PROGRAM, fault("writer_gone", 4, "0", ""))
    zygote.wait(run, expect=None, grace_seconds=10)
    assert time.monotonic() - began < 60
    assert run.codes == [1, 1], run.text()[-3000:]
    lines = [line for line in run.text().splitlines() if "error: the process that writes checkpoints" in line]
    assert lines and all("was ended by signal 9" in line for line in lines)
    assert read_tracker(tmp_path / "checkpoint") == 2
    zygote.run(2, flags(corpus, tmp_path, ASYNC), tmp_path / "second")
    assert read_losses(tmp_path / "metrics.jsonl") == read_losses(undisturbed / "metrics.jsonl")


def test_a_full_disk_in_the_background(zygote, corpus, undisturbed, tmp_path):
    """The writer's own words, as of a save that is waited for."""
    run = zygote.start(2, flags(corpus, tmp_path, ASYNC), tmp_path / "first", PROGRAM, fault("quota", 4, "0", ""))
    zygote.wait(run, expect=2, grace_seconds=10)
    lines = [line for line in run.text().splitlines() if "error:" in line and "could not be written" in line]
    assert lines, run.text()[-3000:]
    assert read_tracker(tmp_path / "checkpoint") == 2
    zygote.run(2, flags(corpus, tmp_path, ASYNC), tmp_path / "second")
    assert read_losses(tmp_path / "metrics.jsonl") == read_losses(undisturbed / "metrics.jsonl")
