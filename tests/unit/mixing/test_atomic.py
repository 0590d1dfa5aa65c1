"""Never a half-written folder that loads: full disks, kills at any moment, and overwriting only after success."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError
from megatron_btx.mixing.cli import main
from megatron_btx.mixing.staging import Workplace
from tests.support.mixing import mix, planned, verify
from tests.unit.mixing.checkpoints import expert_words, refused, same_bits, tensors


@contextlib.contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """The kernel refuses to let any file grow past a size: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size_bytes", [1, 50_000, 250_000])
def test_a_file_that_cannot_grow(size_bytes, experts, tmp_path, capsys):
    with files_no_larger_than(size_bytes):
        message = refused(expert_words(experts), tmp_path / "out", capsys)
    assert str(tmp_path / "out") in message and "File too large" in message and "MiB are needed" in message


@pytest.mark.parametrize("size_kib", [4, 64, 200, 400])
def test_a_full_disk(size_kib, experts, tmp_path, capsys):
    """A real file system that is too small, at several moments of the writing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "none", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        message = refused(expert_words(experts), disk / "out", capsys)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "No space left on device" in message and "disk/out" in message and "MiB are needed" in message


@pytest.mark.parametrize("number_of_flushes", range(4))
def test_a_disk_that_fails_at_the_flush(number_of_flushes, experts, tmp_path, capsys, monkeypatch):
    """Network and delayed file systems report a full disk at fsync; whichever flush it is."""
    flush, left = os.fsync, [number_of_flushes]

    def failing(descriptor: int) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    assert "No space left on device" in refused(expert_words(experts), tmp_path / "out", capsys)


def test_overwrite_replaces_after_success_only(experts, tmp_path, capsys):
    """A mix that fails leaves the old output untouched; one that succeeds replaces it whole."""
    out = mix(experts, tmp_path / "out", "--router-seed", "1")
    (out / "left over").write_text("of the old output")
    old = tensors(out)
    with files_no_larger_than(50_000):
        refused([*expert_words(experts), "--overwrite"], out, capsys)
    assert all(same_bits(tensor, old[key]) for key, tensor in tensors(out).items())
    mix(experts, out, "--router-seed", "2", "--overwrite")
    router = "decoder.layers.mlp.router.weight"
    assert not same_bits(tensors(out)[router], old[router])
    assert not (out / "left over").exists()
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize("number_of_renames", [0, 1])
def test_a_rename_that_fails(number_of_renames, experts, tmp_path, capsys, monkeypatch):
    """Even when the very last step fails, the old output is where it was."""
    out = mix(experts, tmp_path / "out", "--router-seed", "1")
    old = tensors(out)
    rename, left = os.rename, [number_of_renames]

    def failing(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert "Permission denied" in refused([*expert_words(experts), "--overwrite"], out, capsys)
    assert all(same_bits(tensor, old[key]) for key, tensor in tensors(out).items())


def test_killed_between_two_renames(experts, tmp_path):
    """An old output that was moved aside and not yet replaced gets its name back."""
    out = mix(experts, tmp_path / "out", "--router-seed", "1")
    os.rename(out, tmp_path / ".out.old")
    with files_no_larger_than(50_000):
        assert main([*expert_words(experts), "--output", str(out)]) == 2
    verify(experts, out, router_seed=1)
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_leavings_of_another_run_do_not_get_into_the_next(experts, tmp_path):
    """What another command left in the hidden folder is removed, not built upon."""
    hidden = tmp_path / ".out.incomplete"
    (hidden / "result" / "release").mkdir(parents=True)
    (hidden / "result" / "release" / "__9_9.distcp").write_text("old")
    (hidden / "plan.json").write_text("{}")
    out = mix(experts, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(out / "release")) == [".metadata", "__0_0.distcp", "metadata.json"]


def test_interrupted_by_the_keyboard(experts, tmp_path, capsys, monkeypatch):
    """Ctrl-C: its own exit code, nothing that loads, and the same command goes on without writing twice."""
    honest, written = Workplace.note, []

    def interrupted(self, rank, hashes):
        hashes = list(hashes)
        honest(self, rank, hashes)
        written.extend(number for number, _ in hashes)
        if len(written) == 10:
            raise KeyboardInterrupt

    words = [*expert_words(experts), "--output", str(tmp_path / "out"), "--workers", "1"]
    monkeypatch.setattr(Workplace, "note", interrupted)
    assert main(words) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not loads(tmp_path / ".out.incomplete" / "result")
    assert main(words) == 0
    tasks = planned(experts, tmp_path / "out")[1].tasks
    assert sorted(written) == list(range(len(tasks))), "a block was written twice, or never"
    verify(experts, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_two_commands_with_one_output(experts, tmp_path, capsys):
    """The second is refused while the first is at work, and takes nothing away from it."""
    first = Workplace(tmp_path / "out")
    first.prepare({"of": "the first"}, {"data": 10})
    first.write("data", 0, b"0123456789")
    assert main([*expert_words(experts), "--output", str(tmp_path / "out")]) == 2
    assert "another conversion is writing there" in capsys.readouterr().err
    assert (first.result / "data").read_bytes() == b"0123456789"
    first.discard()
    mix(experts, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_an_output_that_appears_meanwhile(experts, tmp_path, capsys, monkeypatch):
    """Without --overwrite nothing is replaced, whenever it came; what was made is kept for the same command."""
    honest = Workplace.publish

    def late(self):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        honest(self)

    words = [*expert_words(experts), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(Workplace, "publish", late)
    assert main(words) == 2
    assert "has appeared" in capsys.readouterr().err and (tmp_path / "out" / "precious").read_text() == "mine"
    monkeypatch.setattr(Workplace, "publish", honest)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert main(words) == 0
    verify(experts, tmp_path / "out")


def test_other_router_rows_under_the_same_name_start_over(experts, tmp_path, monkeypatch):
    """What an interrupted run made of a file is not used for another file of that name."""
    import numpy as np

    words = [*expert_words(experts), "--output", str(tmp_path / "out"), "--router-init", str(tmp_path / "rows.npy")]
    honest = Workplace.publish

    def interrupted(self):
        raise KeyboardInterrupt

    np.save(tmp_path / "rows.npy", np.zeros((3, 32), np.float32))
    monkeypatch.setattr(Workplace, "publish", interrupted)
    assert main(words) == 130
    np.save(tmp_path / "rows.npy", np.ones((3, 32), np.float32))
    monkeypatch.setattr(Workplace, "publish", honest)
    assert main(words) == 0
    assert (tensors(tmp_path / "out")["decoder.layers.mlp.router.weight"] == 1).all()


def test_what_an_interrupted_run_left_is_checked(experts, tmp_path, monkeypatch):
    """A block that was noted as written and is not what was noted is written again."""
    honest = Workplace.publish

    def interrupted(self):
        raise KeyboardInterrupt

    words = [*expert_words(experts), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(Workplace, "publish", interrupted)
    assert main(words) == 130
    monkeypatch.setattr(Workplace, "publish", honest)
    data = tmp_path / ".out.incomplete" / "result" / "release" / "__0_0.distcp"
    slot = planned(experts, tmp_path / "out")[1].tasks[3].slot
    with data.open("r+b") as file:
        file.seek(slot.position_bytes)
        file.write(b"damaged!")
    assert main(words) == 0
    verify(experts, tmp_path / "out")


MANY = 3
KILLS = 24


@pytest.fixture
def many(experts) -> dict[str, Path]:
    """Enough experts for a run that is long enough to be killed in."""
    return {f"{name}{number}": path for number in range(MANY) for name, path in experts.items()}


def convert(
    zygote,
    words: list[str],
    log: Path,
    after_seconds: float | None = None,
    reached: Callable[[], bool] = lambda: True,
) -> None:
    """Run the converter in a process of its own; kill it a while after it has reached a point."""
    run = zygote.start(1, words, log, entry="megatron_btx.mixing.cli")
    if after_seconds is None:
        zygote.wait(run)
        return
    deadline = time.monotonic() + 60
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after_seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.group, signal.SIGKILL)
    zygote.wait(run, expect=None)


def loads(path: Path) -> bool:
    """Whether anything would take this folder for a checkpoint."""
    try:
        TorchDistReader(resolve_iteration(path)).arguments()
    except CheckpointError:
        return False
    return True


def test_killed_at_any_moment(many, zygote, tmp_path):
    """SIGKILL at random moments, never starting over: nothing that loads until it is complete; then it is, exactly.

    A moment is a block that has been written, drawn among those that are left, and a little more: on a busy machine too
    the kills are spread over the work. One more than there are is the moment after publishing.
    """
    out, hidden = tmp_path / "out", tmp_path / ".out.incomplete"
    words = [*expert_words(many), "--workers", "1", "--output", str(out)]
    blocks = len(planned(many, out)[1].tasks)
    moments, halfway, resumed = random.Random(0), 0, 0
    for _ in range(KILLS):
        noted = _noted(hidden)
        target = moments.randint(len(noted), blocks + 1)
        convert(
            zygote,
            words,
            tmp_path / "log",
            moments.uniform(0, 0.02),
            lambda target=target: out.exists() or len(_noted(hidden)) >= target,
        )
        if out.exists():
            verify(many, out)
            shutil.rmtree(out)
            shutil.rmtree(hidden, ignore_errors=True)
        elif hidden.exists():
            halfway += 1
            resumed += 0 < len(noted) < len(_noted(hidden))
            assert noted <= _noted(hidden), "what was done must stay done"
            assert not loads(hidden / "result") or _complete(many, hidden / "result")
    assert halfway >= KILLS // 4 and resumed >= KILLS // 8, (
        "else these kills came too early or too late to show anything"
    )
    convert(zygote, words, tmp_path / "log")
    verify(many, out)
    assert not hidden.exists()


def _noted(hidden: Path) -> set[int]:
    place = Workplace(hidden.parent / hidden.name.removeprefix(".").removesuffix(".incomplete"))
    return set(place.read_journal()) if (hidden / "journal").is_dir() else set()


def _complete(experts, folder: Path) -> bool:
    verify(experts, folder)
    return True


def test_killed_while_overwriting(many, zygote, tmp_path):
    """SIGKILL at random moments of --overwrite: the output is the whole old one or the whole new one."""
    out = tmp_path / "out"
    words = [*expert_words(many), "--overwrite", "--output", str(out), "--router-seed"]
    started = time.monotonic()
    convert(zygote, [*words, "1"], tmp_path / "log")
    whole_seconds = time.monotonic() - started
    moments, seen = random.Random(1), {1: 0, 2: 0}
    for _ in range(KILLS // 2):
        convert(zygote, [*words, "2"], tmp_path / "log", moments.uniform(0.2, 1.3) * whole_seconds)
        seed = 1 if _is(many, 1, out) else 2
        if seed == 2:
            verify(many, out, router_seed=2)
        seen[seed] += 1
        if seed == 2:
            convert(zygote, [*words, "1"], tmp_path / "log")
    assert min(seen.values()) > 0, f"{seen}: these kills came too early or too late to show anything"


def _is(experts, seed: int, folder: Path) -> bool:
    try:
        verify(experts, folder, router_seed=seed)
    except CheckpointError:
        return False
    return True
