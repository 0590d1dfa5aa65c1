"""Carrying out a plan: every block computed, hashed and written at its place, by threads and ranks, then published."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import resource
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.stored import Slot, bytes_of
from megatron_btx.common.errors import BTXError, CheckpointError, InputError, KeptError, is_of_the_machine
from megatron_btx.common.files import hash_file, write_flushed
from megatron_btx.common.manifest import FILE_NAME, versions
from megatron_btx.mixing import result_manifest
from megatron_btx.mixing import verify as proof
from megatron_btx.mixing.compute import rows_of
from megatron_btx.mixing.layout import Task
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.ranks import Ranks
from megatron_btx.mixing.request import Request
from megatron_btx.mixing.staging import Workplace
from megatron_btx.mixing.verify import Progress
from megatron_btx.mixing.verify_vocab import check_token_rows
from megatron_btx.mixing.writers import Output

_NOTED_BYTES = 4 << 30
"""With several ranks, written blocks are flushed and noted after about this many bytes each."""


class Execution:
    """One result being made, by this process and the other ranks of its run.

    Args:
        workers: threads of this process that compute and write.
        progress: called with the bytes done since the last call.
    """

    def __init__(
        self,
        plan: Plan,
        output: Output,
        target: Path,
        ranks: Ranks,
        workers: int,
        progress: Progress,
        overwrite: bool = False,
    ) -> None:
        self.plan = plan
        self.output = output
        self.target = target
        self.ranks = ranks
        self.workers = workers
        self.progress = progress
        self.place = Workplace(target, overwrite)
        self.checked_rows = ""
        self._share = range(ranks.rank, len(output.tasks), ranks.world)
        self._stop = threading.Event()

    def run(self, verified: bool) -> None:
        """Write the result, and publish it once it is complete and, if asked for, verified.

        Raises:
            CheckpointError: a source is damaged, or what was read back is not what was to be written.
            InputError: the disk is full or not writable. The hidden folder is removed; after a kill or an interrupt
                it stays, and the same command goes on from it.
            KeptError: another process is gone or works on the same output, or a source cannot be read for now.
        """
        _allow_many_open_files()
        try:
            self._run_on_all(self._prepare)
            hashes: dict[int, str] = {}
            for share in self._run_on_all(self._write_share):
                hashes |= share
            self._run_on_all(lambda: self._finish(hashes))
            if verified:
                self._run_on_all(self._verify_share)
            self._run_on_all(self._publish)
        except (BTXError, OSError) as error:
            if self.ranks.rank == 0 and not isinstance(error, KeptError):
                self.place.discard()
            raise
        finally:
            self.place.close()
            self.place.release()

    def _run_on_all(self, step: Callable[[], Any]) -> list[Any]:
        """As :meth:`Ranks.run_on_all`; what the system says is said of the output."""

        def attempt() -> Any:
            try:
                return step()
            except OSError as error:
                if is_of_the_machine(error):
                    raise
                raise InputError(
                    f"--output {self.target}: cannot be written ({error.strerror or error}); "
                    f"{self.output.size_bytes / 2**20:.1f} MiB are needed there, choose another folder or make room"
                ) from error

        return self.ranks.run_on_all(attempt)

    def _prepare(self) -> None:
        if self.ranks.rank == 0:
            for source in self.plan.sources:
                if proof.carries_manifest(source.root, source.folder):
                    self._check_source(source.root, source.name)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.place.prepare(self._identity(), self.output.files)

    def _check_source(self, root: Path, name: str) -> None:
        """A source that carries a manifest is what the manifest says, or is not used."""
        try:
            proof.check_manifest(root, self.progress)
        except CheckpointError as error:
            raise CheckpointError(f"the expert {name} is not what it was: {error}") from error

    def _identity(self) -> dict[str, Any]:
        """All that a result depends on: what an interrupted run left is only built upon when this is the same."""
        layout = hashlib.sha256()
        for task in self.output.tasks:
            slot = task.slot
            layout.update(f"{task.block.tensor} {task.block.offsets} {slot.file} {slot.position_bytes}\n".encode())
        return {
            "form": result_manifest.FORM,
            "request": repr(self.plan.request),
            "router_sha256": _router_file_hash(self.plan.request),
            "versions": versions(),
            "sources": [result_manifest.source_identity(source) for source in self.plan.sources],
            "layout_sha256": layout.hexdigest(),
        }

    # --- writing ---

    def _write_share(self) -> dict[int, str]:
        """Write this rank's blocks, but those that an earlier run wrote and that are still as it noted them."""
        noted = self.place.read_journal()
        hashes: dict[int, str] = {}
        unnoted: dict[int, str] = {}
        lock = threading.Lock()

        def note() -> None:
            # On several machines: once it has left this one's memory. On one: what a power cut loses, its hash shows.
            if self.ranks.world > 1:
                self.place.flush()
            self.place.note(self.ranks.rank, unnoted.items())
            unnoted.clear()

        def write(number: int) -> None:
            task = self.output.tasks[number]
            slot = task.slot
            noted_hash = noted.get(number)
            if noted_hash and noted_hash == self.place.hash_of(slot.file, slot.position_bytes, slot.length_bytes):
                self._write_around(slot)
                hashes[number] = noted_hash
                self.progress(slot.length_bytes)
            else:
                hashes[number] = self._write_block(task)
                with lock:
                    unnoted[number] = hashes[number]
                    written = sum(self.output.tasks[n].slot.length_bytes for n in unnoted)
                    if self.ranks.world == 1 or written > _NOTED_BYTES:
                        note()

        self._in_threads(write, self._share)
        self.place.flush()
        note()
        return hashes

    def _write_block(self, task: Task) -> str:
        slot, digest = task.slot, hashlib.sha256()
        at = slot.position_bytes
        for fill in task.block.fills:
            for rows in rows_of(self.plan, fill.planned, fill.start, fill.stop):
                if self._stop.is_set():
                    raise KeyboardInterrupt
                content = bytes_of(rows.contiguous())
                digest.update(content)
                self.place.write(slot.file, at, content)
                at += len(content)
                self.progress(len(content))
        assert at == slot.position_bytes + slot.length_bytes, f"{task.block.tensor}: {at} is not the end of its block"
        self._write_around(slot)
        return digest.hexdigest()

    def _write_around(self, slot: Slot) -> None:
        """What belongs before and after the numbers of a block."""
        if slot.before:
            self.place.write(slot.file, slot.position_bytes - len(slot.before), slot.before)
        if slot.after:
            self.place.write(slot.file, slot.position_bytes + slot.length_bytes, slot.after)

    def _in_threads(self, work: Callable[[int], None], numbers: Iterable[int]) -> None:
        """Do ``work`` for all numbers in this process's threads; the first failure ends the others soon."""
        import torch

        queue, lock = iter(numbers), threading.Lock()

        def loop() -> None:
            while not self._stop.is_set():
                with lock:
                    number = next(queue, None)
                if number is None:
                    return
                work(number)

        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
                futures = [pool.submit(loop) for _ in range(self.workers)]
                try:
                    for future in concurrent.futures.as_completed(futures):
                        future.result()
                except BaseException:  # Ctrl-C too: the threads must end before the pool can be left
                    self._stop.set()
                    raise
        finally:
            torch.set_num_threads(threads_before)

    # --- the end ---

    def _finish(self, hashes: dict[int, str]) -> None:
        """Rank 0 writes all that stands beside the numbers, the manifest last."""
        if self.ranks.rank != 0:
            return
        for file, position, content in self.output.parts:
            self.place.write(file, position, content)
        self.place.flush()
        for name, content in self.output.small_files.items():
            (self.place.result / name).parent.mkdir(parents=True, exist_ok=True)
            write_flushed(self.place.result / name, content)
        manifest = result_manifest.make_manifest(self.plan, self.output, hashes, self.place.result)
        write_flushed(self.place.result / FILE_NAME, manifest)

    def _verify_share(self) -> None:
        check = proof.check_against_sources(self.plan, self.output, self.place.result)
        self._in_threads(lambda number: check(self.output.tasks[number], self.progress), self._share)
        if self.ranks.rank == 0:
            self.checked_rows = check_token_rows(self.plan, self.output, self.place.result)

    def _publish(self) -> None:
        if self.ranks.rank == 0:
            self.place.publish()


