"""Making the plan of a mix: the sources opened and compared, then a rule for every piece of the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_btx.checkpoint.pieces import Piece, pieces_of
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.compatible import compare_sources
from megatron_btx.mixing.loader import open_source
from megatron_btx.mixing.merge import MOVE, NEW_ROUTERS, ZEROS
from megatron_btx.mixing.methods import METHODS, Expert, Method
from megatron_btx.mixing.plan import Operation, Plan, PlannedPiece, SourceRows
from megatron_btx.mixing.request import Request
from megatron_btx.mixing.request_checks import check_request, number_of
from megatron_btx.mixing.result import dense_arguments, mixture_arguments
from megatron_btx.mixing.sources import Source

if TYPE_CHECKING:
    import torch


def make_plan(request: Request) -> Plan:
    """Open the sources, check that they fit together, and plan the result.

    Raises:
        InputError: too few sources, sources that differ, a number that does not divide, tensors without a rule.
    """
    request = check_request(request)
    method = METHODS[request.method]
    number = number_of(request)
    names = [name for name, _ in request.experts]
    sources = tuple(open_source(name, path) for name, path in request.experts)
    if method.experts:
        for source in sources:
            if source.sizes.experts:
                raise InputError(
                    f"{source.name} ({source.folder}): is a mixture of {source.sizes.experts} experts, "
                    "expected a dense model"
                )
    if method.new_routers and not sources[0].sizes.experts:
        raise InputError(f"{sources[0].name} ({sources[0].folder}): has no routers, expected a mixture of experts")
    first = compare_sources(sources, request)
    first["padded_vocab_size"] = _round_up(first["padded_vocab_size"], request.pad_vocabulary)
    arguments = dense_arguments(first)
    if method.experts:
        result_names = names
        if method.names:
            result_names = method.names(names, number)
        ffn = _expert_ffn(method.experts(len(sources), number), first["ffn_hidden_size"], request)
        if not 1 <= request.topk <= len(result_names):
            raise InputError(
                f"--moe-router-topk {request.topk}: expected 1 to {len(result_names)}, the number of experts"
            )
        frequency = _check_frequency(request.layer_frequency, first["num_layers"])
        arguments = mixture_arguments(first, result_names, request.topk, ffn, frequency)
    weights = [request.weights.get(name, 1.0) for name in names]
    total = sum(weights)
    sizes = Sizes.of(arguments)
    pieces = tuple(_planned_pieces(request, method, sources, sizes))
    return Plan(request, sources, tuple(weight / total for weight in weights), pieces, arguments, sizes)


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


def _expert_ffn(experts: list[Expert], ffn: int, request: Request) -> int:
    """Feed-forward size of the result's experts."""
    for chunk in experts[0]:
        if ffn % chunk.count:
            raise InputError(
                f"--method {request.method}: the feed-forward size {ffn} cannot be cut in {chunk.count} equal parts; "
                f"choose a divisor of {ffn}"
            )
    return sum(ffn // chunk.count for chunk in experts[0])


def _planned_pieces(
    request: Request, method: Method, sources: Sequence[Source], sizes: Sizes
) -> Iterator[PlannedPiece]:
    """Every piece of the result; whether it has a head of its own, the sources show."""
    first = sources[0]
    for source in sources:
        if source.name == request.take.get("dtype"):
            first = source
    experts: list[Expert] = []
    if method.experts:
        experts = method.experts(len(sources), number_of(request))
    for piece in pieces_of(sizes):
        if experts and "expert" in piece.numbers:
            origin = piece.name.replace(f"experts.{piece.numbers['expert']}.", "ffn.")
            if origin in first.pieces:
                yield _expert_piece(piece, origin, experts[piece.numbers["expert"]], sources, first)
        elif experts and ".router." in piece.name:
            yield _router_piece(piece, first)
        elif method.new_routers and piece.name.endswith(".router.weight"):
            yield PlannedPiece(piece, piece.shape, first.pieces[piece.name].dtype, NEW_ROUTERS)
        elif piece.name in first.pieces:
            planned = _shared_piece(piece, method, sources, first.pieces[piece.name].dtype)
            if planned.has_token_rows:
                planned = _add_new_rows(planned, request)
            yield planned


def _router_piece(piece: Piece, first: Source) -> PlannedPiece:
    """A new router's weight; and its bias, which Megatron's has where the linear layers have one.

    Source: core/transformer/moe/router.py.
    """
    dtype = first.pieces[f"layers.{piece.numbers['layer']}.ffn.down.weight"].dtype
    operation: Operation = ZEROS
    if piece.name.endswith("weight"):
        operation = NEW_ROUTERS
    return PlannedPiece(piece, piece.shape, dtype, operation)


def _shared_piece(piece: Piece, method: Method, sources: Sequence[Source], dtype: torch.dtype) -> PlannedPiece:
    """A piece that becomes no expert; where vocabularies differ, of as many rows as the largest."""
    parts = []
    rows = 0
    for number, source in enumerate(sources):
        held = source.pieces[piece.name].shape[0]
        parts.append(SourceRows(number, piece.name, 0, held))
        rows = max(rows, held)
    shape = (rows, *sources[0].pieces[piece.name].shape[1:])
    return PlannedPiece(piece, shape, dtype, method.shared, tuple(parts))


def _round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple


def _add_new_rows(planned: PlannedPiece, request: Request) -> PlannedPiece:
    """An embedding or head with as many rows as the user asks for."""
    rows, *rest = planned.shape
    padded = _round_up(rows, request.pad_vocabulary)
    return dataclasses.replace(planned, shape=(padded, *rest), new_rows=padded - rows)


def _expert_piece(piece: Piece, origin: str, chunks: Expert, sources: Sequence[Source], first: Source) -> PlannedPiece:
    """A piece of an expert: its chunks one after the other along F, the rows of gate and up and the columns of down."""
    axis = int(".down.weight" in origin)
    parts = []
    for chunk in chunks:
        extent = sources[chunk.source].pieces[origin].shape[axis]
        if origin.endswith("down.bias") and chunk.count > 1:
            raise InputError(
                f"{piece.name}: a feed-forward block with biases cannot be cut, its second bias belongs to the whole; "
                "use --method btx or upcycle"
            )
        low = extent * chunk.index // chunk.count
        high = extent * (chunk.index + 1) // chunk.count
        parts.append(SourceRows(chunk.source, origin, low, high))
    return PlannedPiece(piece, piece.shape, first.pieces[origin].dtype, MOVE, tuple(parts), axis)
