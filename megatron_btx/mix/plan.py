"""The plan of a mix: every piece of the result, where it comes from and how, before anything is written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.names import Piece, Sizes, pieces_of
from megatron_btx.errors import InputError
from megatron_btx.mix.compatible import checked_sources
from megatron_btx.mix.result import dense_arguments, mixture_arguments
from megatron_btx.mix.routers import RouterInit
from megatron_btx.mix.rules import METHODS, Chunk, Method
from megatron_btx.mix.sources import Source, open_source

if TYPE_CHECKING:
    import torch


_EXPERTS_AT_MOST = 4096


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for; see the command line's --help for the meaning of each."""

    experts: tuple[tuple[str, str], ...]
    """(name, path) of each source, in the order given."""
    method: str = "btx"
    topk: int = 2
    number: int | None = None
    """Chunks of split, copies of upcycle."""
    layer_frequency: int | tuple[int, ...] = 1
    """Which layers become mixtures, as Megatron's --moe-layer-freq."""
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Weight of each source in the average; 1 where not given."""
    take: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Configuration fields that may differ, and whose value the result gets."""
    vocabulary_union: bool = False
    allow_other_tokenizer: bool = False
    router: RouterInit = RouterInit()


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a source's piece along the axis of :attr:`PlannedPiece.axis`."""

    source: int
    piece: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class PlannedPiece:
    """One piece of the result."""

    piece: Piece
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    """move: the parts, one after the other; average: their weighted mean; router: new rows; zeros: new."""
    parts: tuple[Part, ...] = ()
    axis: int = 0

    @property
    def name(self) -> str:
        """The piece's name."""
        return self.piece.name

    @property
    def size_bytes(self) -> int:
        """Bytes of the piece in the result."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a mix will write."""

    request: Request
    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    """Of the sources in averages; they sum to one."""
    pieces: tuple[PlannedPiece, ...]
    arguments: Mapping[str, Any]
    """The arguments of the result."""
    sizes: Sizes

    @property
    def method(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.request.method]

    @property
    def output_bytes(self) -> int:
        """Bytes of all pieces of the result."""
        return sum(piece.size_bytes for piece in self.pieces)

    @property
    def input_bytes(self) -> int:
        """Bytes read from the sources."""
        total = 0
        for planned in self.pieces:
            for part in planned.parts:
                held = self.sources[part.source].pieces[part.piece]
                share = (part.stop - part.start) / max(1, held.shape[planned.axis])
                total += round(math.prod(held.shape) * share) * held.dtype.itemsize
        return total


def make_plan(request: Request) -> Plan:
    """Open the sources, check that they fit together, and plan the result.

    Raises:
        InputError: too few sources, sources that differ, a number that does not divide, tensors without a rule.
    """
    method = METHODS[request.method]
    names = [name for name, _ in request.experts]
    _check_request(request, method, names)
    sources = tuple(open_source(name, path) for name, path in request.experts)
    if method.experts:
        for source in sources:
            if source.sizes.experts:
                raise InputError(
                    f"{source.name} ({source.folder}): is a mixture of {source.sizes.experts} experts, "
                    "expected a dense model"
                )
    first = checked_sources(sources, request)
    arguments = dense_arguments(first)
    if method.experts:
        number = request.number or 1
        result_names = method.names(names, number)
        ffn = _expert_ffn(method.experts(len(sources), number), first["ffn_hidden_size"], request)
        if not 1 <= request.topk <= len(result_names):
            raise InputError(
                f"--moe-router-topk {request.topk}: expected 1 to {len(result_names)}, the number of experts"
            )
        frequency = _checked_frequency(request.layer_frequency, first["num_layers"])
        arguments = mixture_arguments(first, result_names, request.topk, ffn, frequency)
    weights = [request.weights.get(name, 1.0) for name in names]
    total = sum(weights)
    sizes = Sizes.of(arguments)
    pieces = tuple(_planned_pieces(request, method, sources, sizes))
    return Plan(request, sources, tuple(weight / total for weight in weights), pieces, arguments, sizes)