def _allow_many_open_files() -> None:
    """Checkpoints of large runs are thousands of files, more than a process may have open by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _router_file_hash(request: Request) -> str | None:
    """SHA-256 of the file that holds the routers' rows; None where they come from none."""
    if request.router.file is None or not request.router.file.is_file():
        return None
    return hash_file(request.router.file)


def default_workers() -> int:
    """As many threads as this process may run at once, four at most: disks, not cores, bound the work from there."""
    return min(4, len(os.sched_getaffinity(0)))


def refuse_output(plan: Plan, output: Output, target: Path, overwrite: bool) -> None:
    """Refuse an output that exists (unless one of its own kind is to be overwritten) or that is, or holds, a source.

    Raises:
        InputError: says which.
    """
    resolved = target.resolve()
    for source in plan.sources:
        place = source.folder.resolve()
        if resolved == place or resolved in place.parents:
            raise InputError(f"--output {target}: holds the expert {source.name} ({place}); choose another folder")
        if {place, source.root.resolve()} & set(resolved.parents):
            raise InputError(f"--output {target}: lies in the expert {source.name} ({place}); choose another folder")
    if target.name in ("", ".."):
        raise InputError(f"--output {str(target)!r}: expected a name for the folder at its end")
    if os.path.lexists(target) and not overwrite:
        raise InputError(f"--output {target}: exists already; choose another folder, or replace it with --overwrite")
    if target.exists() and not (target / output.mark).is_file():
        raise InputError(
            f"--output {target}: is not a checkpoint (no {output.mark}), so --overwrite will not remove it"
        )
