"""Numbers of a report: sums that bear what a broken run leaves behind, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable

_LOSS_BELOW, _COUNT_BELOW = 1e6, 1e15
"""From here on a number is written with a power of ten: a loss there is broken, and 1e300 has 300 digits."""


def total(values: Iterable[float]) -> float:
    """The sum, rounded once; infinite or NaN where plain addition makes it so."""
    values = list(values)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond the largest number; infinities of both signs
        return sum(values)


def mean(values: Iterable[float]) -> float:
    """The mean; NaN of no values."""
    values = list(values)
    return total(values) / len(values) if values else math.nan


def usable(loss: float | None) -> bool:
    """Whether a loss can be drawn and compared: there, finite, and of a size that losses have."""
    return loss is not None and abs(loss) < _LOSS_BELOW


def in_digits(value: float, sign: str = "") -> str:
    """A loss, or with sign "+" a difference, in three decimals; or plainly what it is instead of a number."""
    if math.isnan(value):
        return "NaN"
    return f"{value:{sign}.3f}" if abs(value) < _LOSS_BELOW or math.isinf(value) else f"{value:{sign}.3e}"


def in_count(value: float, decimals: int = 0) -> str:
    """Tokens, seconds, bytes: digits in groups of three."""
    if math.isnan(value):
        return "NaN"
    return f"{value:,.{decimals}f}" if abs(value) < _COUNT_BELOW or math.isinf(value) else f"{value:.3e}"
