"""Mixing and converting from Python: ``megatron_btx.mix`` and ``megatron_btx.convert``; the commands use it, too.

Both work in this process alone, print nothing, raise what the commands would say in one line
(:class:`megatron_btx.InputError`), and return what was made.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.paths import model_path
from megatron_btx.checkpoint.safetensors import is_model_folder
from megatron_btx.common.files import ByteProgress
from megatron_btx.distributed.launcher import find_place
from megatron_btx.mixing.describe import explain
from megatron_btx.mixing.execute import Conversion, Result
from megatron_btx.mixing.ranks import Ranks
from megatron_btx.mixing.reading import read_request
from megatron_btx.mixing.request import Options, Request
from megatron_btx.mixing.verify import check_manifest, manifest_bytes


def check_result(folder: Path, show_progress: bool = False) -> int:
    """Check an old result, every byte of it, against its manifest; returns the number of its tensors.

    Raises:
        CheckpointError: names what differs.
    """
    progress = ByteProgress("checking", manifest_bytes(folder), quiet=not show_progress)
    return check_manifest(folder, progress.advance)


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
    work: dict[str, Any] = {}
    for field in dataclasses.fields(Options):
        if field.name in options:
            work[field.name] = options.pop(field.name)
    pairs = [(name, str(path)) for name, path in experts.items()]
    request = read_request(pairs, method, options)
    target = Path(output).expanduser() if output is not None else None
    return Conversion(request, target, Options(**work), Ranks()).write()


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
    target = Path(output) if output is not None else None
    settings = dataclasses.replace(options, dry_run=options.dry_run or explained is not None, show_progress=True)
    ranks = Ranks(find_place(os.environ))
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
