"""A damaged checkpoint: a run falls back to the one before and says so, or is refused by the name of the file."""

from __future__ import annotations

import shutil

import pytest

from megatron_btx.checkpoint.iterations import TRACKER
from tests.support import pico
from tests.support.runner import read_losses

STEPS, EVERY = 6, 2


def flags(corpus, folder, root=None, more=()):
    """A run of one rank that resumes by itself."""
    root = str(root or folder / "checkpoint")
    arguments = pico.train(corpus, STEPS, folder / "metrics.jsonl")
    return [*arguments, "--save", root, "--load", root, "--save-interval", str(EVERY), *more]


@pytest.fixture(scope="module")
def finished(zygote, corpus, tmp_path_factory):
    """A run with three checkpoints, whose files have Megatron's checksums."""
    folder = tmp_path_factory.mktemp("finished")
    zygote.run(1, flags(corpus, folder, more=["--verify-integrity"]), folder / "log")
    return folder


def cut_short(file):
    """As after a crash of the machine: the end was never written."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def data_file(root, step=6):
    """The largest file of a checkpoint."""
    return max((root / f"iter_{step:07d}").glob("*.distcp"), key=lambda file: file.stat().st_size)


def empty_all(root):
    """Every file of the newest checkpoint is there, and empty."""
    for file in (root / "iter_0000006").iterdir():
        file.write_bytes(b"")


def empty_two(root):
    """The newest two checkpoints are of no use."""
    empty_all(root)
    (root / "iter_0000004" / ".metadata").unlink()


DAMAGES = {
    "truncated data": (lambda root: cut_short(data_file(root)), "is truncated", 4),
    "truncated index": (lambda root: cut_short(root / "iter_0000006" / ".metadata"), ".metadata", 4),
    "empty files": (empty_all, "iter_0000006", 4),
    "a file is gone": (lambda root: data_file(root).unlink(), "does not exist", 4),
    "empty tracker": (lambda root: (root / TRACKER).write_text(""), "holds ''", 6),
    "the newest two": (empty_two, "iter_0000006", 2),
    "folder is gone": (lambda root: shutil.rmtree(root / "iter_0000006"), "names iter_0000006", 4),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_to_the_one_before(damage, finished, zygote, corpus, tmp_path):
    """The newest whole checkpoint goes on to the same end, and the damaged ones are written anew."""
    harm, said, step = DAMAGES[damage]
    shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    harm(tmp_path / "checkpoint")
    run = zygote.run(1, flags(corpus, tmp_path), tmp_path / "log")
    line = next(line for line in run.text().splitlines() if "the run goes on from the checkpoint of step" in line)
    assert said in line and f"of step {step}" in line
    if step == STEPS:
        assert "nothing left to train" in run.text()
        return
    reference = read_losses(finished / "metrics.jsonl")
    assert read_losses(tmp_path / "metrics.jsonl") == {at: reference[at] for at in range(step + 1, STEPS + 1)}
    again = zygote.run(1, flags(corpus, tmp_path), tmp_path / "again")
    assert "step 6 of 6: nothing left to train" in again.text() and "goes on from" not in again.text()


def test_a_save_over_an_older_one_never_loads_half_written(finished, zygote, corpus, tmp_path):
    """Killed on top of a checkpoint that was whole, it would have old and new files under the old description."""
    shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / TRACKER).write_text("2")
    (tmp_path / "checkpoint/iter_0000004/of_the_older_one").write_text("")
    fault = {"FAULT_AT": "while_saving", "FAULT_STEP": "4", "FAULT_RANKS": "0", "FAULT_SIGNAL": "SIGKILL"}
    run = zygote.start(1, flags(corpus, tmp_path), tmp_path / "killed", "tests.faults.program", fault)
    zygote.wait(run, expect=None)
    left = [path.name for path in (tmp_path / "checkpoint/iter_0000004").iterdir()]
    assert left and not {"metadata.json", "of_the_older_one"} & set(left)
    (tmp_path / "metrics.jsonl").unlink()
    zygote.run(1, flags(corpus, tmp_path), tmp_path / "again")
    reference = read_losses(finished / "metrics.jsonl")
    assert read_losses(tmp_path / "metrics.jsonl") == {at: reference[at] for at in range(3, STEPS + 1)}


def test_no_whole_checkpoint_is_refused(finished, zygote, corpus, tmp_path):
    """Nothing is trained anew over what somebody may still want to save."""
    shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    for step in (2, 4, 6):
        cut_short(data_file(tmp_path / "checkpoint", step))
    run = zygote.run(1, flags(corpus, tmp_path), tmp_path / "log", expect=2)
    errors = [line for line in run.text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "is truncated" in errors[0] and "no earlier checkpoint" in errors[0]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_somebody_elses_checkpoint_is_not_replaced_by_an_older_one(finished, zygote, corpus, tmp_path):
    """--load of another folder than --save is that checkpoint, or an error."""
    shutil.copytree(finished / "checkpoint", tmp_path / "theirs")
    empty_all(tmp_path / "theirs")
    arguments = flags(corpus, tmp_path, tmp_path / "theirs")
    arguments[arguments.index("--save") + 1] = str(tmp_path / "own")
    run = zygote.run(1, arguments, tmp_path / "log", expect=2)
    assert "goes on from" not in run.text() and "iter_0000006" in run.text()


def test_a_flipped_bit_is_named(finished, zygote, corpus, tmp_path):
    """With --verify-integrity, by the checksums that Megatron wrote: the file is named, and nothing is trained."""
    shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    file = data_file(tmp_path / "checkpoint", 6)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    more = ["--verify-integrity", "--train-iters", "8", "--override-opt-param-scheduler"]
    run = zygote.run(1, flags(corpus, tmp_path, more=more), tmp_path / "log", expect=2)
    errors = [line for line in run.text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and file.name in errors[0] and "--ckpt-step 4" in errors[0], run.text()[-3000:]
    assert not read_losses(tmp_path / "metrics.jsonl")
    zygote.run(1, flags(corpus, tmp_path, more=[*more, "--ckpt-step", "4"]), tmp_path / "before")
    assert sorted(read_losses(tmp_path / "metrics.jsonl")) == [5, 6, 7, 8]


def test_checksums_are_verified_where_there_are_any(finished, zygote, corpus, tmp_path):
    """A stage that starts from a checkpoint without them says so; the run's own must have them."""
    shutil.copytree(finished / "checkpoint", tmp_path / "theirs")
    (tmp_path / "theirs/iter_0000006/integrity.json").unlink()
    start = ["--pretrained-checkpoint", str(tmp_path / "theirs"), "--verify-integrity", "--exit-interval", "2"]
    run = zygote.run(1, flags(corpus, tmp_path, more=start), tmp_path / "log")
    assert "has no integrity.json, so --verify-integrity cannot verify it" in run.text()
    (tmp_path / "checkpoint/iter_0000002/integrity.json").unlink()
    run = zygote.run(1, flags(corpus, tmp_path, more=start), tmp_path / "again", expect=2)
    assert "Integrity manifest not found" in run.text() and "Traceback" not in run.text()
