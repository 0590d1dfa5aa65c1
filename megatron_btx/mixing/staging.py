"""The hidden folder beside a target in which a result grows: resumed after a kill, published by one rename.

.NAME.incomplete/plan.json     what is being made, to the byte
.NAME.incomplete/journal/      one line for each block that is written: its number and the hash of its numbers
.NAME.incomplete/result/       becomes NAME
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError, KeptError
from megatron_btx.common.files import write_atomically

_BLOCK_BYTES = 512
"""The unit of ``st_blocks``."""


class Workplace:
    """Where one result is made."""

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        self.target = target
        self.overwrite = overwrite
        self.folder = target.parent / f".{target.name}.incomplete"
        self.result = self.folder / "result"
        self._plan = self.folder / "plan.json"
        self._journals = self.folder / "journal"
        self._old = target.parent / f".{target.name}.old"
        self._lock = threading.Lock()
        self._held: int | None = None
        self._descriptors: dict[str, tuple[int, threading.Lock]] = {}

    def prepare(self, plan: Mapping[str, Any], files: Mapping[str, int]) -> None:
        """Make the folder and its data files, or keep what an interrupted run of the very same plan has left.

        Raises:
            InputError: there is not room enough on the disk.
            KeptError: another process is at work there.
        """
        self._hold()
        text = json.dumps(plan, sort_keys=True)
        if not self.target.exists() and self._old.exists():
            os.rename(self._old, self.target)  # killed between the two renames of publish
        is_same_plan = self._plan.is_file() and self._plan.read_text() == text
        if not is_same_plan:
            self._plan.unlink(missing_ok=True)  # first: without it nothing is built upon what is left
            for entry in self.folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        self.result.mkdir(parents=True, exist_ok=True)
        self._journals.mkdir(exist_ok=True)
        self._check_room(files, is_same_plan)
        for name, size in files.items():
            file = self.result / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab") as opened:
                opened.truncate(size)
        write_atomically(self._plan, text)

    def _check_room(self, files: Mapping[str, int], is_same_plan: bool) -> None:
        """Refuse a disk that has not room for the files, beside what is written of them."""
        needed = 0
        for name, size in files.items():
            needed += size
            file = self.result / name
            if file.exists():
                needed -= file.stat().st_blocks * _BLOCK_BYTES
        free = shutil.disk_usage(self.result).free
        if needed <= free:
            return
        message = (
            f"--output {self.target}: No space left on device: {needed / 2**20:.1f} MiB are needed there, "
            f"{free / 2**20:.1f} MiB are free; choose another folder or make room"
        )
        if is_same_plan:
            raise KeptError(message)
        raise InputError(message)

    def _hold(self) -> None:
        """Take the folder for this process: two commands with one output would write into each other's files."""
        while self._held is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise KeptError(
                    f"--output {self.target}: another conversion is writing there; wait for it or end it, or choose "
                    "another folder"
                ) from error
            except OSError:
                pass  # a file system without locks
            if self.folder.exists() and os.path.samestat(os.fstat(descriptor), self.folder.stat()):
                self._held = descriptor
            else:  # the other one finished, and removed it, in between
                os.close(descriptor)

    # --- data ---

    def write(self, file: str, position: int, content: memoryview | bytes) -> None:
        """Write bytes at a position of a data file."""
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self.result / file, os.O_WRONLY), threading.Lock()
            descriptor, lock = self._descriptors[file]
        view, done = memoryview(content), 0
        # The kernel lets one thread write a file at a time, and the others burn their core while they wait.
        with lock:
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], position + done)

    def flush(self) -> None:
        """Wait until what this process has written is on disk."""
        for descriptor, _ in self._descriptors.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Close all files, and let other processes have the folder."""
        self._close_files()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _close_files(self) -> None:
        for descriptor, _ in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    # --- the journal ---

    def note(self, rank: int, hashes: Iterable[tuple[int, str]]) -> None:
        """Note blocks as written: one write, so that a kill leaves whole lines and at most one torn one."""
        lines = "".join(f"{number} {digest}\n" for number, digest in hashes)
        with self._lock, (self._journals / str(rank)).open("ab", buffering=0) as journal:
            journal.write(f"\n{lines}".encode())  # the first newline ends a torn line of a killed run

    def read_journal(self) -> dict[int, str]:
        """The blocks that earlier runs have noted as written."""
        found = {}
        for file in sorted(self._journals.iterdir()):
            for line in file.read_text().splitlines():
                number, _, digest = line.partition(" ")
                if number.isdigit() and len(digest) == 64:
                    found[int(number)] = digest
        return found

    # --- the end ---

    def publish(self) -> None:
        """Give the result its name; an old output of that name is moved aside before, and removed last.

        Raises:
            KeptError: an output of that name has appeared meanwhile.
        """
        if os.path.lexists(self.target) and not self.overwrite:
            raise KeptError(
                f"--output {self.target}: has appeared while the result was made, which is kept in {self.folder}; move "
                "the other away and start again"
            )
        _sync_folder(self.result)
        for entry in self.result.rglob("*"):
            if entry.is_dir():
                _sync_folder(entry)
        if not self.target.exists():
            os.rename(self.result, self.target)
        else:
            shutil.rmtree(self._old, ignore_errors=True)
            os.rename(self.target, self._old)
            try:
                os.rename(self.result, self.target)
            except OSError:
                os.rename(self._old, self.target)
                raise
        _sync_folder(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the hidden folder, where it is this process's, and what is left of an old output."""
        if self._held is None:
            return
        self._close_files()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.target.exists():
            shutil.rmtree(self._old, ignore_errors=True)
        self.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
