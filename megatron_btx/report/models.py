"""The models of a run, by role, with what was measured of them; and how they compare.

A run's table of models (models.json) says what each one is. :func:`guess_row` is the only place that reads a name for
it, where a run has no table or an evaluation names what is not in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

from megatron_btx.common.shares import routing_distance
from megatron_btx.recipe.names import (
    AVERAGE_STAGE,
    DENSE_STAGE,
    EXPERT_PREFIX,
    FINETUNE_STAGE,
    MIX_STAGE,
    SEED_STAGE,
)
from megatron_btx.report.quantities import mean
from megatron_btx.report.stages import Stage
from megatron_btx.runner.schemas import LOSS, ModelRow, Score

SEED, EXPERT, AVERAGE, MIX, BTX, TUNED_AVERAGE, DENSE = ROLES = (
    *("seed", "expert", "average", "mix", "btx", "average-finetuned", "dense"),
)
"""In the order of a report; models of other roles come last."""
BASELINES = (DENSE, TUNED_AVERAGE)
"""What is finetuned beside the mixture, which the headline compares with it."""
_STAGES = {SEED: SEED_STAGE, AVERAGE: AVERAGE_STAGE, MIX: MIX_STAGE, BTX: FINETUNE_STAGE, DENSE: DENSE_STAGE}
"""Of a run without a table of models: a model that plays the role of its name -> the stage that makes it."""
_VARIANT = re.compile(r"ablation-(.+)-s(\d{1,9})")
_SAME_SHARE = 1e-12
"""Shares this close are equal: what they differ by is rounding."""


def guess_row(name: str) -> ModelRow:
    """What a model is by its name alone."""
    if name.startswith(EXPERT_PREFIX):
        return ModelRow(name=name, role=EXPERT, home=name.removeprefix(EXPERT_PREFIX), stage=name)
    found = _VARIANT.fullmatch(name)
    if found:
        return ModelRow(name=name, role=BTX, variant=found[1], seed=int(found[2]), stage=name)
    if name in _STAGES:
        return ModelRow(name=name, role=name, stage=_STAGES[name])
    return ModelRow(name=name, role="")


def guess_table(stages: Iterable[str]) -> list[ModelRow]:
    """The table of a run that has none: the variants of its ablation, or the models that a report compares."""
    variants = [row for row in map(guess_row, stages) if row.variant]
    return variants or list(map(guess_row, _STAGES))


@dataclass(frozen=True)
class Model:
    """One model, and what was measured of it."""

    row: ModelRow
    scores: tuple[Score, ...] = ()
    parameters: int | None = None
    active_parameters: int | None = None
    """Parameters that work on one token."""
    routing: Mapping[str, tuple[tuple[float, ...], ...]] | None = None
    """Per domain, per layer: share of the routed (token, expert) pairs per expert. Dense layers have zeros alone."""
    experts: tuple[str, ...] = ()
    """Names of the experts, in the order of the routing shares."""
    top_k: int | None = None
    """Experts that a token takes, by the flags of the evaluation; None where they are not known."""
    stage: Stage | None = None
    """What made it; None of a given model, and where no such stage is there."""
    run: str = ""
    """Its run, where several are compared."""

    @property
    def name(self) -> str:
        """As evaluations call it."""
        return self.row.name

    @property
    def role(self) -> str:
        """What it is, as :data:`ROLES` has it."""
        return self.row.role

    @property
    def label(self) -> str:
        """As tables and figures call it: all seeds of a variant alike."""
        name = self.row.variant or self.name
        if self.run:
            return f"{name} ({self.run})"
        return name

    @property
    def look(self) -> str:
        """What decides its colour: an expert has that of its share of the routing."""
        if self.role == EXPERT and self.row.home:
            return self.row.home
        return self.row.variant or self.role or self.name

    @cached_property
    def losses(self) -> dict[str, float]:
        """Domain -> loss, nats per token; may be NaN."""
        return self.values(LOSS)

    @property
    def tokens(self) -> dict[str, int]:
        """Domain -> evaluated tokens."""
        return {score.data: score.count for score in self.scores if score.measure == LOSS and score.count is not None}

    def values(self, measure: str) -> dict[str, float]:
        """Domain or task -> the value of a measure."""
        return {score.data: score.value for score in self.scores if score.measure == measure}

    def mean_loss(self, domains: Sequence[str]) -> float | None:
        """Unweighted mean over ``domains``, or None when one of them was not evaluated."""
        return self.in_column(LOSS, None, domains)

    def in_column(self, measure: str, column: str | None, columns: Sequence[str]) -> float | None:
        """A value in a column of a table: on a domain, or the mean over ``columns`` in the column None."""
        values = self.values(measure)
        if column is not None:
            return values.get(column)
        found = [values[name] for name in columns if name in values]
        if not found or len(found) < len(columns):
            return None
        return mean(found)

    def chooses_experts(self) -> bool:
        """Whether a token takes some of the experts only. Under soft routing it takes all, and shares say nothing."""
        if self.parameters and self.active_parameters == self.parameters:
            return False
        return self.top_k is None or self.top_k < len(self.experts)

    @property
    def routed_layers(self) -> dict[str, list[tuple[float, ...]]]:
        """Its routing without the dense layers, whose shares are all zero."""
        kept = {}
        for domain, layers in (self.routing or {}).items():
            kept[domain] = [shares for shares in layers if any(shares)]
        return kept


@dataclass(frozen=True)
class Cast:
    """The models of one run."""

    models: tuple[Model, ...]
    """In the report's order, also those of which nothing was measured."""
    domains: tuple[str, ...]

    @property
    def measured(self) -> list[Model]:
        """The models of which something was measured."""
        return [model for model in self.models if model.scores]

    def find(self, role: str) -> Model | None:
        """The model of a role that is no variant of an ablation and was measured."""
        return next((model for model in self.having(role) if not model.row.variant), None)

    def having(self, role: str) -> list[Model]:
        """All models of a role that were measured."""
        return [model for model in self.measured if model.role == role]

    def name_missing(self, *roles: str) -> str:
        """Which of the roles no measured model has, in words; empty when they all have one."""
        absent = [role for role in roles if not self.find(role)]
        if not absent:
            return ""
        return f"no evaluation of {' and '.join(absent)}"

    def variants(self) -> list[Model]:
        """The models that an ablation compares."""
        return [model for model in self.models if model.row.variant]

    def mixtures(self) -> list[Model]:
        """The models whose routing was recorded."""
        return [model for model in self.models if model.routing]