def _check_request(request: Request, method: Method, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--expert {name}= is given twice; every expert needs a name of its own")
    if len(names) < method.at_least:
        raise InputError(
            f"{len(names)} expert given, at least {method.at_least} needed for {request.method}; "
            "repeat --expert NAME=PATH"
        )
    if method.at_most is not None and len(names) > method.at_most:
        raise InputError(f"{len(names)} experts given, {request.method} takes {method.at_most}; leave the others out")
    if bool(method.number_flag) != (request.number is not None):
        flag = method.number_flag or next(m.number_flag for m in METHODS.values() if m.number_flag)
        raise InputError(
            f"--method {request.method}: {flag} {'is missing' if method.number_flag else 'does not apply'}"
        )
    if request.number is not None and not 2 <= request.number <= _EXPERTS_AT_MOST:
        raise InputError(f"{method.number_flag} {request.number}: expected 2 to {_EXPERTS_AT_MOST}")
    for flag, given in (("--weight", request.weights), ("--take", request.take)):
        for key in given:
            name = key if flag == "--weight" else request.take[key]
            if name not in names:
                raise InputError(f"{flag} names the expert {name!r}; there are {', '.join(names)}")
    if request.weights and method.shared != "average":
        raise InputError(f"--weight does not apply to --method {request.method}, which averages nothing")
    for name, weight in request.weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"--weight {name}={weight}: expected a number of at least 0")
    if not 0 < sum(request.weights.get(name, 1.0) for name in names) < math.inf:
        raise InputError("--weight: all weights are 0, or their sum is infinite; at least one must be more than 0")


def _checked_frequency(frequency: int | tuple[int, ...], layers: int) -> int | list[int]:
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
    return 1 if 0 not in pattern else pattern


def _expert_ffn(experts: list[tuple[Chunk, ...]], ffn: int, request: Request) -> int:
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
    first = sources[0]
    experts = method.experts(len(sources), request.number or 1) if method.experts else []
    dtypes = request.take.get("dtype")
    by_dtype = next((s for s in sources if s.name == dtypes), first)
    for piece in pieces_of(sizes):
        if method.experts and "expert" in piece.numbers:
            origin = piece.name.replace(f"experts.{piece.numbers['expert']}.", "ffn.")
            if origin in first.pieces:
                axis = int(".down." in piece.name)
                # Every chunk of a row-cut block would add the second bias again; the first alone carries it.
                parts = tuple(_cut(sources, chunk, origin, axis) for chunk in experts[piece.numbers["expert"]])
                if piece.name.endswith("down.bias"):
                    parts = _whole_bias(sources, experts[piece.numbers["expert"]], origin, piece.name)
                yield PlannedPiece(
                    piece, piece.shape, by_dtype.pieces[origin].dtype, "move", parts, axis * (len(piece.shape) - 1)
                )
        elif method.experts and ".router." in piece.name:
            layer = piece.numbers["layer"]
            if piece.name.endswith("weight") or f"layers.{layer}.ffn.up.bias" in first.pieces:
                dtype = by_dtype.pieces[f"layers.{layer}.ffn.down.weight"].dtype
                operation = "router" if piece.name.endswith("weight") else "zeros"
                yield PlannedPiece(piece, piece.shape, dtype, operation)
        elif piece.name in first.pieces:
            rows = max(s.pieces[piece.name].shape[0] for s in sources)
            shape = (rows, *first.pieces[piece.name].shape[1:])
            parts = tuple(Part(i, piece.name, 0, s.pieces[piece.name].shape[0]) for i, s in enumerate(sources))
            yield PlannedPiece(piece, shape, by_dtype.pieces[piece.name].dtype, method.shared, parts)


def _cut(sources: Sequence[Source], chunk: Chunk, origin: str, axis: int) -> Part:
    held = sources[chunk.source].pieces[origin]
    extent = held.shape[axis] if axis < len(held.shape) else held.shape[0]
    return Part(chunk.source, origin, extent * chunk.index // chunk.count, extent * (chunk.index + 1) // chunk.count)


def _whole_bias(sources: Sequence[Source], chunks: tuple[Chunk, ...], origin: str, name: str) -> tuple[Part, ...]:
    """The second bias has no F axis: it belongs to a whole block and cannot be cut."""
    if len(chunks) > 1 or chunks[0].count > 1:
        raise InputError(
            f"{name}: a feed-forward block with biases cannot be cut, its second bias belongs to the whole; "
            "use --method btx or upcycle"
        )
    return (Part(chunks[0].source, origin, 0, sources[chunks[0].source].pieces[origin].shape[0]),)
