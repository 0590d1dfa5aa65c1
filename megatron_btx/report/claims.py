"""The claims a run is held to, each a row: what it says, and the function that checks it.

Three values keep the report honest: true, false, or not checked and why. A comparison whose input is missing, or whose
reference is not a finite number, is unknown; a model that is compared and whose own loss is not finite does not hold
the claim.

Baselines that were finetuned are no claim: the report says by how much the mixture is above or below them, whatever
the sign.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_btx.common.plugins import load_plugins
from megatron_btx.report.models import AVERAGE, BTX, EXPERT, SEED, Cast, UncheckedError, routing_distances, subtract
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

    def describe(self, label: str) -> str:
        """Both values and their difference."""
        if self.difference is None:
            return f"{label} not evaluated"
        return (
            f"{label} {loss_text(self.loss)} against {loss_text(self.reference)} ({difference_text(self.difference)})"
        )


class Verdict(NamedTuple):
    """Whether a claim holds, in words, and the numbers for programs."""

    holds: bool | None
    detail: str
    numbers: Mapping[str, Any] = {}


class Claim(NamedTuple):
    """One row."""

    name: str
    text: str
    check: Callable[[Cast], Verdict]
    """Raises UncheckedError where nothing can be compared."""


def check_claims(cast: Cast) -> list[Fact]:
    """The facts of a run, in the order of the report, claims of other packages last."""
    load_plugins()
    facts = []
    for claim in CLAIMS:
        try:
            verdict = claim.check(cast)
        except UncheckedError as why:
            verdict = Verdict(None, str(why))
        facts.append(Fact(claim.name, claim.text, *verdict))
    return facts


# --- what may hold of pairs ----------------------------------------------------------------------------------


def settle(verdicts: Iterable[bool | None], one: bool) -> bool | None:
    """What ``one`` of the verdicts settles, else unknown when one is unknown or there is none, else the contrary."""
    seen = list(verdicts)
    if one in seen:
        return one
    if not seen or None in seen:
        return None
    return not one


def every_lower(pairs: Mapping[str, Pair], key: str = "", gaps: Sequence[str] = ()) -> Verdict:
    """Every value is below its reference.

    Args:
        key: of the pairs among the numbers.
        gaps: what should be compared, too, and is missing.
    """
    details = [*(pair.describe(label) for label, pair in pairs.items()), *gaps]
    verdicts = [*(pair.holds(operator.lt) for pair in pairs.values()), *(None for _ in gaps)]
    return Verdict(settle(verdicts, False), "; ".join(details), _number(pairs, key))


def some_higher(pairs: Mapping[str, Pair], key: str = "") -> Verdict:
    """Some value is above its reference."""
    verdicts = {label: pair.holds(operator.gt) for label, pair in pairs.items()}
    worse = [label for label, holds in verdicts.items() if holds]
    detail = f"worse in {len(worse)} of {len(pairs)} cases"
    if worse:
        most = max(worse, key=lambda label: pairs[label].difference or 0.0)
        detail += f", most: {pairs[most].describe(most)}"
    return Verdict(settle(verdicts.values(), True), detail, {**_number(pairs, key), "worse": len(worse)})


def _number(pairs: Mapping[str, Pair], key: str) -> dict[str, Any]:
    numbers = {}
    for label, pair in pairs.items():
        numbers[label] = {"loss": pair.loss, "reference": pair.reference, "difference": pair.difference}
    return {key: numbers} if key else {}


# --- the claims ----------------------------------------------------------------------------------------------


_NO_EXPERTS = "no evaluation of single experts"


def experts_gain_at_home(cast: Cast) -> Verdict:
    """Every expert against the seed on its own domain."""
    [seed], experts = cast.need(SEED), cast.having(EXPERT)
    if not experts:
        raise UncheckedError(_NO_EXPERTS)
    pairs, homeless = {}, []
    for expert in experts:
        home = expert.row.home
        if home in cast.domains:
            pairs[str(home)] = Pair(expert.losses.get(str(home)), seed.losses.get(str(home)))
        else:
            homeless.append(expert.name)
    if not pairs:
        raise UncheckedError("no expert is named like an evaluated domain")
    gaps = [f"no evaluated domain has the name of {', '.join(homeless)}"] * bool(homeless)
    return every_lower(pairs, "expert_against_seed", gaps)


def experts_lose_away(cast: Cast) -> Verdict:
    """Every expert against the seed on every other domain."""
    [seed], experts = cast.need(SEED), cast.having(EXPERT)
    if not experts:
        raise UncheckedError(_NO_EXPERTS)
    pairs = {}
    for expert in experts:
        for domain in cast.domains:
            if domain != expert.row.home:
                place = f"{expert.row.home or expert.name} on {domain}"
                pairs[place] = Pair(expert.losses.get(domain), seed.losses.get(domain))
    return some_higher(pairs, "expert_against_seed")


def btx_beats_seed(cast: Cast) -> Verdict:
    """The finetuned mixture against the seed, on every domain."""
    mixture, seed = cast.need(BTX, SEED)
    pairs = {domain: Pair(mixture.losses.get(domain), seed.losses.get(domain)) for domain in cast.domains}
    return every_lower(pairs, "btx_against_seed")


def btx_beats_parts(cast: Cast) -> Verdict:
    """The mean loss of the finetuned mixture against those of the plain average and of every expert."""
    [mixture] = cast.need(BTX)
    average, experts = cast.find(AVERAGE), cast.having(EXPERT)
    pairs = {}
    for model in cast.measured:
        if model is average or model in experts:
            pairs[model.name] = Pair(mixture.mean_loss(cast.domains), model.mean_loss(cast.domains))
    gaps = [f"no evaluation of {AVERAGE}"] * (average is None) + [_NO_EXPERTS] * (not experts)
    return every_lower(pairs, "btx_mean_against", gaps)


def routing_differs(cast: Cast) -> Verdict:
    """How far the routings of every two domains lie apart."""
    [mixture] = cast.need(BTX)
    if not mixture.chooses_experts():
        raise UncheckedError("soft routing sends every token to every expert, so that shares say nothing")
    distances = {" / ".join(pair): distance for pair, distance in routing_distances(mixture).items()}
    if not distances:
        raise UncheckedError("no routing of btx was recorded for two or more domains")
    average = mean(distances.values())
    smallest, largest = min(distances, key=distances.__getitem__), max(distances, key=distances.__getitem__)
    detail = f"mean {average:.3f}; smallest {distances[smallest]:.3f} ({smallest}); "
    detail += f"largest {distances[largest]:.3f} ({largest})"
    numbers = {"threshold": ROUTING_DISTANCE_THRESHOLD, "mean": average, "distances": distances}
    return Verdict(distances[smallest] > ROUTING_DISTANCE_THRESHOLD, detail, numbers)


CLAIMS: list[Claim] = [
    Claim("experts_gain_at_home", "Every expert beats the seed at home.", experts_gain_at_home),
    Claim("experts_lose_away", "Some expert is worse than the seed away from home.", experts_lose_away),
    Claim(
        "btx_beats_seed_everywhere",
        "The finetuned mixture beats the seed, which was not finetuned, on every domain.",
        btx_beats_seed,
    ),
    Claim(
        "btx_beats_average_and_experts",
        "On the mean over domains the finetuned mixture beats the plain average and every single expert, "
        "none of which was finetuned.",
        btx_beats_parts,
    ),
    Claim(
        "routing_differs_between_domains",
        "The finetuned mixture routes every two domains differently (total-variation distance of their expert "
        f"shares, mean over layers, above {ROUTING_DISTANCE_THRESHOLD}).",
        routing_differs,
    ),
]
"""All of them, in the order of the report."""
