"""Verdicts over seeds: paired intervals, and the correction for testing many claims at once.

A difference is taken between two models of one seed and one order of data. Its spread over seeds says how far another
seed could lead; the spread over the tokens of a test set is another number and is never added to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """What the differences of some seeds say of the mean over all seeds."""

    mean: float
    half_width: float
    """Of Student's interval at 95 %; infinite for a single seed, which says nothing of others."""
    seeds: int
    p: float
    """Of a two-sided t test of no difference; 1 for a single seed."""

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def paired_interval(differences: Sequence[float]) -> Interval:
    """The interval of the mean of paired differences, one of each seed (Student 1908).

    Raises:
        ValueError: there is none.
    """
    from scipy.special import stdtr, stdtrit

    seeds = len(differences)
    if not seeds:
        raise ValueError("no differences")
    mean = math.fsum(differences) / seeds
    if seeds == 1:
        return Interval(mean, math.inf, 1, 1.0)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (seeds - 1)
    error = math.sqrt(variance / seeds)
    if error == 0:  # equal differences: seeds that do not differ, or numbers that were rounded
        return Interval(mean, 0.0, seeds, 1.0 if mean == 0 else 0.0)
    freedom = seeds - 1
    half_width = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Interval(mean, half_width, seeds, 2 * float(stdtr(freedom, -abs(mean) / error)))


def adjust_by_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Every claim's p, so that below .05 one false verdict among all is as rare as 5 % (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
