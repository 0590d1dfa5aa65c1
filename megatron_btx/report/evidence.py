"""The nine claims of Branch-Train-MiX, tested over seeds: each a row, with the comparisons that it stands for.

A comparison gives a difference for every seed, in nats per token; above zero it speaks for the claim. What is compared
was made from one seed and saw its data in one order. A claim is supported where the 95 % interval over seeds of each of
its differences lies above zero, not supported where one lies below it, else undecided. A claim of "no worse" allows
:data:`MARGIN`. Source: the Branch-Train-MiX paper (arXiv 2403.07816), tables 2 to 6.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_btx.common.shares import find_dead_experts
from megatron_btx.report.inputs import RunData
from megatron_btx.report.models import BTX, DENSE, EXPERT, SEED, Cast, Model
from megatron_btx.report.quantities import difference_text, mean
from megatron_btx.report.statistics import Interval, adjust_by_holm, paired_interval

SUPPORTED, REFUTED, UNDECIDED, UNTESTED = "supported", "not supported", "undecided", "not tested"
MARGIN = 0.01
"""Nats per token that still count as no worse."""
BTM, UPCYCLED = "btm", ("upcycled", "upcycled-cm")
SIGNIFICANT = 0.05


class Comparison(NamedTuple):
    """One difference, over seeds."""

    name: str
    differences: Mapping[str, float]
    """Seed -> nats per token; above zero speaks for the claim."""
    margin: float = 0.0
    """How far below zero still does."""

    @property
    def interval(self) -> Interval:
        """Of the mean over seeds."""
        return paired_interval(list(self.differences.values()))

    @property
    def verdict(self) -> str:
        """Of this difference alone."""
        found = self.interval
        if found.seeds > 1 and found.low > -self.margin:
            return SUPPORTED
        return REFUTED if found.high < -self.margin else UNDECIDED

    @property
    def p(self) -> float:
        """Of the test that the mean is at the margin."""
        return paired_interval([value + self.margin for value in self.differences.values()]).p

    def describe(self) -> str:
        """The mean, its interval's half-width and the number of seeds."""
        found = self.interval
        if found.seeds == 1:
            return f"{self.name} {difference_text(found.mean)} (one seed)"
        return f"{self.name} {difference_text(found.mean)} ± {found.half_width:.3f} ({found.seeds} seeds)"


@dataclass(frozen=True)
class Finding:
    """A claim and what was found of it."""

    number: int
    text: str
    verdict: str
    detail: str
    """The numbers behind the verdict, or why it was not tested."""
    comparisons: tuple[Comparison, ...] = ()
    p: float | None = None
    """The largest of its comparisons; None where it is no t test, or has one seed."""
    adjusted_p: float | None = None
    """By Holm over all claims that were tested."""

    def numbers(self) -> dict[str, Any]:
        """For programs."""
        compared = {}
        for each in self.comparisons:
            interval = each.interval
            half_width = interval.half_width if math.isfinite(interval.half_width) else None
            compared[each.name] = {
                "differences": dict(each.differences),
                "mean": interval.mean,
                "half_width": half_width,
                "seeds": interval.seeds,
                "margin": each.margin,
                "verdict": each.verdict,
            }
        found = {"text": self.text, "verdict": self.verdict, "detail": self.detail, "comparisons": compared}
        return {**found, "p": self.p, "adjusted_p": self.adjusted_p}


@dataclass(frozen=True)
class PaperClaim:
    """One row."""

    text: str
    compare: Callable[[Replicates], Sequence[Comparison] | Finding | str]
    """Its comparisons; a sentence where nothing can be compared; a finding where it is no matter of means."""


@dataclass(frozen=True)
class Replicates:
    """Runs of one recipe that differ in their seed: what a claim is tested on."""

    run_names: tuple[str, ...]
    runs: Mapping[str, Cast]
    """Seed -> the run's models."""
    domains: tuple[str, ...]

    def loss(self, seed: str, role: str, domain: str | None = None, name: str = "") -> float | None:
        """The loss of a run's model of a role, on a domain or over all of them."""
        cast = self.runs[seed]
        found = [model for model in cast.having(role) if not model.row.variant and name in ("", model.name)]
        if not found:
            return None
        return found[0].mean_loss(self.domains) if domain is None else found[0].losses.get(domain)

    def compare(
        self, name: str, worse: tuple[str, str | None, str], better: tuple[str, str | None, str], margin: float = 0.0
    ) -> Comparison | None:
        """The loss of ``worse`` minus that of ``better``, each a role, a domain and a name; None without a seed."""
        differences = {}
        for seed in self.runs:
            above, below = self.loss(seed, *worse), self.loss(seed, *better)
            if above is not None and below is not None and math.isfinite(above - below):
                differences[seed] = above - below
        return Comparison(name, differences, margin) if differences else None

    def names(self, role: str) -> list[str]:
        """The models of a role in any run."""
        found = [model.name for cast in self.runs.values() for model in cast.having(role) if not model.row.variant]
        return list(dict.fromkeys(found))

    def variants(self, **traits: str) -> dict[str, dict[str, Model]]:
        """Variant -> seed -> its model, of those that have the traits; seeds of several runs keep apart."""
        found: dict[str, dict[str, Model]] = {}
        for seed, cast in self.runs.items():
            for model in cast.variants():
                if model.scores and all(model.row.traits.get(key) == value for key, value in traits.items()):
                    found.setdefault(str(model.row.variant), {})[f"{seed}/{model.row.seed}"] = model
        return found

    def compare_variants(self, name: str, worse: str, better: str, margin: float = 0.0) -> Comparison | None:
        """The mean loss of one variant minus that of another, seed by seed."""
        every = self.variants()
        differences = {}
        for seed, model in every.get(worse, {}).items():
            other = every.get(better, {}).get(seed)
            above, below = model.mean_loss(self.domains), None if other is None else other.mean_loss(self.domains)
            if above is not None and below is not None and math.isfinite(above - below):
                differences[seed] = above - below
        return Comparison(name, differences, margin) if differences else None


