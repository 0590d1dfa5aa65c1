"""One conversion: planned when it is made, written when it is asked to. The Python API and the commands stand on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import ByteProgress
from megatron_btx.common.manifest import read_manifest
from megatron_btx.mixing import verify as proof
from megatron_btx.mixing.describe import explain, plan_text, router_text
from megatron_btx.mixing.execute import Execution, default_workers, refuse_output
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.planning import make_plan
from megatron_btx.mixing.ranks import Ranks
from megatron_btx.mixing.request import Options, Request
from megatron_btx.mixing.writers import FORMATS, Output, lay_out_result

_WORKERS_AT_MOST = 256
_NO_OUTPUT = Path("result")
"""Stands for the folder in the plan of a dry run that names none."""


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
    """A request with its plan.

    Args:
        target: the folder to be made; may be None for a dry run.

    Raises:
        InputError: from the constructor: see the modules of this package. Nothing is written then.
    """

    def __init__(self, request: Request, target: Path | None, options: Options, ranks: Ranks) -> None:
        if target is None and not options.dry_run:
            raise InputError("--output is missing; name the folder for the result, or look at the plan with --dry-run")
        if options.workers is not None and not 1 <= options.workers <= _WORKERS_AT_MOST:
            raise InputError(f"--workers {options.workers}: expected 1 to {_WORKERS_AT_MOST}")
        if options.output_format not in FORMATS:
            raise InputError(f"--output-format {options.output_format}: expected {' or '.join(FORMATS)}")
        self.options = options
        self.ranks = ranks
        self.workers = options.workers or default_workers()
        self.target = target or _NO_OUTPUT
        self.plan: Plan
        self.output: Output
        self.summary: str
        # A file can be missing on one node alone, and nobody writes before everybody has looked.
        ranks.run_on_all(lambda: self._prepare(request))

    def _prepare(self, request: Request) -> None:
        self.plan = make_plan(request)
        self.output = lay_out_result(self.plan, self.options.output_format, self.target)
        self.summary = "\n".join([plan_text(self.plan, self.output, self.workers), *router_text(self.plan)])
        if not self.options.dry_run:
            refuse_output(self.plan, self.output, self.target, self.options.overwrite)

    def explain(self, tensor: str) -> str:
        """Where a tensor of the result comes from: for each of its slices the rule, the sources and their rows."""
        return explain(self.plan, self.output, tensor)

    def write(self) -> Result:
        """Write the result and, if asked for, verify it; after a dry run's plan, nothing.

        Raises:
            InputError: see :meth:`Execution.run`; nothing was written then, or nothing that loads.
        """
        if self.options.dry_run:
            self.ranks.close()
            return Result(None, self.summary)
        quiet = self.ranks.rank > 0 or not self.options.show_progress
        with ByteProgress("mixing", self._work_bytes(), quiet) as progress:
            execution = Execution(
                self.plan,
                self.output,
                self.target,
                self.ranks,
                self.workers,
                progress.advance,
                self.options.overwrite,
            )
            execution.run(self.options.verify)
        self.ranks.close()
        verification = ""
        if self.options.verify:
            count = len(self.output.tensors)
            verification = f"all {count} tensors equal what their rules give; {execution.checked_rows}"
        arguments_file = None
        if self.output.format == "megatron":
            arguments_file = self.target / "megatron_args.txt"
        return Result(self.target, self.summary, arguments_file, verification)

    def _work_bytes(self) -> int:
        """Bytes that this process writes, reads back and checks."""
        passes = 1
        if self.options.verify:
            passes = 2
        written = sum(task.slot.length_bytes for task in self.output.tasks)
        manifests = sum(proof.manifest_bytes(source.root) for source in self.plan.sources)
        return written * passes // self.ranks.world + manifests


def check_result(folder: Path, show_progress: bool = False) -> int:
    """Check an old result, every byte of it, against its manifest; returns the number of its tensors.

    Raises:
        CheckpointError: names what differs.
    """
    with ByteProgress("checking", proof.manifest_bytes(folder), quiet=not show_progress) as progress:
        return proof.check_manifest(folder, progress.advance)
