"""Quantities of a report: sums that bear what a broken run leaves behind, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

ABSENT = "–"
"""Stands in a table where there is no number."""
_LOSS_BELOW = 1e6
"""From here on a loss is written with a power of ten: it is broken, and 1e300 has 300 digits."""


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
    if not values:
        return math.nan
    return total(values) / len(values)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is NaN of a single value, and of values that are not all finite."""
    average = mean(values)
    if len(values) < 2 or not math.isfinite(average):
        return average, math.nan
    squares = total((value - average) * (value - average) for value in values)
    return average, math.sqrt(squares / (len(values) - 1))


def is_usable(loss: float | None) -> bool:
    """Whether a loss can be drawn and compared: there, finite, and of a size that losses have."""
    return loss is not None and abs(loss) < _LOSS_BELOW


def loss_text(loss: float | None, sign: str = "") -> str:
    """A loss in three decimals; what it is where it is no number. ``sign``: "+" writes that of positive values too."""
    if loss is None:
        return ABSENT
    if math.isnan(loss):
        return "NaN"
    if abs(loss) < _LOSS_BELOW or math.isinf(loss):
        return f"{loss:{sign}.3f}"
    return f"{loss:{sign}.3e}"


def difference_text(difference: float | None) -> str:
    """A difference of losses in three decimals, with its sign."""
    return loss_text(difference, sign="+")


def spread_text(values: Sequence[float]) -> str:
    """Losses as mean ± deviation; the mean alone where there is no deviation."""
    average, deviation = spread(values)
    if math.isnan(deviation):
        return loss_text(average)
    return f"{loss_text(average)} ± {loss_text(deviation)}"


def count_text(count: float | None, decimals: int = 0) -> str:
    """Tokens, seconds or bytes: digits in groups of three."""
    if count is None:
        return ABSENT
    return f"{count:,.{decimals}f}"


def percent_text(share: float) -> str:
    """A share in percent; what it is where it is no number."""
    if not is_usable(share):
        return loss_text(share)
    return f"{share:.1%}"