def find_replicates(runs: Sequence[RunData]) -> list[Replicates]:
    """The runs by recipe. Of two that have the seed in common, too, the first counts: the other is no further seed."""
    groups: dict[str, dict[str, RunData]] = {}
    for run in runs:
        rest = {key: value for key, value in run.recipe.items() if key not in ("name", "random-seed")}
        seed = str(run.recipe.get("random-seed", run.name))
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), {}).setdefault(seed, run)
    found = []
    for of_seeds in groups.values():
        names = tuple(run.name for run in of_seeds.values())
        found.append(Replicates(names, of_seeds, next(iter(of_seeds.values())).domains))
    return found


def judge_claims(replicates: Replicates) -> list[Finding]:
    """Every claim, in the paper's order, corrected for their number."""
    findings = []
    for number, claim in enumerate(PAPER_CLAIMS, 1):
        found = claim.compare(replicates)
        if isinstance(found, str):
            findings.append(Finding(number, claim.text, UNTESTED, found))
        elif isinstance(found, Finding):
            findings.append(found)
        else:
            findings.append(_judge(number, claim.text, tuple(found)))
    tested = {str(each.number): each.p for each in findings if each.p is not None}
    adjusted = adjust_by_holm(tested)
    return [_correct(each, adjusted.get(str(each.number))) for each in findings]


def _judge(number: int, text: str, comparisons: tuple[Comparison, ...]) -> Finding:
    """A claim holds where all that it stands for does: so its p is the largest of theirs."""
    verdicts = [each.verdict for each in comparisons]
    verdict = UNDECIDED
    if REFUTED in verdicts:
        verdict = REFUTED
    elif set(verdicts) == {SUPPORTED}:
        verdict = SUPPORTED
    detail = "; ".join(each.describe() for each in comparisons)
    p = None
    if all(each.interval.seeds > 1 for each in comparisons):
        p = max(each.p for each in comparisons)
    return Finding(number, text, verdict, detail, comparisons, p)


def _correct(finding: Finding, adjusted: float | None) -> Finding:
    if adjusted is None:
        return finding
    detail = finding.detail
    if finding.verdict in (SUPPORTED, REFUTED) and adjusted >= SIGNIFICANT:
        detail += f"; not after Holm's correction (p {adjusted:.3f})"
    return replace(finding, detail=detail, adjusted_p=adjusted)


# --- what each claim compares -----------------------------------------------------------------------------


def _collect(found: Iterator[Comparison | None], missing: str) -> Sequence[Comparison] | str:
    comparisons = [each for each in found if each is not None]
    return comparisons or missing


def _experts(replicates: Replicates) -> Sequence[Comparison] | str:
    def compare() -> Iterator[Comparison | None]:
        homes = {model.name: model.row.home for cast in replicates.runs.values() for model in cast.having(EXPERT)}
        for name, home in homes.items():
            if home not in replicates.domains:
                continue
            yield replicates.compare(f"{home} at home", (SEED, home, ""), (EXPERT, home, name))
            away = [domain for domain in replicates.domains if domain != home]
            differences = {}
            for seed in replicates.runs:
                losses = [(replicates.loss(seed, EXPERT, d, name), replicates.loss(seed, SEED, d)) for d in away]
                if away and all(own is not None and seeds is not None for own, seeds in losses):
                    differences[seed] = mean(own - seeds for own, seeds in losses)  # type: ignore[operator]
            yield Comparison(f"{home} forgets elsewhere", differences) if differences else None

    return _collect(compare(), "no evaluation of single experts and of the seed")


def _beats_seed(replicates: Replicates) -> Sequence[Comparison] | str:
    found = (replicates.compare(domain, (SEED, domain, ""), (BTX, domain, "")) for domain in replicates.domains)
    return _collect(found, "no evaluation of seed and btx")


