"""The claims a run is held to, each a row: what it compares, and what must hold of it.

Three values keep the report honest: true, false, or not checked and why. A comparison whose input is missing, or whose
reference is not a finite number, is unknown; a model that is compared and whose own loss is not finite does not hold
the claim.

Baselines that were finetuned are no claim: the report says by how much the mixture is above or below them, whatever
the sign.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_btx.common.plugins import load_plugins
from megatron_btx.report.models import AVERAGE, BTX, EXPERT, SEED, Cast, routing_distances, subtract
from megatron_btx.report.quantities import difference_text, loss_text, mean

ROUTING_DISTANCE_THRESHOLD = 0.05
"""Of a distance between 0 and 1. Far above the sampling noise of shares over some thousand tokens (about 0.01)."""


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


@dataclass(frozen=True)
class Pair:
    """A value, and the one it is compared with; None where it was not measured."""

    loss: float | None
    reference: float | None

    @property
    def difference(self) -> float | None:
        """The value minus its reference."""
        return subtract(self.loss, self.reference)

    def holds(self, relation: Callable[[float, float], bool]) -> bool | None:
        """Whether the value stands in a relation to its reference, as ``operator.lt`` or ``gt``.

        None when that cannot be known; a value that is not finite stands in none.
        """
        if self.loss is None or self.reference is None or not math.isfinite(self.reference):
            return None
        return math.isfinite(self.loss) and relation(self.loss, self.reference)

    def numbers(self) -> dict[str, float | None]:
        """Both values and their difference, for programs."""
        return {"loss": self.loss, "reference": self.reference, "difference": self.difference}

    def describe(self, label: str) -> str:
        """Both values and their difference."""
        if self.difference is None:
            return f"{label} not evaluated"
        return (
            f"{label} {loss_text(self.loss)} against {loss_text(self.reference)} ({difference_text(self.difference)})"
        )


class Selection(NamedTuple):
    """What a claim compares in a run."""

    pairs: Mapping[str, Pair]
    gaps: tuple[str, ...] = ()
    """What should be compared, too, and is missing."""


class Verdict(NamedTuple):
    """Whether a claim holds, in words, and further numbers."""

    holds: bool | None
    detail: str
    numbers: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Claim:
    """One row."""

    name: str
    text: str
    select: Callable[[Cast], Selection | str]
    """What is compared; a sentence where nothing can be."""
    reduce: Callable[[Selection], Verdict]
    """Whether it holds, from the pairs."""
    key: str = ""
    """Of the pairs in results.json."""


def check_claims(cast: Cast) -> list[Fact]:
    """The facts of a run, in the order of the report, claims of other packages last."""
    load_plugins()
    facts = []
    for claim in CLAIMS:
        found = claim.select(cast)
        if isinstance(found, str):
            facts.append(Fact(claim.name, claim.text, None, found))
            continue
        verdict = claim.reduce(found)
        numbers = dict(verdict.numbers)
        if claim.key:
            numbers = {claim.key: {label: pair.numbers() for label, pair in found.pairs.items()}, **numbers}
        facts.append(Fact(claim.name, claim.text, verdict.holds, verdict.detail, numbers))
    return facts


# --- reducers ----------------------------------------------------------------------------------------------


def settle(verdicts: Iterable[bool | None], one: bool) -> bool | None:
    """What ``one`` of the verdicts settles, else unknown when one is unknown or there is none, else the contrary."""
    seen = list(verdicts)
    if one in seen:
        return one
    if not seen or None in seen:
        return None
    return not one


def every_lower(found: Selection) -> Verdict:
    """Every value is below its reference."""
    details = [pair.describe(label) for label, pair in found.pairs.items()]
    verdicts = [pair.holds(operator.lt) for pair in found.pairs.values()]
    return Verdict(settle([*verdicts, *[None] * len(found.gaps)], False), "; ".join([*details, *found.gaps]))


def some_higher(found: Selection) -> Verdict:
    """Some value is above its reference."""
    pairs = found.pairs
    verdicts = {label: pair.holds(operator.gt) for label, pair in pairs.items()}
    worse = [label for label, holds in verdicts.items() if holds]
    detail = f"worse in {len(worse)} of {len(pairs)} cases"
    if worse:
        most = max(worse, key=lambda label: pairs[label].difference or 0.0)
        detail += f", most: {pairs[most].describe(most)}"
    return Verdict(settle(verdicts.values(), True), detail, {"worse": len(worse)})


def every_distance(found: Selection) -> Verdict:
    """Every distance is above the threshold."""
    distances = {label: pair.reference or 0.0 for label, pair in found.pairs.items()}
    smallest, largest = min(distances, key=distances.__getitem__), max(distances, key=distances.__getitem__)
    average = mean(distances.values())
    detail = f"mean {average:.3f}; smallest {distances[smallest]:.3f} ({smallest}); "
    detail += f"largest {distances[largest]:.3f} ({largest})"
    numbers = {"threshold": ROUTING_DISTANCE_THRESHOLD, "mean": average, "distances": distances}
    return Verdict(settle([pair.holds(operator.lt) for pair in found.pairs.values()], False), detail, numbers)


# --- selectors ---------------------------------------------------------------------------------------------


_NO_EXPERTS = "no evaluation of single experts"


def experts_at_home(cast: Cast) -> Selection | str:
    """Every expert against the seed on its own domain."""
    experts, seed = cast.having(EXPERT), cast.find(SEED)
    if seed is None or not experts:
        return cast.name_missing(SEED) or _NO_EXPERTS
    pairs, homeless = {}, []
    for expert in experts:
        home = expert.row.home
        if home in cast.domains:
            pairs[str(home)] = Pair(expert.losses.get(str(home)), seed.losses.get(str(home)))
        else:
            homeless.append(expert.name)
    if not pairs:
        return "no expert is named like an evaluated domain"
    if homeless:
        return Selection(pairs, (f"no evaluated domain has the name of {', '.join(homeless)}",))
    return Selection(pairs)


def experts_away(cast: Cast) -> Selection | str:
    """Every expert against the seed on every other domain."""
    experts, seed = cast.having(EXPERT), cast.find(SEED)
    if seed is None or not experts:
        return cast.name_missing(SEED) or _NO_EXPERTS
    pairs = {}
    for expert in experts:
        for domain in cast.domains:
            if domain != expert.row.home:
                place = f"{expert.row.home or expert.name} on {domain}"
                pairs[place] = Pair(expert.losses.get(domain), seed.losses.get(domain))
    return Selection(pairs)


def mixture_and_seed(cast: Cast) -> Selection | str:
    """The finetuned mixture against the seed, on every domain."""
    mixture, seed = cast.find(BTX), cast.find(SEED)
    if mixture is None or seed is None:
        return cast.name_missing(BTX, SEED)
    return Selection({domain: Pair(mixture.losses.get(domain), seed.losses.get(domain)) for domain in cast.domains})


def mixture_and_parts(cast: Cast) -> Selection | str:
    """The mean loss of the finetuned mixture against those of the plain average and of every expert."""
    mixture, average, experts = cast.find(BTX), cast.find(AVERAGE), cast.having(EXPERT)
    if mixture is None:
        return cast.name_missing(BTX)
    own = mixture.mean_loss(cast.domains)
    pairs = {}
    for model in cast.measured:
        if model is average or model in experts:
            pairs[model.name] = Pair(own, model.mean_loss(cast.domains))
    gaps = [cast.name_missing(AVERAGE), _NO_EXPERTS * (not experts)]
    return Selection(pairs, tuple(filter(None, gaps)))


def routing_of_domains(cast: Cast) -> Selection | str:
    """The threshold against how far the routings of every two domains lie apart."""
    mixture = cast.find(BTX)
    if mixture is None:
        return cast.name_missing(BTX)
    if not mixture.chooses_experts():
        return "soft routing sends every token to every expert, so that shares say nothing"
    distances = routing_distances(mixture)
    if not distances:
        return "no routing of btx was recorded for two or more domains"
    return Selection({" / ".join(two): Pair(ROUTING_DISTANCE_THRESHOLD, far) for two, far in distances.items()})


CLAIMS: list[Claim] = [
    Claim(
        "experts_gain_at_home",
        "Every expert beats the seed at home.",
        experts_at_home,
        every_lower,
        "expert_against_seed",
    ),
    Claim(
        "experts_lose_away",
        "Some expert is worse than the seed away from home.",
        experts_away,
        some_higher,
        "expert_against_seed",
    ),
    Claim(
        "btx_beats_seed_everywhere",
        "The finetuned mixture beats the seed, which was not finetuned, on every domain.",
        mixture_and_seed,
        every_lower,
        "btx_against_seed",
    ),
    Claim(
        "btx_beats_average_and_experts",
        "On the mean over domains the finetuned mixture beats the plain average and every single expert, "
        "none of which was finetuned.",
        mixture_and_parts,
        every_lower,
        "btx_mean_against",
    ),
    Claim(
        "routing_differs_between_domains",
        "The finetuned mixture routes every two domains differently (total-variation distance of their expert "
        f"shares, mean over layers, above {ROUTING_DISTANCE_THRESHOLD}).",
        routing_of_domains,
        every_distance,
    ),
]
"""All of them, in the order of the report."""
