"""The numbers of a result: any rows of any planned piece, computed from the sources when they are asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_btx.ground.errors import CheckpointError
from megatron_btx.mixing.plan import Part, Plan, PlannedPiece
from megatron_btx.mixing.routers import router_rows

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

    had = planned.shape[0] - planned.new_rows
    if stop > had and planned.new_rows:
        new = mean_row(plan, planned).expand(stop - max(start, had), *planned.shape[1:])
        return torch.cat([_rows(plan, planned, start, had), new]) if start < had else new
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
    """
    import torch

    if not planned.has_token_rows:
        return _mean(plan, planned, planned.parts, start, stop)
    means = [_mean(plan, planned, owners, low, high) for low, high, owners in owned_rows(plan, planned, start, stop)]
    return means[0] if len(means) == 1 else torch.cat(means)


def owned_rows(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
    """Rows of an embedding or head in stretches, each with the parts it is averaged over.

    They are the sources whose token the row is: padding enters no average. A row that is nobody's token is averaged
    over those that have it at all.
    """
    owned = {part: plan.sources[part.source].token_rows(part.piece) for part in planned.parts}
    bounds = {start, stop}
    for part, stretches in owned.items():
        bounds.update(bound for bound in (part.stop, *itertools.chain(*stretches)) if start < bound < stop)
    for low, high in itertools.pairwise(sorted(bounds)):
        owners = [part for part in planned.parts if any(begin <= low < end for begin, end in owned[part])]
        having = [part for part in planned.parts if low < part.stop]
        yield low, high, tuple(owners or having)


def mean_row(plan: Plan, planned: PlannedPiece) -> torch.Tensor:
    """What every new row of an embedding or head is: the mean of the result's tokens' rows, in the piece's dtype.

    All rows of a head take part in the softmax. A row of zeros has the logit 0, which can be the largest of all,
    because a model's logits may lie anywhere. The mean row has the mean of the tokens' logits, so its probability is
    at most that of an average token: n new rows beside V tokens raise no loss by more than log(1 + n / V). (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models".)
    """
    import torch

    if planned.name not in plan.mean_rows:
        had = planned.shape[0] - planned.new_rows
        step = max(1, STEP_BYTES // (8 * math.prod(planned.shape[1:])))
        total = torch.zeros(planned.shape[1:], dtype=torch.float64)
        stretches = _all_token_rows(plan, planned) or [(0, had)]
        for start, stop in stretches:
            for low in range(start, stop, step):
                total += _rows(plan, planned, low, min(low + step, stop)).sum(0, dtype=torch.float64)
        count = sum(stop - start for start, stop in stretches)
        plan.mean_rows[planned.name] = (total / count).to(planned.dtype)
    return plan.mean_rows[planned.name]


def _all_token_rows(plan: Plan, planned: PlannedPiece) -> list[tuple[int, int]]:
    """The rows that are a token of any source."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(s for part in planned.parts for s in plan.sources[part.source].token_rows(part.piece)):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


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
