"""The last K checkpoints and every M-th are kept, over kills and starts, and the run goes on from each of them."""

from __future__ import annotations

import os

import pytest

from megatron_btx.checkpoint.iterations import list_iterations, resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests import pico
from tests.runner import read_losses


def flags(corpus, folder, steps=8, more=()):
    """A run that resumes by itself and keeps two checkpoints, and every fifth step's."""
    root = str(folder / "checkpoint")
    arguments = pico.train(corpus, steps, folder / "metrics.jsonl")
    arguments += ["--save", root, "--load", root, "--save-interval", "1", "--btx-keep-last", "2"]
    return [*arguments, "--btx-keep-every", "5", *more]


def kept(folder):
    """The steps of what lies in a root; all of it is whole."""
    found = list_iterations(folder / "checkpoint")
    for _, path in found:
        TorchDistReader(resolve_iteration(path))
    return [step for step, _ in found]


def test_the_last_and_every_fifth_are_kept(zygote, corpus, tmp_path):
    """Over two starts: what the first left goes, too, as do a half-written one and not a link."""
    zygote.run(2, flags(corpus, tmp_path, more=["--exit-interval", "5"]), tmp_path / "first")
    assert kept(tmp_path) == [4, 5]
    half = tmp_path / "checkpoint/iter_0000002"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    linked = tmp_path / "checkpoint/iter_0000001"
    os.rename(tmp_path / "checkpoint/iter_0000004", tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    zygote.run(2, flags(corpus, tmp_path), tmp_path / "second")
    assert kept(tmp_path) == [1, 5, 7, 8] and not half.exists()
    reference = read_losses(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    # The fifth step's is what is gone back to: it stays while it is needed.
    zygote.run(2, flags(corpus, tmp_path, more=["--ckpt-step", "5"]), tmp_path / "third")
    assert read_losses(tmp_path / "metrics.jsonl") == {step: reference[step] for step in range(6, 9)}
    assert kept(tmp_path) == [1, 5, 7, 8]


def test_killed_while_saving_nothing_that_is_needed_is_gone(zygote, corpus, tmp_path):
    """The last whole one is not removed before the next is whole."""
    fault = {"FAULT_AT": "while_saving", "FAULT_STEP": "5", "FAULT_RANKS": "all", "FAULT_SIGNAL": "SIGKILL"}
    arguments = flags(corpus, tmp_path)
    arguments[arguments.index("--btx-keep-last") + 1] = "1"
    run = zygote.start(2, arguments, tmp_path / "first", "tests.faults.program", fault)
    zygote.wait(run, expect=None, grace_seconds=0)
    assert (tmp_path / "checkpoint/iter_0000004/metadata.json").is_file()
    zygote.run(2, arguments, tmp_path / "second")
    assert kept(tmp_path) == [5, 8]
    assert sorted(read_losses(tmp_path / "metrics.jsonl")) == list(range(1, 9))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--btx-keep-last", "0"], "--btx-keep-last 0: expected 1 or more"),
        (["--save-retain-interval", "2"], "--save-retain-interval removes checkpoints too"),
    ],
)
def test_refused(more, said, zygote, corpus, tmp_path):
    """One line, and nothing is trained."""
    run = zygote.run(1, flags(corpus, tmp_path, more=more), tmp_path / "log", expect=2)
    assert said in run.text() and not (tmp_path / "checkpoint").exists()
