"""The methods of mixing, as a table: what makes each piece of a result, and out of which pieces of which sources.

A feed-forward block can be cut along its intermediate axis F: rows of gate and up and columns of down, together, make a
smaller block that computes its share of the sum.

Sources: Sukhbaatar et al. 2024, arXiv 2403.07816, sections 3.2 (btx) and 4.3 (split, blend); Komatsuzaki et al. 2023,
arXiv 2212.05055 (upcycle).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from megatron_btx.mixing.operations import AVERAGE, MOVE, NEW_ROUTERS, ZEROS, Operation
from megatron_btx.mixing.options import Option, between

if TYPE_CHECKING:
    from megatron_btx.checkpoint.pieces import Piece


@dataclasses.dataclass(frozen=True)
class Model:
    """What a method knows of a source."""

    name: str
    experts: tuple[str, ...] = ()
    """Names of a mixture's experts; none for a dense model."""


@dataclasses.dataclass(frozen=True)
class Given:
    """What a method makes a result of."""

    own: Mapping[str, Any]
    """The values of the method's own options."""
    models: tuple[Model, ...]
    """Those that are mixed, in the user's order."""

    @property
    def base(self) -> int:
        """The number, as a source, of the model that the mixed ones began from: the last."""
        return len(self.models)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One of ``count`` equal parts of a source's piece, along F for the pieces of feed-forward blocks."""

    source: int
    piece: str
    """Of any expert, too: layers.0.ffn.up.weight of a dense model, layers.0.experts.3.up.weight of a mixture."""
    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a result."""

    names: tuple[str, ...]
    cut: int = 1
    """How many chunks the sources' feed-forward blocks are cut into."""
    chunks: int = 1
    """How many such chunks make an expert."""


Making = tuple[Operation, tuple[Chunk, ...]]
"""What makes a piece, and of what."""
_BASE = Option(
    "base", "the model that the experts began from: it has no weight and becomes no expert", metavar="PATH", read=str
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to make a model from others."""

    summary: str
    make: Callable[[Given, Piece], Making]
    """What makes a piece of the result. Pieces that no model needs (the head of a tied one) need not be there."""
    experts: Callable[[Given], Experts] | None = None
    """The result's experts. None: the result has the sources' own feed-forward blocks."""
    takes: tuple[Literal["dense", "mixture", "any"], ...] = ("dense",)
    """What the sources have to be, one after the other; the last counts for all that follow."""
    at_least: int = 2
    """Fewest sources."""
    at_most: int | None = None
    """Most sources; None: any number."""
    averages: bool = True
    """Whether weights mean something."""
    has_base: bool = False
    """Whether it needs the model that the sources began from, as ``--base``."""
    own_options: tuple[Option, ...] = ()

    @property
    def options(self) -> tuple[Option, ...]:
        """Those that this method has and not every other."""
        if self.has_base:
            return (*self.own_options, _BASE)
        return self.own_options


def dense_name(piece: Piece) -> str:
    """The piece of a dense model that corresponds to an expert's."""
    return piece.name.replace(f"experts.{piece.numbers['expert']}.", "ffn.")


def average_all(given: Given, piece: Piece) -> Making:
    """A piece averaged over all models."""
    return AVERAGE, tuple(Chunk(source, piece.name) for source in range(len(given.models)))


def average_rest(given: Given, piece: Piece) -> Making:
    """A piece that belongs to no expert: averaged, and routers made anew."""
    if ".router." in piece.name:
        return new_router(piece)
    return average_all(given, piece)


def new_router(piece: Piece) -> Making:
    """A new router's weight; and its bias, which Megatron's has where the linear layers have one.

    Source: core/transformer/moe/router.py.
    """
    if piece.name.endswith("weight"):
        return NEW_ROUTERS, ()
    return ZEROS, ()


def _btx(given: Given, piece: Piece) -> Making:
    if "expert" in piece.numbers:
        return MOVE, (Chunk(piece.numbers["expert"], dense_name(piece)),)
    return average_rest(given, piece)


def _split(given: Given, piece: Piece) -> Making:
    if "expert" in piece.numbers:
        count = given.own["chunks"]
        source, index = divmod(piece.numbers["expert"], count)
        return MOVE, (Chunk(source, dense_name(piece), index, count),)
    return average_rest(given, piece)


def _blend(given: Given, piece: Piece) -> Making:
    if "expert" in piece.numbers:
        index, count = piece.numbers["expert"], len(given.models)
        return MOVE, tuple(Chunk(source, dense_name(piece), index, count) for source in range(count))
    return average_rest(given, piece)


def _upcycle(given: Given, piece: Piece) -> Making:
    if "expert" in piece.numbers:
        return MOVE, (Chunk(0, dense_name(piece)),)
    if ".router." in piece.name:
        return new_router(piece)
    return _copy(given, piece)


def _reroute(given: Given, piece: Piece) -> Making:
    if piece.name.endswith(".router.weight"):
        return new_router(piece)
    return _copy(given, piece)


def _copy(given: Given, piece: Piece) -> Making:
    return MOVE, (Chunk(0, piece.name),)


def _each(given: Given) -> Experts:
    return Experts(tuple(model.name for model in given.models))


def _each_chunk(given: Given) -> Experts:
    count = given.own["chunks"]
    return Experts(tuple(f"{model.name}.{index}" for model in given.models for index in range(count)), cut=count)


def _each_blend(given: Given) -> Experts:
    count = len(given.models)
    return Experts(tuple(f"blend.{index}" for index in range(count)), count, count)


def _each_copy(given: Given) -> Experts:
    return Experts(tuple(f"{given.models[0].name}.{index}" for index in range(given.own["copies"])))


_number = between(2, 4096)  # a slip of the keyboard would take all memory before anything else could refuse it

METHODS: dict[str, Method] = {
    "btx": Method(
        "every source's feed-forward blocks become an expert, bit for bit; the rest is averaged", _btx, _each
    ),
    "split": Method(
        "every source's feed-forward blocks are cut in C chunks along F, each an expert; the rest is averaged",
        _split,
        _each_chunk,
        own_options=(Option("chunks", "experts made of each source", int, metavar="C", expect=_number),),
    ),
    "blend": Method(
        "expert n is chunk n of every source, one after the other; the rest is averaged", _blend, _each_blend
    ),
    "upcycle": Method(
        "one source, whose feed-forward blocks are copied into N equal experts",
        _upcycle,
        _each_copy,
        at_least=1,
        at_most=1,
        averages=False,
        own_options=(Option("copies", "experts made of the one source", int, metavar="N", expect=_number),),
    ),
    "average": Method("the plain average of the sources, a dense model", average_all, takes=("any",)),
    "reroute": Method(
        "one mixture as it is, with new routers",
        _reroute,
        takes=("mixture",),
        at_least=1,
        at_most=1,
        averages=False,
    ),
    "copy": Method(
        "one source as it is, in another format", _copy, takes=("any",), at_least=1, at_most=1, averages=False
    ),
}
