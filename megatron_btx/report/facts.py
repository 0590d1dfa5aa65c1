"""The claims a run is held to, each computed from its numbers: true, false, or not checked and why.

Three values keep the report honest: a comparison whose input is missing, or whose reference is not a finite
number, is unknown; a model that is compared and whose own loss is not finite does not hold the claim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from megatron_btx.report.inputs import EXPERT_PREFIX, Model
from megatron_btx.report.numbers import in_digits, mean

SEED, AVERAGE, BTX, DENSE = "seed", "average", "btx", "dense"
ROUTING_DISTANCE_THRESHOLD = 0.05
"""Of a distance between 0 and 1. Far above the sampling noise of shares over some thousand tokens (about 0.01)."""

_SAME_SHARE = 1e-12
"""Shares this close are equal: what they differ by is rounding."""


@dataclass(frozen=True)
class Fact:
    """One claim and its verdict."""

    name: str
    text: str
    holds: bool | None
    """None: not checked."""
    detail: str
    """The numbers behind the verdict in one line, or why it was not checked."""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return "not checked" if self.holds is None else "true" if self.holds else "false"


def check_facts(models: Mapping[str, Model], domains: tuple[str, ...]) -> list[Fact]:
    """The five facts, in the order of the report."""
    return [
        _experts_gain_at_home(models, domains),
        _experts_lose_away(models, domains),
        _btx_beats_seed_everywhere(models, domains),
        _btx_beats_its_parts_on_the_mean(models, domains),
        _routing_differs(models),
    ]


def less(loss: float | None, reference: float | None) -> bool | None:
    """Whether ``loss`` is below ``reference``; None when that cannot be known."""
    if loss is None or reference is None or not math.isfinite(reference):
        return None
    return math.isfinite(loss) and loss < reference


def every(verdicts: Iterable[bool | None]) -> bool | None:
    """False when one is false, else unknown when one is unknown or there is none, else True."""
    seen = list(verdicts)
    if False in seen:
        return False
    return None if not seen or None in seen else True


def some(verdicts: Iterable[bool | None]) -> bool | None:
    """True when one is true, else unknown when one is unknown or there is none, else False."""
    seen = list(verdicts)
    if True in seen:
        return True
    return None if not seen or None in seen else False


def loss_in(model: Model, column: str | None, domains: tuple[str, ...]) -> float | None:
    """A model's loss in a column of the tables: on a domain, or the mean over ``domains`` in the column None."""
    return model.mean_loss(domains) if column is None else model.losses.get(column)


def mean_column(domains: tuple[str, ...]) -> str:
    """The heading of the means; another where a domain has that name."""
    return "mean" if "mean" not in domains else "mean over domains"


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
    differences: dict[str | None, float | None] = {}
    for column in (*domains, None):
        btx, dense = (loss_in(models[name], column, domains) for name in (BTX, DENSE))
        differences[column] = None if btx is None or dense is None else btx - dense
    return differences


def routing_distances(model: Model) -> dict[tuple[str, str], float]:
    """Total-variation distance between the expert shares of each two domains, mean over the layers.

    0: both domains use the experts alike in every layer; 1: they share no expert.
    """
    routing = model.routing or {}
    distances = {}
    for first, second in combinations(routing, 2):
        layers = [
            sum(abs(a - b) for a, b in zip(shares, others, strict=True)) / 2
            for shares, others in zip(routing[first], routing[second], strict=True)
        ]
        distances[first, second] = mean(layers)
    return distances


class HomeExpert(NamedTuple):
    """Over (domain, layer) cells: how the expert of the domain's own name compares with the others."""

    first: int
    """Cells in which its share is above every other."""
    tied: int
    """Cells in which the largest share is not one expert's, as under soft routing, where all are equal."""
    cells: int


def home_expert(model: Model) -> HomeExpert:
    """How often the expert of a domain's name has the largest share of the domain's tokens."""
    first = tied = cells = 0
    for domain, layers in (model.routing or {}).items():
        if domain not in model.experts:
            continue
        home = model.experts.index(domain)
        for layer in layers:
            leaders = [at for at, share in enumerate(layer) if share >= max(layer) - _SAME_SHARE]
            cells += 1
            tied += len(leaders) > 1
            first += leaders == [home]
    return HomeExpert(first, tied, cells)


def _missing(models: Mapping[str, Model], *names: str) -> str:
    absent = [name for name in names if name not in models]
    return f"no evaluation of {' and '.join(absent)}" if absent else ""


def _experts(models: Mapping[str, Model]) -> dict[str, Model]:
    return {name.removeprefix(EXPERT_PREFIX): model for name, model in models.items() if name.startswith(EXPERT_PREFIX)}


def _against(loss: float | None, reference: float | None) -> dict[str, float | None]:
    return {
        "loss": loss,
        "reference": reference,
        "difference": None if loss is None or reference is None else loss - reference,
    }


def _shown(label: str, pair: Mapping[str, float | None]) -> str:
    loss, reference, difference = pair["loss"], pair["reference"], pair["difference"]
    if loss is None or reference is None or difference is None:
        return f"{label} not evaluated"
    return f"{label} {in_digits(loss)} against {in_digits(reference)} ({in_digits(difference, '+')})"


def _verdict(pair: Mapping[str, float | None]) -> bool | None:
    return less(pair["loss"], pair["reference"])


