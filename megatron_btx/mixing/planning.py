"""Making the plan of a mix: the sources opened and compared, then what makes every piece of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.pieces import Piece, pieces_of
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.compatible import compare_sources
from megatron_btx.mixing.loader import HEAD, Source, open_source
from megatron_btx.mixing.methods import METHODS, Chunk, Given, Method, Model
from megatron_btx.mixing.plan import Part, Plan, PlannedPiece
from megatron_btx.mixing.request import Request
from megatron_btx.mixing.result import dense_arguments, mixture_arguments

if TYPE_CHECKING:
    import torch

_BASE = "the base"
"""Its name as a source; no expert's has a blank."""


def make_plan(request: Request) -> Plan:
    """Open the sources, check that they fit together, and plan the result.

    Raises:
        InputError: sources that differ, a number that does not divide, tensors that the method cannot make.
    """
    method = METHODS[request.method]
    sources = [open_source(name, path) for name, path in request.experts]
    _check_kinds(method, sources)
    weights = [request.weights.get(source.name, 1.0) for source in sources]
    models = [Model(source.name, source.expert_names) for source in sources]
    if method.has_base:
        sources.append(open_source(_BASE, request.own["base"]))
    first = compare_sources(sources, request)
    first["padded_vocab_size"] += -first["padded_vocab_size"] % request.pad_vocabulary
    given = Given(request.own, tuple(models))
    arguments = _arguments(request, given, sources[0], first)
    sizes = Sizes.of(arguments)
    pieces = tuple(_plan_pieces(request, given, sources, sizes))
    total = sum(weights)
    return Plan(request, tuple(sources), tuple(weight / total for weight in weights), pieces, arguments, sizes)


def _check_kinds(method: Method, sources: Sequence[Source]) -> None:
    for number, source in enumerate(sources):
        kind = method.takes[min(number, len(method.takes) - 1)]
        experts = source.sizes.experts
        if kind == "dense" and experts:
            raise InputError(
                f"{source.name} ({source.folder}): is a mixture of {experts} experts, expected a dense model"
            )
        if kind == "mixture" and not experts:
            raise InputError(f"{source.name} ({source.folder}): has no routers, expected a mixture of experts")


def _arguments(request: Request, given: Given, source: Source, first: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the result: the sources' own, a mixture's whose experts are others, or a new mixture's."""
    method = METHODS[request.method]
    if method.experts is None:
        return dense_arguments(first)
    experts = method.experts(given)
    ffn = source.sizes.expert_ffn
    if ffn % experts.cut:
        raise InputError(
            f"--method {request.method}: the feed-forward size {ffn} cannot be cut in {experts.cut} equal parts; "
            f"choose a divisor of {ffn}"
        )
    ffn = ffn // experts.cut * experts.chunks
    if source.sizes.experts:
        changed = {"num_experts": len(experts.names), "btx_experts": list(experts.names), "moe_ffn_hidden_size": ffn}
        return dense_arguments(first) | changed
    if not 1 <= request.topk <= len(experts.names):
        raise InputError(f"--moe-router-topk {request.topk}: expected 1 to {len(experts.names)}, the number of experts")
    frequency = _check_frequency(request.layer_frequency, first["num_layers"])
    return mixture_arguments(first, experts.names, request.topk, ffn, frequency)


def _check_frequency(frequency: int | tuple[int, ...], layers: int) -> int | list[int]:
    if isinstance(frequency, int):
        if not 1 <= frequency <= layers:
            raise InputError(f"--moe-layer-freq {frequency}: expected 1 to {layers}, or a list of 0 and 1 per layer")
        return frequency
    pattern = list(frequency)
    if len(pattern) != layers or set(pattern) - {0, 1} or 1 not in pattern:
        raise InputError(
            f"--moe-layer-freq {str(pattern).replace(' ', '')}: expected {layers} numbers 0 or 1, one per layer, "
            "and at least one 1"
        )
    if 0 in pattern:
        return pattern
    return 1


def _plan_pieces(request: Request, given: Given, sources: Sequence[Source], sizes: Sizes) -> Iterator[PlannedPiece]:
    """Every piece of the result; whether it has a head of its own, the sources show."""
    by_name = {source.name: source for source in sources}
    first = by_name[request.take.get("dtype", sources[0].name)]
    for piece in pieces_of(sizes):
        operation, chunks = METHODS[request.method].make(given, piece)
        missing = [chunk for chunk in chunks if chunk.piece not in sources[chunk.source].pieces]
        if missing and piece.required and piece.name != HEAD:
            source = sources[missing[0].source]
            raise InputError(f"{source.name} ({source.folder}): has no {missing[0].piece}, for {piece.name}")
        if missing:
            continue
        axis = int(".down.weight" in piece.name and any(chunk.count > 1 for chunk in chunks))
        parts = tuple(_part(piece, chunk, sources, axis) for chunk in chunks)
        shape = piece.shape
        if piece.shape[0] == -1 or piece.name.startswith(("embedding.", "head.")):
            rows = max(part.stop for part in parts)  # where vocabularies differ, of as many as the largest
            shape = (rows, *piece.shape[1:])
        planned = PlannedPiece(piece, shape, _dtype(piece, chunks, first, sources), operation, parts, axis)
        if planned.has_token_rows:
            new_rows = -shape[0] % request.pad_vocabulary
            planned = dataclasses.replace(planned, shape=(shape[0] + new_rows, *shape[1:]), new_rows=new_rows)
        yield planned


def _dtype(piece: Piece, chunks: Sequence[Chunk], first: Source, sources: Sequence[Source]) -> torch.dtype:
    """The dtype of a piece: of what it is made of in ``first``; of a new router, of what it routes to."""
    names = [chunk.piece for chunk in chunks]
    names += [piece.name, f"layers.{piece.numbers.get('layer')}.ffn.down.weight"]
    for name in names:
        if name in first.pieces:
            return first.pieces[name].dtype
    return sources[chunks[0].source].pieces[chunks[0].piece].dtype


def _part(piece: Piece, chunk: Chunk, sources: Sequence[Source], axis: int) -> Part:
    if chunk.count > 1 and piece.name.endswith("down.bias"):
        raise InputError(
            f"{piece.name}: a feed-forward block with biases cannot be cut, its second bias belongs to the whole; "
            "use --method btx or upcycle"
        )
    extent = sources[chunk.source].pieces[chunk.piece].shape[axis]
    start = extent * chunk.index // chunk.count
    return Part(chunk.source, chunk.piece, start, extent * (chunk.index + 1) // chunk.count)
