"""Carrying out a plan: every block computed, hashed and written at its place, by threads and ranks, then published."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import resource
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.stored import Slot, bytes_of
from megatron_btx.common.errors import BTXError, CheckpointError, InputError, KeptError, is_of_the_machine
from megatron_btx.common.files import ByteProgress, hash_file, write_flushed
from megatron_btx.common.manifest import FILE_NAME, read_manifest, versions
from megatron_btx.mixing import result_manifest
from megatron_btx.mixing import verify as proof
from megatron_btx.mixing.compute import rows_of
from megatron_btx.mixing.describe import plan_text
from megatron_btx.mixing.layout import Task
from megatron_btx.mixing.planning import make_plan
from megatron_btx.mixing.ranks import Ranks
from megatron_btx.mixing.request import Options, Request
from megatron_btx.mixing.result_manifest import hash_stretch
from megatron_btx.mixing.staging import Workplace
from megatron_btx.mixing.writers import lay_out_result

_NO_OUTPUT = Path("result")
"""Stands for the folder in the plan of a dry run that names none."""
_NOTED_BYTES = 4 << 30
"""With several ranks, written blocks are flushed and noted after about this many bytes each."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a conversion has made."""

    folder: Path | None
    """The checkpoint root or model folder; None after a dry run."""
    summary: str
    """The plan in words: sources, rules, sizes, vocabulary, routers, configuration."""
    arguments_file: Path | None = None
    """The flags with which Megatron continues from the result; None for Hugging Face results and dry runs."""
    verification: str = ""
    """What was read back and compared, in words; "" where that was not asked for."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The result's manifest: its sources, and of every tensor operation, origin and hash; {} after a dry run."""
        if self.folder is None:
            return {}
        return read_manifest(self.folder) or {}


