"""The last K checkpoints and every M-th of a run are kept, and those of no other; it goes on from each of them."""

from __future__ import annotations

import os
import shutil

import pytest

from megatron_btx.checkpoint.iterations import TRACKER, list_iterations, read_tracker, resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.engine.saving import REPLACED
from tests.faults.test_bad_loss import errors_of
from tests.faults.test_kills import PROGRAM, fault
from tests.support import pico
from tests.support.runner import read_losses


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


def run_of(corpus, folder, steps, more=()):
    """A run of one rank that resumes by itself and saves each of its steps."""
    root = str(folder / "checkpoint")
    arguments = pico.train(corpus, steps, folder / "metrics.jsonl")
    return [*arguments, "--save", root, "--load", root, "--save-interval", "1", *more]


@pytest.fixture(scope="module")
def nine(zygote, corpus, tmp_path_factory):
    """A run with the checkpoints of steps 1 to 9."""
    folder = tmp_path_factory.mktemp("nine")
    zygote.run(1, run_of(corpus, folder, 9), folder / "log")
    return folder


@pytest.mark.parametrize(
    ("fails_by", "more"), [("EDQUOT", []), ("SIGKILL", []), ("SIGKILL", ["--async-save"])], ids=str
)
def test_a_step_that_is_saved_again_is_not_lost(fails_by, more, nine, zygote, corpus, tmp_path):
    """After a NaN in step 5 Megatron saves step 4 again: its only checkpoint stays until that is whole."""
    arguments = run_of(corpus, tmp_path, 8, ["--save-interval", "4", "--btx-keep-last", "1", *more])
    run = zygote.start(1, arguments, tmp_path / "first", PROGRAM, fault("saved_again", 5, "0", fails_by))
    zygote.wait(run, expect=None)
    assert run.codes != [16], run.text()[-2000:]
    run = zygote.run(1, arguments, tmp_path / "again")
    assert "iter_0000004" in next(line for line in run.text().splitlines() if "the run goes on from" in line)
    assert kept(tmp_path) == [8] and not (tmp_path / "checkpoint" / REPLACED).exists()
    reference = read_losses(nine / "metrics.jsonl")
    assert read_losses(tmp_path / "metrics.jsonl") == {step: reference[step] for step in range(1, 9)}


BRANCH = ["--weight-decay", "0.5", "--override-opt-param-scheduler", "--save-interval", "3", "--btx-keep-last", "2"]


def test_a_branch_that_was_left_is_neither_counted_nor_gone_back_to(nine, zygote, corpus, tmp_path):
    """It is moved aside when the new one is first saved, with the links to it, and said."""
    root = tmp_path / "checkpoint"
    shutil.copytree(nine / "checkpoint", root)
    (root / "best").symlink_to("iter_0000008")
    run = zygote.run(1, run_of(corpus, tmp_path, 9, [*BRANCH, "--ckpt-step", "4"]), tmp_path / "log")
    assert kept(tmp_path) == [4, 6, 9]
    (left,) = root.glob("left.*")
    assert sorted(path.name for path in left.iterdir()) == [f"iter_000000{step}" for step in range(5, 10)]
    assert (root / "best").resolve() == left / "iter_0000008"
    said = [line for line in run.text().splitlines() if str(left) in line]
    assert len(said) == 1 and "iter_0000005, iter_0000006" in said[0] and "goes on from step 4" in said[0]
    (root / "iter_0000009/metadata.json").unlink()
    run = zygote.run(1, run_of(corpus, tmp_path, 9, BRANCH), tmp_path / "again")
    assert "the run goes on from the checkpoint of step 6" in run.text()


def test_checkpoints_of_another_run_are_not_saved_among(nine, zygote, corpus, tmp_path):
    """A start from another folder: one line, and nothing there has changed. See tests/unit/engine/test_fallback.py."""
    shutil.copytree(nine / "checkpoint", tmp_path / "checkpoint")
    arguments = run_of(corpus, tmp_path, 12, ["--btx-keep-last", "1", "--override-opt-param-scheduler"])
    arguments[arguments.index("--load") + 1] = str(nine / "checkpoint")
    run = zygote.run(1, arguments, tmp_path / "log", expect=2)
    assert "iter_0000009" in errors_of(run)[0] and "goes on from none of them" in errors_of(run)[0]
    assert kept(tmp_path) == list(range(1, 10))


def test_non_persistent_checkpoints(nine, zygote, corpus, tmp_path):
    """What is beside the checkpoint that is loaded is of that one; their folder is the run's, but not what is in it."""
    more = ["--non-persistent-save-interval", "1", "--non-persistent-ckpt-type", "global"]
    more += ["--non-persistent-global-ckpt-dir", str(tmp_path), "--save-interval", "3", "--btx-skip-bad-steps"]
    arguments = run_of(corpus, tmp_path, 7, more)
    zygote.run(1, [*arguments, "--exit-interval", "5"], tmp_path / "first")
    assert kept(tmp_path) == [3] and read_tracker(tmp_path) == 5
    run = zygote.run(1, arguments, tmp_path / "second")
    assert "the run goes on from" in run.text()
    # Those of step 5 and 7 are no multiple of 3: the last is saved at the end of the run.
    assert kept(tmp_path) == [3, 6, 7] and [step for step, _ in list_iterations(tmp_path)] == [7]
    record = TorchDistReader(tmp_path / "checkpoint/iter_0000007").arguments()["btx_taken_steps"]
    reference = read_losses(nine / "metrics.jsonl")
    assert read_losses(tmp_path / "metrics.jsonl") == {step: reference[step] for step in range(1, 8)}
    assert len(record["loss"]) == 7
    # Its own tracker is empty: Megatron would end with status 0.
    (tmp_path / TRACKER).write_text("")
    more = ["--train-iters", "8", "--override-opt-param-scheduler"]
    run = zygote.run(1, [*arguments, *more], tmp_path / "third")
    assert "goes on from the checkpoint of step 7" in run.text() and kept(tmp_path) == [3, 6, 7, 8]
    # A step that is asked for is that step, and what lies after it is moved aside.
    (tmp_path / "metrics.jsonl").unlink()
    assert list_iterations(tmp_path)
    branch = ["--train-iters", "5", "--override-opt-param-scheduler", "--ckpt-step", "3"]
    branch += ["--non-persistent-save-interval", "100"]
    zygote.run(1, [*arguments, *branch], tmp_path / "fourth")
    assert read_losses(tmp_path / "metrics.jsonl") == {step: reference[step] for step in (4, 5)}
    assert kept(tmp_path) == [3, 5] and [step for step, _ in list_iterations(tmp_path)] == []
    # Without a tracker the newest whole one counts, and another run does not take what is beside.
    (tmp_path / "checkpoint" / TRACKER).unlink()
    run = zygote.run(1, [*arguments, *more], tmp_path / "fifth")
    assert f"{TRACKER}: does not exist; the run goes on from the checkpoint of step 5" in run.text()
    assert read_losses(tmp_path / "metrics.jsonl") == {step: reference[step] for step in range(4, 9)}
    run = zygote.run(
        1, [*arguments, "--save", str(tmp_path / "b"), "--load", str(tmp_path / "b")], tmp_path / "log", expect=2
    )
    assert "holds checkpoints of the run that saves to" in run.text() and not (tmp_path / "b").exists()


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
