"""How the models of a run compare: their losses side by side, and how differently domains are routed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

from megatron_btx.common.shares import routing_distance
from megatron_btx.report.inputs import BTX, DENSE, Model

_SAME_SHARE = 1e-12
"""Shares this close are equal: what they differ by is rounding."""


def loss_in(model: Model, column: str | None, domains: tuple[str, ...]) -> float | None:
    """A model's loss in a column of the tables: on a domain, or the mean over ``domains`` in the column None."""
    if column is None:
        return model.mean_loss(domains)
    return model.losses.get(column)


def name_mean_column(domains: tuple[str, ...]) -> str:
    """The heading of the means; another where a domain has that name."""
    if "mean" in domains:
        return "mean over domains"
    return "mean"


def best_per_column(models: Mapping[str, Model], domains: tuple[str, ...]) -> dict[str | None, float]:
    """The lowest finite loss per domain, and of the means under None."""
    best = {}
    for column in (*domains, None):
        losses = [loss_in(model, column, domains) for model in models.values()]
        finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
        if finite:
            best[column] = min(finite)
    return best


def difference_to_dense(models: Mapping[str, Model], domains: tuple[str, ...]) -> dict[str | None, float | None] | None:
    """Loss of btx minus loss of dense per domain, and of their means under None; None without either model.

    Lower is better for btx. It is no fact: it is reported as it comes.
    """
    if BTX not in models or DENSE not in models:
        return None
    differences = {}
    for column in (*domains, None):
        btx, dense = loss_in(models[BTX], column, domains), loss_in(models[DENSE], column, domains)
        differences[column] = subtract(btx, dense)
    return differences


def subtract(loss: float | None, reference: float | None) -> float | None:
    """``loss`` minus ``reference``; None where one of them is not known."""
    if loss is None or reference is None:
        return None
    return loss - reference


def routing_distances(model: Model) -> dict[tuple[str, str], float]:
    """How differently a model routes each two domains: total-variation distance, mean over its mixture layers.

    0: both domains use the experts alike in every layer; 1: they share no expert.
    """
    routing = _mixture_layers(model)
    distances = {}
    for first, second in combinations(routing, 2):
        distances[first, second] = routing_distance(routing[first], routing[second])
    return distances


def _mixture_layers(model: Model) -> dict[str, list[tuple[float, ...]]]:
    """A model's routing without its dense layers, whose shares are all zero."""
    kept = {}
    for domain, layers in (model.routing or {}).items():
        kept[domain] = [shares for shares in layers if any(shares)]
    return kept


class HomeExpert(NamedTuple):
    """Over (domain, layer) cells: how the expert of the domain's own name compares with the others."""

    first: int
    """Cells in which its share is above every other."""
    tied: int
    """Cells in which the largest share is not one expert's."""
    cells: int


def count_home_expert(model: Model) -> HomeExpert:
    """How often the expert of a domain's name has the largest share of the domain's tokens."""
    first = tied = cells = 0
    for domain, layers in _mixture_layers(model).items():
        if domain not in model.experts:
            continue
        home = model.experts.index(domain)
        for shares in layers:
            largest = max(shares) - _SAME_SHARE
            leaders = [expert for expert, share in enumerate(shares) if share >= largest]
            cells += 1
            tied += len(leaders) > 1
            first += leaders == [home]
    return HomeExpert(first, tied, cells)
