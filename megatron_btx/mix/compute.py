"""The numbers of a result: any rows of any planned piece, computed from the sources when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_btx.errors import CheckpointError
from megatron_btx.mix.plan import Part, Plan, PlannedPiece
from megatron_btx.mix.routers import router_rows

if TYPE_CHECKING:
    import torch

STEP_BYTES = 4 << 20
"""Rows are computed about this many bytes at a time: memory stays small, and sums stay in the cache."""


def rows_of(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Rows ``start`` to ``stop`` of a piece, in its dtype, a few MiB at a time and in order.

    Raises:
        CheckpointError: a source cannot be read, or holds NaN or infinite numbers.
    """
    import math

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
    return torch.zeros(stop - start, *planned.shape[1:], dtype=planned.dtype)


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

    if not planned.name.startswith(("embedding.", "head.")):
        return _mean(plan, planned.parts, start, stop).to(planned.dtype)
    owned = [plan.sources[part.source].vocabulary_rows(part.piece) for part in planned.parts]
    bounds = sorted({start, stop, *(n for n in (*owned, *(p.stop for p in planned.parts)) if start < n < stop)})
    means = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        owners = [part for part, rows in zip(planned.parts, owned, strict=True) if rows >= high]
        having = owners or [part for part in planned.parts if part.stop >= high]
        means.append(_mean(plan, having, low, high))
    return torch.cat(means).to(planned.dtype)


def _mean(plan: Plan, parts: list[Part] | tuple[Part, ...], start: int, stop: int) -> torch.Tensor:
    import torch

    weights = [plan.weights[part.source] for part in parts]
    even = len(set(weights)) == 1
    total: torch.Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        term = plan.sources[part.source].read(part.piece, start, stop).to(torch.float64)
        if not even:
            term *= weight
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.div_(len(parts) if even else sum(weights))


def _is_finite(rows: torch.Tensor) -> bool:
    """Whether all numbers are finite: their sum shows it, and only a sum that overflowed asks for a closer look."""
    import torch

    wide = torch.float64 if rows.dtype == torch.float32 else torch.float32
    return bool(torch.isfinite(rows.sum(dtype=wide))) or bool(torch.isfinite(rows).all())


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
