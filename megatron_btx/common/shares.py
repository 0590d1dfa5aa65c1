"""Shares of experts: how far two routings lie apart, and which experts are dead. Without torch.

Axes: ``L`` layers, ``E`` experts. The shares of a layer sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DEAD_SHARE = 0.01
"""An expert is dead in a layer when its share is under this part of an even one."""


def routing_distance(one_LE: Sequence[Sequence[float]], other_LE: Sequence[Sequence[float]]) -> float:
    """Total-variation distance of two routings, mean over layers. 0: the same in every layer; 1: no common expert."""
    distances = []
    for one_E, other_E in zip(one_LE, other_LE, strict=True):
        differences = [abs(a - b) for a, b in zip(one_E, other_E, strict=True)]
        distances.append(sum(differences) / 2)
    return sum(distances) / len(distances)


def overlaps(routings: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, float]]:
    """How alike every two of several routings [L, E] are: 1 less their distance; 1 is the same routing."""
    found = {}
    for one, shares_LE in routings.items():
        found[one] = {name: 1 - routing_distance(shares_LE, other_LE) for name, other_LE in routings.items()}
    return found


def find_dead_experts(shares_E: Sequence[float]) -> list[int]:
    """Numbers of the experts of a layer that are dead."""
    return [expert for expert, share in enumerate(shares_E) if share < DEAD_SHARE / len(shares_E)]