class Conversion:
    """A request with its plan, carried out by this process and the other ranks of its run.

    Args:
        target: the folder to be made; may be None for a dry run.

    Raises:
        InputError: from the constructor: see the modules of this package. Nothing is written then.
    """

    def __init__(self, request: Request, target: Path | None, options: Options, ranks: Ranks) -> None:
        if target is None and not options.dry_run:
            raise InputError("--output is missing; name the folder for the result, or look at the plan with --dry-run")
        self.target = target or _NO_OUTPUT
        self.options = options
        self.ranks = ranks
        # Disks, not cores, bound the work from four threads on.
        self.workers = options.workers or min(4, len(os.sched_getaffinity(0)))
        self.place = Workplace(self.target, options.overwrite)
        self._stop = threading.Event()
        # A file can be missing on one node alone, and nobody writes before everybody has looked.
        ranks.run_on_all(lambda: self._make_plan(request))
        self._share = range(ranks.rank, len(self.output.tasks), ranks.world)

    def _make_plan(self, request: Request) -> None:
        self.plan = make_plan(request)
        self.output = lay_out_result(self.plan, self.options.output_format, self.target)
        self.summary = plan_text(self.plan, self.output, self.workers)
        if not self.options.dry_run:
            self._refuse_output()

    def _refuse_output(self) -> None:
        """Refuse an output that exists (but one of its own kind, to be overwritten) or that is, or holds, a source."""
        target, mark = self.target, self.output.mark
        resolved = target.resolve()
        for source in self.plan.sources:
            place = source.folder.resolve()
            if resolved == place or resolved in place.parents:
                raise InputError(f"--output {target}: holds the expert {source.name} ({place}); choose another folder")
            if {place, source.root.resolve()} & set(resolved.parents):
                raise InputError(
                    f"--output {target}: lies in the expert {source.name} ({place}); choose another folder"
                )
        if target.name in ("", ".."):
            raise InputError(f"--output {str(target)!r}: expected a name for the folder at its end")
        if os.path.lexists(target) and not self.options.overwrite:
            raise InputError(
                f"--output {target}: exists already; choose another folder, or replace it with --overwrite"
            )
        if target.exists() and not (target / mark).is_file():
            raise InputError(f"--output {target}: is not a checkpoint (no {mark}), so --overwrite will not remove it")

    def write(self) -> Result:
        """Write the result, and publish it once it is complete and, if asked for, verified; of a dry run, nothing.

        Raises:
            CheckpointError: a source is damaged, or what was read back is not what was to be written.
            InputError: the disk is full or not writable. The hidden folder is removed; after a kill or an interrupt
                it stays, and the same command goes on from it.
            KeptError: another process is gone or works on the same output, or a source cannot be read for now.
        """
        if self.options.dry_run:
            self.ranks.close()
            return Result(None, self.summary)
        passes = 1 + self.options.verify
        written = sum(task.slot.length_bytes for task in self.output.tasks) * passes // self.ranks.world
        manifests = sum(proof.manifest_bytes(source.root) for source in self.plan.sources)
        quiet = self.ranks.rank > 0 or not self.options.show_progress
        self.progress = ByteProgress("mixing", written + manifests, quiet).advance
        verification = self._write_all()
        self.ranks.close()
        arguments_file = None
        if self.output.format == "megatron":
            arguments_file = self.target / "megatron_args.txt"
        return Result(self.target, self.summary, arguments_file, verification)

    def _write_all(self) -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:  # checkpoints of large runs are thousands of files
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        verification = ""
        try:
            self._run_on_all(self._prepare)
            hashes: dict[int, str] = {}
            for share in self._run_on_all(self._write_share):
                hashes |= share
            self._run_on_all(lambda: self._finish(hashes))
            if self.options.verify:
                verification = self._run_on_all(self._verify_share)[0]
            self._run_on_all(self._publish)
        except (BTXError, OSError) as error:
            if self.ranks.rank == 0 and not isinstance(error, KeptError):
                self.place.discard()
            raise
        finally:
            self.place.close()
        return verification

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
                if not proof.carries_manifest(source.root, source.folder):
                    continue
                try:
                    proof.check_manifest(source.root, self.progress)
                except CheckpointError as error:
                    raise CheckpointError(f"the expert {source.name} is not what it was: {error}") from error
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.place.prepare(self._identity(), self.output.files)

    def _identity(self) -> dict[str, Any]:
        """All that a result depends on: what an interrupted run left is only built upon when this is the same."""
        router_file = self.plan.request.router.file
        router_hash = None
        if router_file is not None and router_file.is_file():
            router_hash = hash_file(router_file)
        layout = hashlib.sha256()
        for task in self.output.tasks:
            slot = task.slot
            layout.update(f"{task.block.tensor} {task.block.offsets} {slot.file} {slot.position_bytes}\n".encode())
        return {
            "form": result_manifest.FORM,
            "request": repr(self.plan.request),
            "router_sha256": router_hash,
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
            file = self.place.result / slot.file
            if noted_hash and noted_hash == hash_stretch(file, slot.position_bytes, slot.length_bytes):
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
        self.place.write(slot.file, slot.position_bytes - len(slot.before), slot.before)
        self.place.write(slot.file, slot.position_bytes + slot.length_bytes, slot.after)

    def _in_threads(self, work: Callable[[int], None], numbers: Iterable[int]) -> None:
        """Do ``work`` for all numbers in this process's threads; the first failure ends the others soon."""
        import torch

        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
                futures = [pool.submit(work, number) for number in numbers]
                try:
                    for future in concurrent.futures.as_completed(futures):
                        future.result()
                except BaseException:  # Ctrl-C too: the threads must end before the pool can be left
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
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

    def _verify_share(self) -> str:
        check = proof.check_against_sources(self.plan, self.output, self.place.result)
        self._in_threads(lambda number: check(self.output.tasks[number], self.progress), self._share)
        if self.ranks.rank != 0:
            return ""
        rows = proof.check_token_rows(self.plan, self.output, self.place.result)
        return f"all {len(self.output.tensors)} tensors equal what their rules give; {rows}"

    def _publish(self) -> None:
        if self.ranks.rank == 0:
            self.place.publish()
