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
    tensors: dict[str, dict[tuple[int, ...], list[tuple[Location, PlannedPiece]]]] = {}
    for planned in plan.pieces:
        locations = list(planned.piece.locations(dialect, plan.sizes))
        norm = with_other_names and ".mlp_norm." in planned.name
        both = norm and plan.sizes.mixture_layers[planned.piece.numbers["layer"]]
        for location in locations if both else locations[:1]:
            if planned.piece.shape[0] == -1:
                location = dataclasses.replace(location, unit=planned.shape[0])
            tensors.setdefault(location.key, {}).setdefault(location.lead, []).append((location, planned))
    for name, leads in tensors.items():
        location, planned = next(iter(leads.values()))[0]
        extents = tuple(max(lead[axis] for lead in leads) + 1 for axis in range(len(location.lead)))
        shape = (*extents, location.stored_rows, *planned.shape[1:])
        blocks = tuple(
            block
            for lead, parts in sorted(leads.items(), key=lambda item: item[0])
            for block in _blocks(name, lead, parts)
        )
        yield LaidOutTensor(name, shape, planned.dtype, blocks)


def _blocks(name: str, lead: tuple[int, ...], parts: list[tuple[Location, PlannedPiece]]) -> Iterator[LaidOutBlock]:
    location, planned = parts[0]
    rows, rest = location.stored_rows, planned.shape[1:]
    runs = sorted(
        ((there, here, count, piece) for loc, piece in parts for there, here, count in loc.runs(0, piece.shape[0])),
        key=lambda run: run[0],
    )
    row_bytes = max(1, math.prod(rest) * planned.dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for low in range(0, max(1, rows), step):
        high = min(low + step, rows)
        fills = tuple(
            Fill(piece, here + max(low - there, 0), here + min(high - there, count))
            for there, here, count, piece in runs
            if there < high and there + count > low
        )
        yield LaidOutBlock(name, (*lead, low, *(0,) * len(rest)), (*(1,) * len(lead), high - low, *rest), fills)