def _beats_all_of(missing: str, *roles: str) -> Callable[[Replicates], Sequence[Comparison] | str]:
    """The mixture against every model of these roles, on the mean over domains."""

    def compare(replicates: Replicates) -> Sequence[Comparison] | str:
        named = [(role, name) for role in roles for name in replicates.names(role)]
        found = (replicates.compare(name, (role, None, name), (BTX, None, "")) for role, name in named)
        return _collect(found, missing)

    return compare


def _balanced(replicates: Replicates) -> Finding | str:
    """Dead experts with and without load balancing: counted, because one is enough."""
    text = PAPER_CLAIMS[5].text
    counts: dict[bool, list[int]] = {True: [], False: []}
    for cast in replicates.runs.values():
        for model in cast.variants():
            log = model.stage.log.routing if model.stage is not None else None
            if log is not None and log.loads and "load-balancing" in model.row.traits:
                dead = sum(len(find_dead_experts(shares)) for shares in log.loads)
                counts[model.row.traits["load-balancing"] != "none"].append(dead)
    if not counts[True] or not counts[False]:
        return "no variants with and without load balancing"
    detail = "; ".join(
        f"{label}: dead experts in {sum(map(bool, found))} of {len(found)} trainings"
        for label, found in (("without", counts[False]), ("with", counts[True]))
    )
    verdict = UNDECIDED
    if any(counts[True]):
        verdict = REFUTED
    elif any(counts[False]):
        verdict = SUPPORTED
    return Finding(6, text, verdict, detail)


_ROUTING_ORDER = ("soft", "top-k", "sample-top1", "switch")


def _routing_order(replicates: Replicates) -> Sequence[Comparison] | str:
    """Each routing method against the next, without load balancing, as the paper's table 5 has them."""

    def compare() -> Iterator[Comparison | None]:
        chosen = []
        for method in _ROUTING_ORDER:
            traits = {"routing": method, "load-balancing": "none", "freeze": "", "megatron": ""}
            names = list(replicates.variants(**traits, **{"top-k": "2"} if method == "top-k" else {}))
            chosen += names[:1]
        for better, worse in zip(chosen, chosen[1:], strict=False):
            yield replicates.compare_variants(f"{worse} over {better}", worse, better)

    return _collect(compare(), "no variants of two routing methods without load balancing")


def _pairs_of_traits(trait: str, value: str, margin: float, sign: int) -> Callable[[Replicates], list[Comparison]]:
    """Variants that have a trait against those that are equal but for it."""

    def compare(replicates: Replicates) -> list[Comparison]:
        found = []
        every = {name: next(iter(models.values())).row.traits for name, models in replicates.variants().items()}
        for name, traits in every.items():
            if traits.get(trait) != value:
                continue
            for plain, others in every.items():
                rest = {key: other for key, other in others.items() if key != trait}
                if others.get(trait, "") == "" and rest == {k: v for k, v in traits.items() if k != trait}:
                    worse, better = (name, plain) if sign > 0 else (plain, name)
                    made = replicates.compare_variants(f"{worse} over {better}", worse, better, margin)
                    found += [made] if made else []
        return found

    return compare


def _mixing(replicates: Replicates) -> Sequence[Comparison] | str:
    blended = _pairs_of_traits("mix", "blend", 0.0, 1)(replicates)
    split = _pairs_of_traits("mix", "split", MARGIN, 1)(replicates)
    return [*blended, *split] or "no variants that blend or split the experts"


def _frozen(replicates: Replicates) -> Sequence[Comparison] | str:
    return _pairs_of_traits("freeze", "experts", MARGIN, -1)(replicates) or "no variants with frozen experts"


PAPER_CLAIMS: tuple[PaperClaim, ...] = (
    PaperClaim("Every expert gains on its own domain, and forgets on the others.", _experts),
    PaperClaim("The mixture beats the seed on every domain.", _beats_seed),
    PaperClaim(
        "The mixture beats Branch-Train-Merge on the mean over domains.",
        _beats_all_of("no evaluation of btm; add baselines.btm", BTM),
    ),
    PaperClaim(
        "The mixture beats the dense model that was trained on the same data.",
        _beats_all_of("no evaluation of dense; add baselines.dense", DENSE),
    ),
    PaperClaim(
        "The mixture beats sparse upcycling, on the same data and at the same compute.",
        _beats_all_of("no evaluation of upcycled; add baselines.upcycling-cm", *UPCYCLED),
    ),
    PaperClaim("Without load balancing an expert can die; with it none does.", _balanced),
    PaperClaim(
        "With little finetuning soft routing beats top-2, top-2 sampled top-1, and that switch routing.",
        _routing_order,
    ),
    PaperClaim("Blending experts hurts, and splitting them does not help.", _mixing),
    PaperClaim("Freezing the experts costs nothing.", _frozen),
)
"""All nine, in the paper's order."""
