"""Mixing and converting from Python: ``megatron_btx.mix`` and ``megatron_btx.convert``; the commands use it, too.

Both work in this process alone, print nothing, raise what the commands would say in one line
(:class:`megatron_btx.InputError`), and return what was made.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.paths import model_path
from megatron_btx.checkpoint.safetensors import is_model_folder
from megatron_btx.common.errors import InputError
from megatron_btx.common.files import ByteProgress
from megatron_btx.common.manifest import read_manifest
from megatron_btx.mixing import verify as proof
from megatron_btx.mixing.describe import explain, plan_text, router_text
from megatron_btx.mixing.execute import Execution, default_workers, refuse_output
from megatron_btx.mixing.options import options_of
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.planning import make_plan
from megatron_btx.mixing.ranks import Ranks
from megatron_btx.mixing.reading import keywords, read_options, read_request
from megatron_btx.mixing.request import Options, Request
from megatron_btx.mixing.writers import Output, lay_out_result

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


def mix(
    experts: Mapping[str, str | Path],
    output: str | Path | None = None,
    *,
    method: str = Request.method,
    **options: object,
) -> Result:
    """Mix domain experts into one mixture of experts, as ``btx convert`` does.

    >>> result = mix({"math": "runs/math/checkpoint", "code": "runs/code/checkpoint"}, "mixture", topk=2)
    >>> result.manifest["method"]
    'btx'

    Args:
        experts: name -> Megatron checkpoint or Hugging Face model folder, in the order they get in the mixture.
        output: the folder to be made; not needed for a dry run.
        options: the options of ``btx convert``, described by its --help: the fields of :class:`Request` and
            :class:`Options`, and those that the method has of its own, as ``chunks=2``.

    Raises:
        InputError: says what is wrong and what to do; nothing was written, or nothing that loads.
        TypeError: there is no such option.
    """
    work = {field.name: options.pop(field.name) for field in dataclasses.fields(Options) if field.name in options}
    pairs = [(name, str(path)) for name, path in experts.items()]
    request, target = read_request(pairs, method, options), None
    if output is not None:
        target = Path(output).expanduser()
    return Conversion(request, target, read_options(work), Ranks()).write()


def _signature() -> inspect.Signature:
    """That of :func:`mix` with every option by name, for help() and editors."""
    rows = options_of(Request) | options_of(Options)
    parameters = list(inspect.signature(mix).parameters.values())[:-1]
    for name in keywords():
        default = None
        if name in rows:
            default = rows[name].default
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    return inspect.signature(mix).replace(parameters=parameters)


mix.__signature__ = _signature()  # type: ignore[attr-defined]


def convert(
    model: str | Path,
    output: str | Path | None = None,
    *,
    output_format: str | None = None,
    **options: object,
) -> Result:
    """Move one model, dense or a mixture, between Hugging Face and Megatron, bit for bit, as ``btx convert-hf`` does.

    >>> convert("Llama-3.2-1B", "llama").arguments_file
    PosixPath('llama/megatron_args.txt')

    Args:
        model: a Hugging Face model folder, or a Megatron checkpoint.
        output_format: "megatron" or "hf"; None: that which the model has not.
        options: pad_vocabulary, allow_other_ids, workers, verify, overwrite, dry_run, show_progress; as in :func:`mix`.

    Raises:
        InputError: says what is wrong and what to do; nothing was written, or nothing that loads.
    """
    path = model_path(model)
    if output_format is None:
        output_format = "hf"
        if is_model_folder(path):
            output_format = "megatron"
    return mix({"model": path}, output, method="copy", output_format=output_format, **options)


def run_command(request: Request, options: Options, output: str | None, explained: str | None = None) -> int:
    """Plan, print, write and print again, in each process that a launcher started.

    Args:
        explained: a tensor of the result whose origin is to be printed, instead of writing anything.
    """
    target = None
    if output is not None:
        target = Path(output)
    settings = dataclasses.replace(options, dry_run=options.dry_run or explained is not None, show_progress=True)
    ranks = Ranks.of_launcher()
    conversion = Conversion(request, target, settings, ranks)
    text = conversion.summary
    if explained is not None:
        text = explain(conversion.plan, conversion.output, explained)
    if ranks.rank == 0:
        print(text, flush=True)
    result = conversion.write()
    if ranks.rank == 0 and result.folder is not None:
        if result.verification:
            print(f"verified: {result.verification}")
        hint = ""
        if result.arguments_file is not None:
            hint = f"; continue with the flags in {result.arguments_file}"
        print(f"wrote {result.folder}{hint}")
    return 0
