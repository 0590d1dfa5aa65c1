"""The pieces of a model of given sizes, and where each lies in a checkpoint: the table of names, filled in."""

from __future__ import annotations

import dataclasses
import itertools
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
        if length == 0:
            return
        for group in range(start // length, -(-stop // length)):
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
    """False for what a checkpoint of this configuration may lack: routers' biases, which older versions have not."""

    def location(self, dialect: Dialect, sizes: Sizes) -> Location | None:
        """Where the piece lies in a dialect; None where the dialect has no name for it."""
        return next(self.locations(dialect, sizes), None)

    def locations(self, dialect: Dialect, sizes: Sizes) -> Iterator[Location]:
        """As :meth:`location`, the other names after the first."""
        template: str = getattr(self.row, dialect.column)
        if not template and dialect.column != "megatron":
            template = self.row.llama
        templates = [template]
        if dialect.column == "megatron":
            templates += self.row.also
        for text in templates:
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
        if not fused:
            part = "whole"
        return Location(key, lead, *_extent(part, sizes, self.shape[0]))


def pieces_of(sizes: Sizes) -> Iterator[Piece]:
    """All pieces of a model of these sizes and parts, in the order of the table, layer by layer."""
    for in_layers, group in itertools.groupby(ROWS, lambda row: "{layer}" in row.piece):
        rows = list(group)
        if not in_layers:
            for row in rows:
                yield from _pieces(row, sizes, {})
            continue
        for layer in range(sizes.layers):
            for row in rows:
                yield from _layer_pieces(row, sizes, layer)


def _layer_pieces(row: Row, sizes: Sizes, layer: int) -> Iterator[Piece]:
    is_mixture = sizes.mixture_layers[layer]
    of_mixture, of_dense = ".router." in row.piece or ".experts." in row.piece, ".ffn." in row.piece
    if (of_mixture and not is_mixture) or (of_dense and is_mixture) or (".gate." in row.piece and not sizes.gated):
        return
    if "{expert}" not in row.piece:
        yield from _pieces(row, sizes, {"layer": layer})
        return
    for expert in range(sizes.experts):
        yield from _pieces(row, sizes, {"layer": layer, "expert": expert})


def _pieces(row: Row, sizes: Sizes, numbers: dict[str, Any]) -> Iterator[Piece]:
    if row.needs and row.needs not in sizes.parts:
        return
    shape = tuple(sizes.extents[axis] for axis in row.axes)
    weight = numbers | {"kind": "weight"}
    yield Piece(row.piece.format(**weight), shape, row, weight, True)
    biases = "biases"
    if row.piece.endswith("norm.{kind}"):
        biases = "norm biases"
    elif row.part in ("q", "k", "v"):
        biases = "qkv biases"
    if "{kind}" in row.piece and biases in sizes.parts:
        bias = numbers | {"kind": "bias"}
        yield Piece(row.piece.format(**bias), shape[:1], row, bias, ".router." not in row.piece)
