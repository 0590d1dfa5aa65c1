"""The numbers of a result: any rows of any planned piece, computed from the sources when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_btx.common.errors import CheckpointError
from megatron_btx.mixing.loader import stretches_of
from megatron_btx.mixing.operations import for_one_rounding, join
from megatron_btx.mixing.plan import Plan, PlannedPiece

if TYPE_CHECKING:
    import torch

STEP_BYTES = 1 << 20
"""Rows are computed about this many bytes at a time: memory stays small, and what was read is hashed in the cache."""


def rows_of(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Rows ``start`` to ``stop`` of a piece, in its dtype, a few MiB at a time and in order.

    Raises:
        CheckpointError: a source cannot be read, or holds NaN or infinite numbers.
    """
    row_bytes = max(1, math.prod(planned.shape[1:]) * planned.dtype.itemsize)
    step = max(1, STEP_BYTES // row_bytes)
    had = planned.source_rows
    for low in range(start, stop, step):
        high = min(low + step, stop)
        found = []
        if low < had:
            found.append(planned.operation.rows(plan, planned, low, min(high, had)))
        if high > had:
            found.append(mean_row(plan, planned).expand(high - max(low, had), *planned.shape[1:]))
        rows = join(found, dim=0)
        if not _is_finite(rows):
            _refuse_not_finite(plan, planned, low, high)
        yield rows


def mean_row(plan: Plan, planned: PlannedPiece) -> torch.Tensor:
    """What every new row of an embedding or head is: the mean of the result's tokens' rows, in the piece's dtype.

    All rows of a head take part in the softmax. A row of zeros has the logit 0, which can be the largest of all,
    because a model's logits may lie anywhere. The mean row has the mean of the tokens' logits, so its probability is
    at most that of an average token: n new rows beside V tokens raise no loss by more than log(1 + n / V). (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models".)
    """
    import torch

    def make() -> torch.Tensor:
        step = max(1, STEP_BYTES // (8 * math.prod(planned.shape[1:])))
        total = torch.zeros(planned.shape[1:], dtype=torch.float64)
        count = 0
        tokens: set[int] = set()
        for part in planned.parts:
            for start, stop in plan.sources[part.source].token_rows(part.piece):
                tokens.update(range(start, stop))
        for start, stop in stretches_of(sorted(tokens)) or [(0, planned.source_rows)]:
            count += stop - start
            for low in range(start, stop, step):
                rows = planned.operation.rows(plan, planned, low, min(low + step, stop))
                total += rows.sum(0, dtype=torch.float64)
        return for_one_rounding(total / count, planned.dtype).to(planned.dtype)

    return plan.once.get(("mean row", planned.name), make)


def _is_finite(rows: torch.Tensor) -> bool:
    """Whether all numbers are finite: their sum shows it, and only a sum that overflows asks for a closer look."""
    import torch

    # bf16 and fp32 sums run at the speed of memory and hardly ever overflow; fp16 ones would.
    dtype = None
    if rows.dtype == torch.float16:
        dtype = torch.float32
    total = rows.sum(dtype=dtype)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(rows).all())


def check_finite(plan: Plan, planned: PlannedPiece, looked_at_bytes: int) -> None:
    """Refuse sources of which the first rows of what makes a piece are not finite, as :func:`rows_of` does."""
    for part in planned.parts:
        held = plan.held(part)
        rows = max(1, looked_at_bytes // (held.dtype.itemsize * math.prod(held.shape[1:])))
        if not _is_finite(plan.read(part, 0, min(rows, held.shape[0]))):
            _refuse_not_finite(plan, planned, 0, rows)


def _refuse_not_finite(plan: Plan, planned: PlannedPiece, start: int, stop: int) -> None:
    import torch

    for part in planned.parts:
        source = plan.sources[part.source]
        held = source.pieces[part.piece]
        for row in range(held.shape[0]):
            if not bool(torch.isfinite(source.read(part.piece, row, row + 1)).all()):
                raise CheckpointError(
                    f"{source.name} ({source.folder}): {held.location.key}: {part.piece} holds NaN or infinite numbers "
                    f"(row {row}); a mix of it would give nothing else. Fetch it again, or take an earlier state"
                )
    raise CheckpointError(f"{planned.name}: rows {start} to {stop}: sums overflow {planned.dtype}; use a wider dtype")
