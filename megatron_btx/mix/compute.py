"""The numbers of a result: any rows of any planned piece, computed from the sources when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_btx.errors import CheckpointError
from megatron_btx.mix.plan import Part, Plan, PlannedPiece
from megatron_btx.mix.routers import router_rows

if TYPE_CHECKING:
    import torch

STEP_BYTES = 1 << 20
"""Rows are computed about this many bytes at a time: memory stays small, and what was read is hashed in the cache."""
_SUM_NUMBERS = 1 << 16
"""Means are taken over this many numbers at a time: half a MiB of fp64 stays in the cache of one core."""


def rows_of(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Rows ``start`` to ``stop`` of a piece, in its dtype, a few MiB at a time and in order.

    Raises:
        CheckpointError: a source cannot be read, or holds NaN or infinite numbers.
    """
    row_bytes = max(1, math.prod(planned.shape[1:]) * planned.dtype.itemsize)
    step = max(1, STEP_BYTES // row_bytes)
    for low in range(start, stop, step):
        rows = _rows(plan, planned, low, min(low + step, stop))
        if not _is_finite(rows):
            _refuse_not_finite(plan, planned, low, min(low + step, stop))
        yield rows


def _rows(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
    import torch

    if planned.operation == "move":
        return _moved(plan, planned, start, stop).to(planned.dtype)
    if planned.operation == "average":
        return _average(plan, planned, start, stop)
    if planned.operation == "router":
        layers = [layer for layer, mixture in enumerate(plan.sizes.mixture_layers) if mixture]
        rows_LEH = router_rows(plan.request.router, len(layers), plan.sizes.experts, plan.sizes.hidden)
        return rows_LEH[layers.index(planned.piece.numbers["layer"]), start:stop].to(planned.dtype)
    if planned.operation == "ramp":
        return _ramp(planned)[start:stop]
    return torch.zeros(stop - start, *planned.shape[1:], dtype=planned.dtype)


def _ramp(planned: PlannedPiece) -> torch.Tensor:
    """Rows that run from 1 to just below 2."""
    import torch

    rows, columns = planned.shape
    row = 1 + torch.arange(columns, dtype=torch.float64) / columns
    return row.to(planned.dtype).repeat(rows, 1)


def _moved(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
    """The parts one after the other along the axis; whole rows of each where they are joined by columns."""
    import torch

    if planned.axis == 1:
        columns = [
            plan.sources[part.source].read(part.piece, start, stop)[:, part.start : part.stop] for part in planned.parts
        ]
        return columns[0].contiguous() if len(columns) == 1 else torch.cat(columns, dim=1)
    found, before = [], 0
    for part in planned.parts:
        low, high = max(start, before), min(stop, before + part.stop - part.start)
        if low < high:
            source = plan.sources[part.source]
            found.append(source.read(part.piece, part.start + low - before, part.start + high - before))
        before += part.stop - part.start
    return found[0] if len(found) == 1 else torch.cat(found)


def _average(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
    """The weighted mean over the sources, rounded once to the stored dtype.

    Summed in fp64: in fp32 three equal experts would not average to themselves, and the experts' order would show.
    Where vocabularies differ, each row is averaged over the sources whose token it is; over those that have it at all,
    where it is nobody's.
    """
    import torch

    rows = {part.stop for part in planned.parts}
    if not planned.name.startswith(("embedding.", "head.")) or (len(rows) == 1 and not plan.request.vocabulary_union):
        return _mean(plan, planned, planned.parts, start, stop)
    owned = [plan.sources[part.source].vocabulary_rows(part.piece) for part in planned.parts]
    bounds = sorted({start, stop, *(n for n in (*owned, *(p.stop for p in planned.parts)) if start < n < stop)})
    means = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        owners = [part for part, rows in zip(planned.parts, owned, strict=True) if rows >= high]
        having = owners or [part for part in planned.parts if part.stop >= high]
        means.append(_mean(plan, planned, having, low, high))
    return means[0] if len(means) == 1 else torch.cat(means)


def _mean(plan: Plan, planned: PlannedPiece, parts: Sequence[Part], start: int, stop: int) -> torch.Tensor:
    """The weighted mean of the parts' rows, in the piece's dtype."""
    import torch

    weights = [plan.weights[part.source] for part in parts]
    even = len(set(weights)) == 1
    sources = [plan.sources[part.source].read(part.piece, start, stop).reshape(-1) for part in parts]
    result = torch.empty(stop - start, *planned.shape[1:], dtype=planned.dtype)
    flat = result.view(-1)
    total = torch.empty(min(_SUM_NUMBERS, flat.numel()), dtype=torch.float64)
    for low in range(0, flat.numel(), _SUM_NUMBERS):
        stretch = slice(low, min(low + _SUM_NUMBERS, flat.numel()))
        sum_ = total[: stretch.stop - low].zero_()
        for source, weight in zip(sources, weights, strict=True):
            sum_.add_(source[stretch], alpha=1.0 if even else weight)
        flat[stretch] = sum_.div_(len(parts) if even else sum(weights))
    return result


def _is_finite(rows: torch.Tensor) -> bool:
    """Whether all numbers are finite: their sum shows it, and only a sum that overflows asks for a closer look."""
    import torch

    # bf16 and fp32 sums run at the speed of memory and hardly ever overflow; fp16 ones would.
    total = rows.sum(dtype=torch.float32) if rows.dtype == torch.float16 else rows.sum()
    return bool(torch.isfinite(total)) or bool(torch.isfinite(rows).all())


def _refuse_not_finite(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> None:
    import torch

    for part in planned.parts:
        source = plan.sources[part.source]
        held = source.pieces[part.piece]
        for row in range(held.shape[0]):
            if not bool(torch.isfinite(source.read(part.piece, row, row + 1)).all()):
                raise CheckpointError(
                    f"{source.name} ({source.folder}): {held.location.key}: {part.piece} holds NaN or infinite numbers "
                    f"(row {row}); a mix of it would give nothing else. Take an earlier iteration of {source.name}"
                )
    raise CheckpointError(f"{planned.name}: rows {start} to {stop}: sums overflow {planned.dtype}; use a wider dtype")