def sort_models(models: Iterable[Model]) -> tuple[Model, ...]:
    """The models in the report's order."""
    order = {role: place for place, role in enumerate(ROLES)}
    return tuple(sorted(models, key=lambda model: order.get(model.role, len(order))))


class Line(NamedTuple):
    """One line of a table: a model, or all seeds of a variant."""

    label: str
    models: list[Model]
    """Those of which something was measured."""
    due: int
    """Of how many."""

    @property
    def name(self) -> str:
        """The label, with the number of seeds where some are missing."""
        if self.is_whole():
            return self.label
        return f"{self.label} ({len(self.models)} of {self.due} seeds)"

    def is_whole(self) -> bool:
        """Whether all seeds are there."""
        return len(self.models) == self.due

    def values(self, measure: str, column: str | None, columns: Sequence[str]) -> list[float]:
        """A value per seed in a column of a table."""
        found = [model.in_column(measure, column, columns) for model in self.models]
        return [value for value in found if value is not None]


def make_lines(cast: Cast) -> list[Line]:
    """A line per model and variant, in the order of the models. Of variants alone also those without a number."""
    lines: dict[str, list[Model]] = {}
    for model in cast.models:
        if model.scores or model.row.variant:
            lines.setdefault(model.label, []).append(model)
    return [Line(label, [one for one in models if one.scores], len(models)) for label, models in lines.items()]


def find_best(lines: Sequence[Line], measure: str, column: str | None, columns: Sequence[str]) -> list[Line]:
    """The lines with the lowest finite value in a column, of those that are whole; several when they are equal."""
    finite = []
    for line in lines:
        values = line.values(measure, column, columns)
        average = mean(values)
        if line.is_whole() and len(values) == line.due and math.isfinite(average):
            finite.append((average, line))
    lowest = min((average for average, _ in finite), default=math.nan)
    return [line for average, line in finite if average == lowest]


Difference = dict[str | None, float | None]
"""By domain, and of the means under None."""


def differences_to(cast: Cast, role: str) -> Difference | None:
    """Loss of the finetuned mixture minus loss of a baseline; None without either model.

    Lower is better for the mixture. It is no fact: it is reported as it comes.
    """
    mixture, baseline = cast.find(BTX), cast.find(role)
    if mixture is None or baseline is None:
        return None
    differences: Difference = {}
    for column in (*cast.domains, None):
        own = mixture.in_column(LOSS, column, cast.domains)
        differences[column] = subtract(own, baseline.in_column(LOSS, column, cast.domains))
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
    routing = model.routed_layers
    distances = {}
    for first, second in combinations(routing, 2):
        distances[first, second] = routing_distance(routing[first], routing[second])
    return distances


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
    for domain, layers in model.routed_layers.items():
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