def _experts_gain_at_home(models: Mapping[str, Model], domains: tuple[str, ...]) -> Fact:
    name, text = "experts_gain_at_home", "Every expert beats the seed at home."
    experts = _experts(models)
    why = _missing(models, SEED) or ("" if experts else "no evaluation of single experts")
    at_home = {home: expert for home, expert in experts.items() if home in domains}
    if not why and not at_home:
        why = "no expert is named like an evaluated domain"
    if why:
        return Fact(name, text, None, why)
    seed = models[SEED].losses
    pairs = {home: _against(expert.losses.get(home), seed.get(home)) for home, expert in at_home.items()}
    homeless = [f"{EXPERT_PREFIX}{home}" for home in experts if home not in domains]
    gap = [f"no evaluated domain has the name of {', '.join(homeless)}"] if homeless else []
    detail = "; ".join([*(_shown(home, pair) for home, pair in pairs.items()), *gap])
    holds = every([*map(_verdict, pairs.values()), *([None] * len(homeless))])
    return Fact(name, text, holds, detail, {"expert_against_seed": pairs})


def _forgot(loss: float | None, seed: float | None) -> bool | None:
    """Whether ``loss`` is above the seed's; a loss that is not finite is no evidence of forgetting."""
    if loss is None or seed is None or not math.isfinite(seed):
        return None
    return math.isfinite(loss) and loss > seed


def _experts_lose_away(models: Mapping[str, Model], domains: tuple[str, ...]) -> Fact:
    name, text = "experts_lose_away", "Some expert is worse than the seed away from home."
    experts = _experts(models)
    why = _missing(models, SEED) or ("" if experts else "no evaluation of single experts")
    if why:
        return Fact(name, text, None, why)
    seed = models[SEED].losses
    pairs = {
        f"{home} on {domain}": _against(expert.losses.get(domain), seed.get(domain))
        for home, expert in experts.items()
        for domain in domains
        if domain != home
    }
    worse = {label: _forgot(pair["loss"], pair["reference"]) for label, pair in pairs.items()}
    count = sum(verdict is True for verdict in worse.values())
    most = [label for label, verdict in worse.items() if verdict is True]
    most.sort(key=lambda label: pairs[label]["difference"] or 0.0, reverse=True)
    detail = f"worse in {count} of {len(pairs)} cases" + (f", most: {_shown(most[0], pairs[most[0]])}" if most else "")
    return Fact(name, text, some(worse.values()), detail, {"expert_against_seed": pairs, "worse": count})


def _btx_beats_seed_everywhere(models: Mapping[str, Model], domains: tuple[str, ...]) -> Fact:
    name, text = "btx_beats_seed_everywhere", "The finetuned mixture beats the seed on every domain."
    if why := _missing(models, BTX, SEED):
        return Fact(name, text, None, why)
    btx, seed = models[BTX].losses, models[SEED].losses
    pairs = {domain: _against(btx.get(domain), seed.get(domain)) for domain in domains}
    detail = "; ".join(_shown(domain, pair) for domain, pair in pairs.items())
    return Fact(name, text, every(map(_verdict, pairs.values())), detail, {"btx_against_seed": pairs})


def _btx_beats_its_parts_on_the_mean(models: Mapping[str, Model], domains: tuple[str, ...]) -> Fact:
    name = "btx_beats_average_and_experts"
    text = "On the mean over domains the finetuned mixture beats the plain average and every single expert."
    if why := _missing(models, BTX):
        return Fact(name, text, None, why)
    others = [other for other in models if other == AVERAGE or other.startswith(EXPERT_PREFIX)]
    own_mean = models[BTX].mean_loss(domains)
    pairs = {other: _against(own_mean, models[other].mean_loss(domains)) for other in others}
    absent = [_missing(models, AVERAGE), "" if _experts(models) else "no evaluation of single experts"]
    gaps = [why for why in absent if why]
    shown = [
        f"{other} not evaluated on every domain"
        if pair["reference"] is None or pair["difference"] is None
        else f"{other} {in_digits(pair['reference'])} (btx {in_digits(pair['difference'], '+')})"
        for other, pair in pairs.items()
    ]
    own = "btx not evaluated on every domain" if own_mean is None else f"btx {in_digits(own_mean)}"
    detail = "; ".join([own, *shown, *gaps])
    holds = every([*map(_verdict, pairs.values()), *([None] * len(gaps))])
    return Fact(name, text, holds, detail, {"btx_mean_against": pairs})


def _routing_differs(models: Mapping[str, Model]) -> Fact:
    name = "routing_differs_between_domains"
    text = (
        "The finetuned mixture routes every two domains differently (total-variation distance of their expert "
        f"shares, mean over layers, above {ROUTING_DISTANCE_THRESHOLD})."
    )
    if why := _missing(models, BTX):
        return Fact(name, text, None, why)
    distances = routing_distances(models[BTX])
    if not distances:
        return Fact(name, text, None, "no routing of btx was recorded for two or more domains")
    smallest, largest = min(distances, key=distances.__getitem__), max(distances, key=distances.__getitem__)
    average = mean(distances.values())
    detail = (
        f"mean {average:.3f}; smallest {distances[smallest]:.3f} ({' and '.join(smallest)}); "
        f"largest {distances[largest]:.3f} ({' and '.join(largest)})"
    )
    numbers = {
        "threshold": ROUTING_DISTANCE_THRESHOLD,
        "mean": average,
        "distances": {" / ".join(pair): distance for pair, distance in distances.items()},
    }
    verdicts = [less(ROUTING_DISTANCE_THRESHOLD, distance) for distance in distances.values()]
    return Fact(name, text, every(verdicts), detail, numbers)
