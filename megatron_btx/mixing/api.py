"""Mixing and converting from Python: ``megatron_btx.mix`` and ``megatron_btx.convert``.

Both work in this process alone, print nothing, raise what the commands would say in one line
(:class:`megatron_btx.common.errors.InputError`), and return what was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_btx.checkpoint.paths import model_path
from megatron_btx.checkpoint.safetensors import is_model_folder
from megatron_btx.mixing.conversion import Conversion, Result
from megatron_btx.mixing.ranks import Ranks
from megatron_btx.mixing.request import Options, OutputFormat, Request, RouterInit, Vocabulary


def mix(
    experts: Mapping[str, str | Path],
    output: str | Path | None = None,
    *,
    method: str = Request.method,
    topk: int = Request.topk,
    chunks: int | None = None,
    copies: int | None = None,
    layer_frequency: int | Sequence[int] = Request.layer_frequency,
    weights: Mapping[str, float] | None = None,
    take: Mapping[str, str] | None = None,
    vocabulary: Vocabulary = Request.vocabulary,
    router_init: str | Path = RouterInit.kind,
    router_seed: int = RouterInit.seed,
    router_std: float = RouterInit.std,
    pad_vocabulary: int = Request.pad_vocabulary,
    allow_other_tokenizer: bool = False,
    allow_other_ids: bool = False,
    output_format: OutputFormat = Options.output_format,
    workers: int | None = None,
    verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    show_progress: bool = False,
) -> Result:
    """Mix domain experts into one mixture of experts, as ``btx convert`` does.

    >>> result = mix({"math": "runs/math/checkpoint", "code": "runs/code/checkpoint"}, "mixture", topk=2)
    >>> result.manifest["method"]
    'btx'

    Args:
        experts: name -> Megatron checkpoint or Hugging Face model folder, in the order they get in the mixture.
        output: the folder to be made; not needed for a dry run.
        router_init: "normal", "zeros", or the path of an .npy file with rows [layers, experts, hidden].

    The others are the fields of :class:`Request` and :class:`Options`.

    Raises:
        InputError: says what is wrong and what to do; nothing was written, or nothing that loads.
    """
    request = Request(
        experts=tuple((name, str(path)) for name, path in experts.items()),
        method=method,
        topk=topk,
        chunks=chunks,
        copies=copies,
        layer_frequency=_as_frequency(layer_frequency),
        weights=dict(weights or {}),
        take=dict(take or {}),
        vocabulary=vocabulary,
        allow_other_tokenizer=allow_other_tokenizer,
        router=RouterInit.parse(router_init, router_seed, router_std),
        pad_vocabulary=pad_vocabulary,
        allow_other_ids=allow_other_ids,
    )
    options = Options(output_format, workers, verify, overwrite, dry_run, show_progress)
    return carry_out(request, output, options)


def convert(
    model: str | Path,
    output: str | Path | None = None,
    *,
    output_format: OutputFormat | None = None,
    pad_vocabulary: int = Request.pad_vocabulary,
    allow_other_ids: bool = False,
    workers: int | None = None,
    verify: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    show_progress: bool = False,
) -> Result:
    """Move one model, dense or a mixture, between Hugging Face and Megatron, bit for bit, as ``btx convert-hf`` does.

    >>> convert("Llama-3.2-1B", "llama").arguments_file
    PosixPath('llama/megatron_args.txt')

    Args:
        model: a Hugging Face model folder, or a Megatron checkpoint.
        output_format: "megatron" or "hf"; None: that which the model has not.

    The others are the fields of :class:`Request` and :class:`Options`.

    Raises:
        InputError: says what is wrong and what to do; nothing was written, or nothing that loads.
    """
    path = model_path(model)
    if output_format is None:
        output_format = "hf"
        if is_model_folder(path):
            output_format = "megatron"
    options = Options(output_format, workers, verify, overwrite, dry_run, show_progress)
    return carry_out(copy_request(path, pad_vocabulary, allow_other_ids), output, options)


def _as_frequency(given: int | Sequence[int]) -> int | tuple[int, ...]:
    if isinstance(given, int):
        return given
    return tuple(given)


def copy_request(model: Path, pad_vocabulary: int, allow_other_ids: bool) -> Request:
    """The request for one model as it is."""
    return Request(
        experts=(("model", str(model)),),
        method="copy",
        pad_vocabulary=pad_vocabulary,
        allow_other_ids=allow_other_ids,
    )


def carry_out(request: Request, output: str | Path | None, options: Options) -> Result:
    """Plan a request, write its result, and verify it where asked to, in this process alone."""
    target = None
    if output is not None:
        target = Path(output).expanduser()
    return Conversion(request, target, options, Ranks()).write()
