"""Never a half-written folder that loads: full disks, kills at any moment, and overwriting only after success."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_btx.checkpoint.torch_dist import TorchDistReader, resolve_iteration
from megatron_btx.errors import CheckpointError
from megatron_btx.mix import execute
from megatron_btx.mix.cli import main
from megatron_btx.mix.plan import make_plan
from tests.mixing import mix
from tests.unit.mix.checkpoints import expert_words, refused, same_bits, tensors


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


def test_leavings_of_a_killed_run_do_not_get_into_the_next(experts, tmp_path):
    """What lies in the hidden folder from before is removed, not built upon."""
    hidden = tmp_path / ".out.incomplete" / "release"
    hidden.mkdir(parents=True)
    (hidden / "__9_9.distcp").write_text("old")
    out = mix(experts, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(out / "release")) == [".metadata", "__0_0.distcp", "metadata.json"]


def test_interrupted_by_the_keyboard(experts, tmp_path, capsys, monkeypatch):
    """Ctrl-C: its own exit code, and nothing left."""
    honest, left = execute.TorchDistWriter.write_block, [20]

    def interrupted(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        honest(self, *arguments)

    monkeypatch.setattr(execute.TorchDistWriter, "write_block", interrupted)
    assert main([*expert_words(experts), "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


MANY = 3
KILLS = 20


@pytest.fixture
def many(experts) -> dict[str, Path]:
    """Enough experts for a run that is long enough to be killed in."""
    return {f"{name}{number}": path for number in range(MANY) for name, path in experts.items()}


def convert(zygote, words: list[str], log: Path, after_seconds: float | None = None) -> None:
    """Run the converter in a process of its own; kill it after a while."""
    run = zygote.start(1, words, log, entry="megatron_btx.mix.cli")
    if after_seconds is None:
        zygote.wait(run)
        return
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
    """SIGKILL at random moments: the output is absent, or complete; then the same command succeeds."""
    out, hidden = tmp_path / "out", tmp_path / ".out.incomplete"
    words = [*expert_words(many), "--output", str(out)]
    plan = make_plan([(name, str(path)) for name, path in many.items()], "btx", 2, 1234, False)
    started = time.monotonic()
    convert(zygote, [*words[:-1], str(tmp_path / "first")], tmp_path / "log")
    whole_seconds = time.monotonic() - started
    moments, halfway = random.Random(0), 0
    for _ in range(KILLS):
        convert(zygote, words, tmp_path / "log", moments.uniform(0, 1.1 * whole_seconds))
        if out.exists():
            execute.verify(plan, out)
            execute.shutil.rmtree(out)
        elif hidden.exists():
            halfway += 1
            assert not loads(hidden) or _complete(plan, hidden)
    assert halfway >= KILLS // 4, "else these kills came too early or too late to show anything"
    convert(zygote, words, tmp_path / "log")
    execute.verify(plan, out)
    assert not hidden.exists()


def _complete(plan, folder: Path) -> bool:
    execute.verify(plan, folder)
    return True


def test_killed_while_overwriting(many, zygote, tmp_path):
    """SIGKILL at random moments of --overwrite: the output is the whole old one or the whole new one."""
    out = tmp_path / "out"
    words = [*expert_words(many), "--overwrite", "--output", str(out), "--router-seed"]
    named = [(name, str(path)) for name, path in many.items()]
    plans = {seed: make_plan(named, "btx", 2, seed, False) for seed in (1, 2)}
    started = time.monotonic()
    convert(zygote, [*words, "1"], tmp_path / "log")
    whole_seconds = time.monotonic() - started
    moments, seen = random.Random(1), {1: 0, 2: 0}
    for _ in range(KILLS // 2):
        convert(zygote, [*words, "2"], tmp_path / "log", moments.uniform(0, 1.2 * whole_seconds))
        # Between the two renames the old one lies beside the target, whole.
        found = out if out.exists() else tmp_path / ".out.old"
        seed = 1 if _is(plans[1], found) else 2
        if seed == 2:
            execute.verify(plans[2], found)
        seen[seed] += 1
        if seed == 2:
            convert(zygote, [*words, "1"], tmp_path / "log")
    assert min(seen.values()) > 0, f"{seen}: these kills came too early or too late to show anything"


def _is(plan, folder: Path) -> bool:
    try:
        execute.verify(plan, folder)
    except CheckpointError:
        return False
    return True
