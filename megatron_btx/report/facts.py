"""The claims a run is held to, each computed from its numbers: true, false, or not checked and why.

Three values keep the report honest. A comparison whose input is missing, or whose reference is not a finite number, is
unknown; a model that is compared and whose own loss is not finite does not hold the claim.

The dense baseline is no claim: the report says by how much the mixture is above or below it, whatever the sign
(:mod:`megatron_btx.report.sections`, from :mod:`megatron_btx.report.comparisons`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_btx.recipe.names import EXPERT_PREFIX
from megatron_btx.report.budgets import Budgets, sum_budgets
from megatron_btx.report.comparisons import best_per_column, difference_to_dense, routing_distances, subtract
from megatron_btx.report.inputs import AVERAGE, BTX, SEED, Model, RunData
from megatron_btx.report.quantities import difference_text, loss_text, mean

ROUTING_DISTANCE_THRESHOLD = 0.05
"""Of a distance between 0 and 1. Far above the sampling noise of shares over some thousand tokens (about 0.01)."""
_VERDICTS = {True: "true", False: "false", None: "not checked"}

Models = Mapping[str, Model]


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
        """The verdict in words."""
        return _VERDICTS[self.holds]


@dataclass(frozen=True)
class Pair:
    """A loss, and the one it is compared with; None where it was not evaluated."""

    loss: float | None
    reference: float | None

    @property
    def difference(self) -> float | None:
        """The loss minus its reference."""
        return subtract(self.loss, self.reference)

    def is_lower(self) -> bool | None:
        """Whether the loss is below its reference; None when that cannot be known."""
        return self._compare(operator.lt)

    def is_higher(self) -> bool | None:
        """Whether the loss is above its reference; one that is not finite is no evidence of that."""
        return self._compare(operator.gt)

    def _compare(self, relation: Callable[[float, float], bool]) -> bool | None:
        if self.loss is None or self.reference is None or not math.isfinite(self.reference):
            return None
        return math.isfinite(self.loss) and relation(self.loss, self.reference)

    def describe(self, label: str) -> str:
        """Both losses and their difference."""
        if self.difference is None:
            return f"{label} not evaluated"
        return (
            f"{label} {loss_text(self.loss)} against {loss_text(self.reference)} ({difference_text(self.difference)})"
        )


@dataclass(frozen=True)
class Claims:
    """What all sections of a report are written from, beside the inputs."""

    facts: tuple[Fact, ...]
    best: Mapping[str | None, float]
    """Lowest finite loss per domain, and of the means under None."""
    difference: Mapping[str | None, float | None] | None
    """Loss of btx minus loss of dense, likewise; None without either model."""
    budgets: Budgets


def make_claims(data: RunData) -> Claims:
    """The claims of a run: everything that its report computes from the inputs, once."""
    models, domains = data.models, data.domains
    facts = tuple(check_facts(models, domains))
    best, difference = best_per_column(models, domains), difference_to_dense(models, domains)
    return Claims(facts, best, difference, sum_budgets(data.stages))


def check_facts(models: Models, domains: tuple[str, ...]) -> list[Fact]:
    """The five facts, in the order of the report."""
    return [
        _check_gain_at_home(models, domains),
        _check_loss_away(models, domains),
        _check_btx_against_seed(models, domains),
        _check_btx_against_its_parts(models, domains),
        _check_routing(models),
    ]


def settle(verdicts: Iterable[bool | None], one: bool) -> bool | None:
    """What ``one`` of the verdicts settles, else unknown when one is unknown or there is none, else the contrary."""
    seen = list(verdicts)
    if one in seen:
        return one
    if not seen or None in seen:
        return None
    return not one


def _name_missing(models: Models, *names: str) -> str:
    absent = [name for name in names if name not in models]
    if not absent:
        return ""
    return f"no evaluation of {' and '.join(absent)}"


def _single_experts(models: Models) -> dict[str, Model]:
    """The single experts by the name of their home."""
    return {name.removeprefix(EXPERT_PREFIX): model for name, model in models.items() if model.is_expert()}


def _missing_for_experts(models: Models) -> str:
    missing = _name_missing(models, SEED)
    if not missing and not _single_experts(models):
        missing = "no evaluation of single experts"
    return missing


def _numbers_of(pairs: Mapping[str, Pair]) -> dict[str, dict[str, float | None]]:
    """For results.json."""
    return {label: {**asdict(pair), "difference": pair.difference} for label, pair in pairs.items()}


def _check_gain_at_home(models: Models, domains: tuple[str, ...]) -> Fact:
    name, text = "experts_gain_at_home", "Every expert beats the seed at home."
    missing = _missing_for_experts(models)
    pairs: dict[str, Pair] = {}
    homeless = []
    for home, expert in _single_experts(models).items():
        if home not in domains:
            homeless.append(expert.name)
        elif SEED in models:
            pairs[home] = Pair(expert.losses.get(home), models[SEED].losses.get(home))
    if not missing and not pairs:
        missing = "no expert is named like an evaluated domain"
    if missing:
        return Fact(name, text, None, missing)
    details = [pair.describe(home) for home, pair in pairs.items()]
    verdicts = [pair.is_lower() for pair in pairs.values()]
    if homeless:
        details.append(f"no evaluated domain has the name of {', '.join(homeless)}")
        verdicts.append(None)
    return Fact(name, text, settle(verdicts, False), "; ".join(details), {"expert_against_seed": _numbers_of(pairs)})


def _check_loss_away(models: Models, domains: tuple[str, ...]) -> Fact:
    name, text = "experts_lose_away", "Some expert is worse than the seed away from home."
    missing = _missing_for_experts(models)
    if missing:
        return Fact(name, text, None, missing)
    pairs: dict[str, Pair] = {}
    for home, expert in _single_experts(models).items():
        for domain in domains:
            if domain != home:
                pairs[f"{home} on {domain}"] = Pair(expert.losses.get(domain), models[SEED].losses.get(domain))
    verdicts = [pair.is_higher() for pair in pairs.values()]
    worse = [label for label, pair in pairs.items() if pair.is_higher()]
    detail = f"worse in {len(worse)} of {len(pairs)} cases"
    if worse:
        most = max(worse, key=lambda label: pairs[label].difference or 0.0)
        detail += f", most: {pairs[most].describe(most)}"
    numbers = {"expert_against_seed": _numbers_of(pairs), "worse": len(worse)}
    return Fact(name, text, settle(verdicts, True), detail, numbers)


def _check_btx_against_seed(models: Models, domains: tuple[str, ...]) -> Fact:
    name = "btx_beats_seed_everywhere"
    text = "The finetuned mixture beats the seed, which was not finetuned, on every domain."
    missing = _name_missing(models, BTX, SEED)
    if missing:
        return Fact(name, text, None, missing)
    btx, seed = models[BTX].losses, models[SEED].losses
    pairs = {domain: Pair(btx.get(domain), seed.get(domain)) for domain in domains}
    details = [pair.describe(domain) for domain, pair in pairs.items()]
    verdicts = [pair.is_lower() for pair in pairs.values()]
    return Fact(name, text, settle(verdicts, False), "; ".join(details), {"btx_against_seed": _numbers_of(pairs)})


def _check_btx_against_its_parts(models: Models, domains: tuple[str, ...]) -> Fact:
    name = "btx_beats_average_and_experts"
    text = "On the mean over domains the finetuned mixture beats the plain average and every single expert, "
    text += "none of which was finetuned."
    missing = _name_missing(models, BTX)
    if missing:
        return Fact(name, text, None, missing)
    own = models[BTX].mean_loss(domains)
    details = ["btx not evaluated on every domain"]
    if own is not None:
        details = [f"btx {loss_text(own)}"]
    pairs, verdicts = {}, []
    for other, model in models.items():
        if other != AVERAGE and not model.is_expert():
            continue
        pair = pairs[other] = Pair(own, model.mean_loss(domains))
        verdicts.append(pair.is_lower())
        if pair.difference is None:
            details.append(f"{other} not evaluated on every domain")
        else:
            details.append(f"{other} {loss_text(pair.reference)} (btx {difference_text(pair.difference)})")
    gaps = []
    if AVERAGE not in models:
        gaps.append(_name_missing(models, AVERAGE))
    if not _single_experts(models):
        gaps.append("no evaluation of single experts")
    verdicts += [None] * len(gaps)
    numbers = {"btx_mean_against": _numbers_of(pairs)}
    return Fact(name, text, settle(verdicts, False), "; ".join([*details, *gaps]), numbers)


def _check_routing(models: Models) -> Fact:
    name = "routing_differs_between_domains"
    text = (
        "The finetuned mixture routes every two domains differently (total-variation distance of their expert "
        f"shares, mean over layers, above {ROUTING_DISTANCE_THRESHOLD})."
    )
    missing = _name_missing(models, BTX)
    if missing:
        return Fact(name, text, None, missing)
    if not models[BTX].chooses_experts():
        return Fact(name, text, None, "soft routing sends every token to every expert, so that shares say nothing")
    distances = routing_distances(models[BTX])
    if not distances:
        return Fact(name, text, None, "no routing of btx was recorded for two or more domains")
    smallest, largest = min(distances, key=distances.__getitem__), max(distances, key=distances.__getitem__)
    average = mean(distances.values())
    detail = (
        f"mean {average:.3f}; smallest {distances[smallest]:.3f} ({' and '.join(smallest)}); "
        f"largest {distances[largest]:.3f} ({' and '.join(largest)})"
    )
    numbers = {" / ".join(pair): distance for pair, distance in distances.items()}
    verdicts = [Pair(ROUTING_DISTANCE_THRESHOLD, distance).is_lower() for distance in distances.values()]
    stated = {"threshold": ROUTING_DISTANCE_THRESHOLD, "mean": average, "distances": numbers}
    return Fact(name, text, settle(verdicts, False), detail, stated)
