"""The pieces of a model of given sizes, and where each lies in a checkpoint: the table of names, filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_btx.checkpoint.names import ROWS, Dialect, Part, Row
from megatron_btx.checkpoint.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a piece lies in a checkpoint: a tensor, the index on its leading axes, and its rows.

    The tensor (after the leading axes) has ``groups`` groups of ``per_group`` units of ``unit`` rows; the piece is the
    units ``first`` to ``last`` of every group, one group after the other. A piece of its own is one group of one unit.
    """

    key: str
    lead: tuple[int, ...]
    groups: int
    per_group: int
    unit: int
    first: int
    last: int

    @property
    def stored_rows(self) -> int:
        """Rows of the stored tensor (per index of the leading axes)."""
        return self.groups * self.per_group * self.unit

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where rows ``start`` to ``stop`` are stored: (row there, row of the piece, rows) of each run."""
        length = (self.last - self.first) * self.unit
        for group in range(start // length, -(-stop // length)) if length else ():
            low, high = max(start, group * length), min(stop, (group + 1) * length)
            there = (group * self.per_group + self.first) * self.unit + low - group * length
            yield there, low, high - low


def _extent(part: Part, sizes: Sizes, rows: int) -> tuple[int, int, int, int, int]:
    """(groups, per_group, unit, first, last) of a part; ``rows`` is the piece's own count."""
    queries = sizes.heads // sizes.groups
    if part == "q":
        return sizes.groups, queries + 2, sizes.head_size, 0, queries
    if part in ("k", "v"):
        first = queries + (part == "v")
        return sizes.groups, queries + 2, sizes.head_size, first, first + 1
    if part in ("gate", "up") and sizes.gated:
        first = int(part == "up")
        return 1, 2, rows, first, first + 1
    return 1, 1, rows, 0, 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a model: its name and shape, and the row and numbers that say where it lies."""

    name: str
    shape: tuple[int, ...]
    row: Row
    numbers: Mapping[str, Any]
    """layer, expert, kind: those that the name has."""
    required: bool

    def location(self, dialect: Dialect, sizes: Sizes) -> Location | None:
        """Where the piece lies in a dialect; None where the dialect has no name for it."""
        return next(self.locations(dialect, sizes), None)

    def locations(self, dialect: Dialect, sizes: Sizes) -> Iterator[Location]:
        """As :meth:`location`, the other names after the first."""
        template: str = getattr(self.row, dialect.column)
        if not template and dialect.column != "megatron":
            template = self.row.llama
        others = self.row.also if dialect.column == "megatron" else ()
        for text in (template, *others):
            if text and ("{kind}" in text or self.numbers.get("kind", "weight") == "weight"):
                yield self._located(text, dialect, sizes)

    def _located(self, template: str, dialect: Dialect, sizes: Sizes) -> Location:
        for axis in dialect.axes:
            template = template.replace("{" + axis + "}.", "")
        lead = tuple(self.numbers[axis] for axis in dialect.axes if axis in self.numbers)
        part = self.row.part
        key = template.format(**self.numbers)
        # In fused Hugging Face forms only the experts are; dense layers among them keep their own names.
        fused = dialect.fused and (dialect.column == "megatron" or key.endswith(".gate_up_proj"))
        if dialect.name == "singleton" and part in ("gate", "up") and sizes.gated:
            key, fused = key + {"gate": "_w", "up": "_v"}[part], False
        extent = _extent(part if fused else "whole", sizes, self.shape[0])
        return Location(key, lead, *extent)


def pieces_of(sizes: Sizes) -> Iterator[Piece]:
    """All pieces a model of these sizes can have, in the order of the table, layer by layer.

    A model may lack biases, norms' biases and what a row calls optional; the checkpoint shows which.
    """
    per_layer = [row for row in ROWS if "{layer}" in row.piece]
    for row in ROWS:
        if row in per_layer[1:]:
            continue
        if row is not per_layer[0]:
            yield from _pieces(row, sizes, {})
            continue
        for layer in range(sizes.layers):
            for layer_row in per_layer:
                if _in_layer(layer_row, sizes, sizes.mixture_layers[layer]):
                    experts = range(sizes.experts) if "{expert}" in layer_row.piece else (None,)
                    for expert in experts:
                        numbers = {"layer": layer} | ({} if expert is None else {"expert": expert})
                        yield from _pieces(layer_row, sizes, numbers)


def _in_layer(row: Row, sizes: Sizes, mixture: bool) -> bool:
    if ".gate." in row.piece and not sizes.gated:
        return False
    if ".router." in row.piece or ".experts." in row.piece:
        return mixture
    return not (".ffn." in row.piece and mixture)


def _pieces(row: Row, sizes: Sizes, numbers: dict[str, Any]) -> Iterator[Piece]:
    for kind in ("weight", "bias") if "{kind}" in row.piece else ("weight",):
        named = numbers | {"kind": kind}
        shape = _shape(row, sizes)
        required = not row.optional and kind == "weight"
        yield Piece(row.piece.format(**named), shape[:1] if kind == "bias" else shape, row, named, required)


def _shape(row: Row, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a piece's weight; a size that the configuration does not say is -1."""
    name = row.piece.replace("layers.{layer}.", "").replace(".{kind}", "").replace(".weight", "")
    ffn = sizes.expert_ffn if name.startswith("experts.") else sizes.ffn
    queries, keys = sizes.heads * sizes.head_size, sizes.groups * sizes.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (sizes.vocabulary or -1, sizes.hidden),
        "head": (sizes.vocabulary or -1, sizes.hidden),
        "positions": (sizes.positions or -1, sizes.hidden),
        "attention.q": (queries, sizes.hidden),
        "attention.k": (keys, sizes.hidden),
        "attention.v": (keys, sizes.hidden),
        "attention.o": (sizes.hidden, queries),
        "attention.q_norm": (sizes.head_size,),
        "attention.k_norm": (sizes.head_size,),
        "gate": (ffn, sizes.hidden),
        "up": (ffn, sizes.hidden),
        "down": (sizes.hidden, ffn),
        "router": (sizes.experts, sizes.hidden),
    }
    short = name.removeprefix("ffn.").removeprefix("experts.{expert}.")
    return shapes.get(short, (sizes.hidden,))
