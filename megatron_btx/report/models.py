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
from megatron_btx.report.stages import MEAN, Stage
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
    routing: Mapping[str, Sequence[Sequence[float]]] | None = None
    """Per domain, per layer: share of the routed (token, expert) pairs per expert. Dense layers have zeros alone."""
    experts: tuple[str, ...] = ()
    """Names of the experts, in the order of the routing shares."""
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

    def mean_of(self, measure: str, data: Sequence[str]) -> float | None:
        """Unweighted mean of a measure over domains or tasks; None without any, and when one of them has no value."""
        values = self.values(measure)
        found = [values[name] for name in data if name in values]
        if not found or len(found) < len(data):
            return None
        return mean(found)

    def mean_loss(self, domains: Sequence[str]) -> float | None:
        """Its mean loss over ``domains``."""
        return self.mean_of(LOSS, domains)

    def chooses_experts(self) -> bool:
        """Whether a token takes some of the experts only. Under soft routing it takes all, and shares say nothing."""
        return not self.parameters or self.active_parameters != self.parameters

    @property
    def routed_layers(self) -> dict[str, list[Sequence[float]]]:
        """Its routing without the dense layers, whose shares are all zero."""
        kept = {}
        for domain, layers in (self.routing or {}).items():
            kept[domain] = [shares for shares in layers if any(shares)]
        return kept


class UncheckedError(Exception):
    """A claim cannot be checked; the text says why."""


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

    def loss(self, role: str, domain: str = MEAN) -> float | None:
        """The loss of the model of a role on a domain, or over all of them; None where there is none."""
        model = self.find(role)
        if model is None:
            return None
        return model.mean_loss(self.domains) if domain == MEAN else model.losses.get(domain)

    def having(self, role: str) -> list[Model]:
        """All models of a role that were measured."""
        return [model for model in self.measured if model.role == role]

    def need(self, *roles: str) -> list[Model]:
        """The models of roles, as :meth:`find` has them. Raises UncheckedError, which names the roles without one."""
        absent = [role for role in roles if not self.find(role)]
        if absent:
            raise UncheckedError(f"no evaluation of {' and '.join(absent)}")
        return list(filter(None, map(self.find, roles)))

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

    def values(self, measure: str, data: Sequence[str]) -> list[float]:
        """The mean of a measure over domains or tasks, a value per seed that has it."""
        found = [model.mean_of(measure, data) for model in self.models]
        return [value for value in found if value is not None]


def make_lines(cast: Cast) -> list[Line]:
    """A line per model and variant, in the order of the models. Of variants alone also those without a number."""
    lines: dict[str, list[Model]] = {}
    for model in cast.models:
        if model.scores or model.row.variant:
            lines.setdefault(model.label, []).append(model)
    return [Line(label, [one for one in models if one.scores], len(models)) for label, models in lines.items()]


def find_best(lines: Sequence[Line], data: Sequence[str]) -> list[Line]:
    """The lines with the lowest finite mean loss, of those that are whole; several when they are equal."""
    finite = []
    for line in lines:
        values = line.values(LOSS, data)
        average = mean(values)
        if line.is_whole() and len(values) == line.due and math.isfinite(average):
            finite.append((average, line))
    lowest = min((average for average, _ in finite), default=math.nan)
    return [line for average, line in finite if average == lowest]


class Difference(NamedTuple):
    """What two models differ by; None where one of them has no loss."""

    mean: float | None
    domains: dict[str, float | None]


def differences_to(cast: Cast, role: str) -> Difference | None:
    """Loss of the finetuned mixture minus loss of a baseline; None without either model.

    Lower is better for the mixture. It is no fact: it is reported as it comes.
    """
    mixture, baseline = cast.find(BTX), cast.find(role)
    if mixture is None or baseline is None:
        return None
    by_domain = {domain: subtract(mixture.losses.get(domain), baseline.losses.get(domain)) for domain in cast.domains}
    return Difference(subtract(cast.loss(BTX), cast.loss(role)), by_domain)


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
