"""The tensors of a result as they are stored: each in blocks, each block filled by rows of pieces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_btx.checkpoint.names import Dialect
from megatron_btx.checkpoint.pieces import Location
from megatron_btx.checkpoint.stored import Slot
from megatron_btx.mixing.plan import Plan, PlannedPiece

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 128 << 20
"""Larger tensors are written in blocks of whole rows: readers, Megatron's among them, hold one block in memory."""


@dataclasses.dataclass(frozen=True)
class Fill:
    """Rows of a planned piece; a block's fills stand in it one after the other."""

    planned: PlannedPiece
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class LaidOutBlock:
    """A block of a stored tensor, and what fills it."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    fills: tuple[Fill, ...]


@dataclasses.dataclass(frozen=True)
class LaidOutTensor:
    """A tensor of the result as a dialect stores it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[LaidOutBlock, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """One unit of work: a block, and where it goes."""

    block: LaidOutBlock
    slot: Slot


def lay_out(plan: Plan, dialect: Dialect, with_other_names: bool) -> Iterator[LaidOutTensor]:
    """The tensors of a result in a dialect, in the order of their first pieces.

    Args:
        with_other_names: write mixture layers' norms under both names that Megatron's kinds of layers look for.
    """
    tensors: dict[str, _Leads] = {}
    for planned in plan.pieces:
        for location in _locations(plan, planned, dialect, with_other_names):
            tensors.setdefault(location.key, {}).setdefault(location.lead, []).append((location, planned))
    for name, leads in tensors.items():
        location, planned = next(iter(leads.values()))[0]
        extents = [max(indices) + 1 for indices in zip(*leads, strict=True)]
        shape = (*extents, location.stored_rows, *planned.shape[1:])
        blocks: list[LaidOutBlock] = []
        for lead in sorted(leads):
            blocks.extend(_blocks(name, lead, leads[lead]))
        yield LaidOutTensor(name, shape, planned.dtype, tuple(blocks))


_Leads = dict[tuple[int, ...], list[tuple[Location, PlannedPiece]]]
"""What makes a tensor: for each index on its leading axes the pieces there, and where each lies."""


def _locations(plan: Plan, planned: PlannedPiece, dialect: Dialect, with_other_names: bool) -> list[Location]:
    """Where a piece is written: once, but mixture layers' norms under both names where asked to."""
    locations = list(planned.piece.locations(dialect, plan.sizes))
    is_norm = with_other_names and ".mlp_norm." in planned.name
    if not is_norm or not plan.sizes.mixture_layers[planned.piece.numbers["layer"]]:
        locations = locations[:1]
    if planned.piece.shape[0] == -1:  # as many rows as the sources have
        return [dataclasses.replace(location, unit=planned.shape[0]) for location in locations]
    return locations


def _blocks(name: str, lead: tuple[int, ...], parts: list[tuple[Location, PlannedPiece]]) -> Iterator[LaidOutBlock]:
    location, planned = parts[0]
    rows, rest = location.stored_rows, planned.shape[1:]
    runs: list[tuple[int, int, int, PlannedPiece]] = []
    for piece_location, piece in parts:
        for stored_row, piece_row, count in piece_location.runs(0, piece.shape[0]):
            runs.append((stored_row, piece_row, count, piece))
    runs.sort(key=lambda run: run[0])
    row_bytes = max(1, math.prod(rest) * planned.dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for low in range(0, max(1, rows), step):
        high = min(low + step, rows)
        fills = []
        for stored_row, piece_row, count, piece in runs:
            if stored_row < high and stored_row + count > low:
                start = piece_row + max(low - stored_row, 0)
                fills.append(Fill(piece, start, piece_row + min(high - stored_row, count)))
        offsets = (*lead, low, *(0,) * len(rest))
        sizes = (*(1,) * len(lead), high - low, *rest)
        yield LaidOutBlock(name, offsets, sizes, tuple(fills))
