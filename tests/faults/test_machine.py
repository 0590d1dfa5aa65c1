"""What a machine does to a run: data that vanish, a clock that jumps, disks that are full."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

import pytest

from tests.support import pico
from tests.support.runner import read_losses, read_metrics

STEPS = 6


@pytest.fixture
def own_corpus(corpus, tmp_path):
    """A copy of the corpus that a test may harm."""
    prefix = tmp_path / "text"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", f"{prefix}{suffix}")
    return prefix


@pytest.fixture(scope="module")
def undisturbed_root(zygote, corpus, tmp_path_factory):
    """The checkpoints of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    zygote.run(1, flags(corpus, folder), folder / "log")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def undisturbed(undisturbed_root):
    """Its losses."""
    return read_losses(undisturbed_root.parent / "metrics.jsonl")


def flags(corpus, folder, root=None):
    """A run that resumes by itself, saves every two steps and reads its data as it goes."""
    root = str(root or folder / "checkpoint")
    arguments = pico.train(corpus, STEPS, folder / "metrics.jsonl", cache=folder / "cache")
    return [*arguments, "--save", root, "--load", root, "--save-interval", "2"]


def fault(at, step, **more):
    """The environment that names a fault."""
    return {"FAULT_AT": at, "FAULT_STEP": str(step), "FAULT_RANKS": "0", "FAULT_SIGNAL": "", **more}


@contextlib.contextmanager
def small_disk(folder, size_kib):
    """A file system of its own, of a few KiB."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a disk of its own cannot be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def errors_of(run):
    """The lines that a run refuses with."""
    return [line for line in run.text().splitlines() if line.startswith("error:")]


def test_a_dataset_that_is_removed_is_read_to_the_end(zygote, corpus, own_corpus, undisturbed, tmp_path):
    """An open file outlives its name; the next start names what is not there."""
    environment = fault("data_gone", 3, FAULT_PATH=str(own_corpus))
    zygote.run(1, flags(own_corpus, tmp_path), tmp_path / "log", entry="tests.faults.program", environment=environment)
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed
    more = ["--train-iters", "8", "--override-opt-param-scheduler"]
    run = zygote.run(1, [*flags(own_corpus, tmp_path), *more], tmp_path / "again", expect=2)
    assert len(errors_of(run)) == 1 and f"{own_corpus}.bin does not exist" in errors_of(run)[0]


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ("0", "Fatal Python error: Bus error"),
        ("2", "error: a process that reads the data is gone: DataLoader worker"),
    ],
)
def test_a_dataset_that_is_cut_ends_the_run(workers, said, zygote, own_corpus, undisturbed, tmp_path):
    """The log says where it was read; with the data back the run goes on to the same end."""
    whole = own_corpus.with_suffix(".bin").read_bytes()
    arguments = [*flags(own_corpus, tmp_path), "--num-workers", workers]
    environment = fault("data_cut", 4, FAULT_PATH=str(own_corpus))
    run = zygote.start(2, arguments, tmp_path / "log", "tests.faults.program", environment)
    zygote.wait(run, expect=None, grace_seconds=10)
    print(run.codes, run.text()[-3000:])
    assert 0 not in run.codes and said in run.text(), run.text()[-3000:]
    run = zygote.run(2, arguments, tmp_path / "again", expect=2)
    assert f"{own_corpus}.bin is empty" in errors_of(run)[0]
    own_corpus.with_suffix(".bin").write_bytes(whole)
    zygote.run(2, arguments, tmp_path / "mended")
    assert read_losses(tmp_path / "metrics.jsonl") == pytest.approx(undisturbed, abs=1e-5)


def test_a_clock_that_jumps_changes_no_step(zygote, corpus, undisturbed, tmp_path):
    """A day back, then ten years ahead: the same losses, and a time limit alone ends the run early, with a save."""
    run = ("tests.faults.program", fault("clock_jumps", 3))
    zygote.run(1, flags(corpus, tmp_path), tmp_path / "log", entry=run[0], environment=run[1])
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed
    times = [line["time"] for line in read_metrics(tmp_path / "metrics.jsonl").values()]
    assert times[2] < times[1] < times[3]


def test_a_full_disk_while_saving(zygote, corpus, undisturbed, undisturbed_root, tmp_path):
    """One line with the remedy; with room the same command goes on from the checkpoint before."""
    one = sum(file.stat().st_size for file in (undisturbed_root / "iter_0000002").iterdir())
    with small_disk(tmp_path / "disk", one * 3 // 2 // 1024) as disk:
        run = zygote.run(1, flags(corpus, tmp_path, disk / "checkpoint"), tmp_path / "log", expect=2)
        assert len(errors_of(run)) == 1 and "could not be written" in errors_of(run)[0], run.text()[-2000:]
        saved = (disk / "checkpoint/latest_checkpointed_iteration.txt").read_text()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        zygote.run(1, flags(corpus, tmp_path, disk / "checkpoint"), tmp_path / "again")
    assert saved == "2"
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed


def test_a_quota_while_saving(zygote, corpus, undisturbed, tmp_path):
    """As a full disk; the kernel's words are passed on."""
    environment = fault("quota", 4)
    entry = "tests.faults.program"
    run = zygote.run(1, flags(corpus, tmp_path), tmp_path / "log", entry=entry, environment=environment, expect=2)
    assert len(errors_of(run)) == 1 and "quota" in errors_of(run)[0], run.text()[-2000:]
    zygote.run(1, flags(corpus, tmp_path), tmp_path / "again")
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed


def test_a_full_folder_for_temporary_files(zygote, corpus, undisturbed, tmp_path):
    """Nothing of a run needs room in /tmp: it trains and saves, to the same end."""
    with small_disk(tmp_path / "tmp", 8) as disk:
        with contextlib.suppress(OSError):
            (disk / "full").write_bytes(b"x" * 2**20)
        environment = fault("nothing", 0, TMPDIR=str(disk))
        run = zygote.start(1, flags(corpus, tmp_path), tmp_path / "log", "tests.faults.program", environment)
        zygote.wait(run)
    assert read_losses(tmp_path / "metrics.jsonl") == undisturbed
