"""What a run left behind, read for its report: evaluations, stages and the data statement.

Nothing here judges or draws. A part that is missing becomes a note, so that the report can say what is absent. A part
that is there and cannot be read is an :class:`InputError`, because a report that silently leaves out a number is worse
than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from megatron_btx.common.errors import InputError
from megatron_btx.recipe.names import (
    AVERAGE_MODEL,
    BTX_MODEL,
    DATA_STAGE,
    DATASETS_FILE,
    DENSE_MODEL,
    EVALUATE_EXPERTS_STAGE,
    EVALUATION_FILE,
    EVALUATION_PREFIX,
    EXPERT_PREFIX,
    MIX_MODEL,
    RECIPE_FILE,
    REPORT_STAGE,
    SEED_MODEL,
    is_set_aside,
)
from megatron_btx.report.datasets import Datasets, read_datasets
from megatron_btx.report.quantities import mean
from megatron_btx.report.stages import Stage, read_stage, say_split
from megatron_btx.report.stale import find_left_out, planned_fingerprints
from megatron_btx.runner.run_dir import read_evaluation, read_yaml

SEED, AVERAGE, MIX, BTX, DENSE = SEED_MODEL, AVERAGE_MODEL, MIX_MODEL, BTX_MODEL, DENSE_MODEL
_ORDER = {SEED: 0, AVERAGE: 2, MIX: 3, BTX: 4, DENSE: 5}
"""Models of well-known names in the report's order; single experts stand at 1, all others last."""
_MIXTURES = f"{EVALUATION_PREFIX}moe"
_ASKED_BY = {SEED: EVALUATE_EXPERTS_STAGE, AVERAGE: AVERAGE, MIX: _MIXTURES, BTX: _MIXTURES, DENSE: DENSE}
"""Model -> the stage that a plan has when the recipe wants its losses."""


@dataclass(frozen=True)
class Model:
    """One evaluated model."""

    name: str
    losses: Mapping[str, float]
    """Loss per domain, nats per token; may be NaN."""
    tokens: Mapping[str, int]
    """Evaluated tokens per domain."""
    parameters: int | None = None
    active_parameters: int | None = None
    """Parameters that work on one token."""
    routing: Mapping[str, tuple[tuple[float, ...], ...]] | None = None
    """Per domain, per layer: share of the routed (token, expert) pairs per expert. Dense layers have zeros alone."""
    experts: tuple[str, ...] = ()
    """Names of the experts, in the order of the routing shares."""
    top_k: int | None = None
    """Experts that a token takes, by the flags of the evaluation; None where they are not known."""

    def mean_loss(self, domains: tuple[str, ...]) -> float | None:
        """Unweighted mean over ``domains``, or None when one of them was not evaluated."""
        losses = [self.losses[domain] for domain in domains if domain in self.losses]
        if not losses or len(losses) < len(domains):
            return None
        return mean(losses)

    def is_expert(self) -> bool:
        """Whether it is a single expert."""
        return self.name.startswith(EXPERT_PREFIX)

    def chooses_experts(self) -> bool:
        """Whether a token takes some of the experts only. Under soft routing it takes all, and shares say nothing."""
        if self.parameters and self.active_parameters == self.parameters:
            return False
        return self.top_k is None or self.top_k < len(self.experts)


@dataclass(frozen=True)
class RunData:
    """Everything the report is computed from."""

    name: str
    models: Mapping[str, Model]
    domains: tuple[str, ...]
    stages: tuple[Stage, ...]
    datasets: Datasets
    notes: tuple[str, ...] = ()
    """What is absent, or broken; one sentence each."""
    marked: tuple[str, ...] = ()
    """What was left out or went a part of its way only; one sentence each."""
    on_split: str = ""
    """" on the test split", or what the losses are of; empty where nothing says it."""
    planned: Mapping[str, object] | None = None
    """By name the stages that the recipe asks for; None where nothing says it."""

    def asks_for(self, stage: str) -> bool:
        """Whether the recipe asks for a stage, as far as that is known."""
        return self.planned is None or stage in self.planned

    def mixtures(self) -> list[Model]:
        """The models whose routing was recorded."""
        return [model for model in self.models.values() if model.routing]


def read_run(run: Path) -> RunData:
    """Read the run directory ``run``. Raises InputError when it is none, or when a file in it is broken."""
    if not run.is_dir():
        raise InputError(f"{run}: no such directory; expected a run directory such as runs/quickstart, made by btx run")
    folders = [path for path in sorted(run.iterdir()) if path.is_dir() and path.name != REPORT_STAGE]
    folders = [folder for folder in folders if not is_set_aside(folder.name)]
    found: dict[str, Stage] = {}
    for folder in folders:
        stage = read_stage(folder)
        if stage is not None:
            found[folder.name] = stage
    manifests = {name: stage.manifest for name, stage in found.items()}
    reasons = find_left_out(run, manifests)
    stages = [stage for name, stage in found.items() if name not in reasons]
    evaluations = [folder / EVALUATION_FILE for folder in folders if folder.name not in reasons]
    evaluations = [file for file in evaluations if file.is_file()]
    models = _read_models(evaluations, found)
    datasets = Datasets((), {})
    if DATA_STAGE not in reasons:
        datasets = read_datasets(run / DATA_STAGE / DATASETS_FILE)
    if not found and not models and not datasets.rows:
        raise InputError(
            f"{run}: not a run directory: no */manifest.json, */metrics.jsonl, */evaluation.json or data/datasets.json "
            "in it; give the directory that btx run made, or run the recipe first"
        )
    planned = planned_fingerprints(run)
    strange: list[str] = []
    if planned is not None:
        strange = [file.parent.name for file in evaluations if file.parent.name not in found]
    data = RunData(
        run.resolve().name,
        models,
        tuple(dict.fromkeys(chain.from_iterable(model.losses for model in models.values()))),
        tuple(stages),
        datasets,
        marked=tuple(_marks(reasons, stages, strange)),
        on_split=say_split(read_yaml(run / RECIPE_FILE), "evaluate"),
        planned=planned,
    )
    return replace(data, notes=tuple(_notes(data)))


def _read_models(evaluations: list[Path], stages: Mapping[str, Stage]) -> dict[str, Model]:
    """The evaluated models by name, in the report's order.

    Raises:
        InputError: a file is broken, or two of them have a model of one name.
    """
    models: dict[str, Model] = {}
    sources: dict[str, Path] = {}
    for file in evaluations:
        for model in _read_models_in(file, _read_top_k(stages.get(file.parent.name))):
            if model.name in models:
                raise InputError(f"{file}: model {model.name!r} is in {sources[model.name]}, too; remove one")
            models[model.name], sources[model.name] = model, file
    return {name: models[name] for name in sorted(models, key=_rank)}


def _read_top_k(stage: Stage | None) -> int | None:
    """How many experts a token takes, by the settings of the stage that evaluated."""
    if stage is not None and str(stage.settings.get("moe-router-topk")).isdecimal():
        return int(stage.settings["moe-router-topk"])  # from a text where it is a given mixture's own
    return None


def _read_models_in(file: Path, top_k: int | None) -> list[Model]:
    evaluation = read_evaluation(file)
    experts = tuple(evaluation.experts or ())
    models = []
    for name, found in evaluation.models.items():
        routing = {}
        for domain, layers in (found.routing or {}).items():
            routing[domain] = tuple(map(tuple, layers))
            for shares in layers:
                if len(shares) != len(experts):
                    raise InputError(
                        f"{file}: model {name!r}: routing is not of {len(experts)} experts; evaluate again"
                    )
        names: tuple[str, ...] = ()
        if routing:
            names = experts
        parameters, active = found.parameters, found.active_parameters
        models.append(Model(name, found.losses, found.tokens, parameters, active, routing or None, names, top_k))
    return models


def _rank(name: str) -> int:
    if name.startswith(EXPERT_PREFIX):
        return 1
    return _ORDER.get(name, len(_ORDER) + 1)


def _marks(reasons: Mapping[str, str], stages: list[Stage], strange: list[str]) -> Iterator[str]:
    """What the report leaves out, what it shows in part, and evaluations that no stage of the run made."""
    left_out: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        left_out.setdefault(reason, []).append(name)
    for reason, names in left_out.items():
        yield f"Left out: {', '.join(names)}: {reason}."
    unfinished = [stage for stage in stages if stage.unfinished]
    finished = [stage for stage in stages if not stage.unfinished]
    for stage in unfinished:
        yield (
            f"Stage {stage.name} is unfinished: {stage.unfinished}. Its curve, tokens and FLOPs are those up to there."
        )
    for stage in unfinished:
        earlier = [other.name for other in finished if stage.name in other.parents]
        if earlier:
            yield f"Made before {stage.name} started again: {', '.join(earlier)}."
    for name in strange:
        yield f"{name}/evaluation.json has no manifest: nothing says of which models it is."


def _notes(data: RunData) -> Iterator[str]:
    models, stages = data.models, data.stages
    for name in _ORDER:
        if name not in models and data.asks_for(_ASKED_BY[name]):
            yield f"No evaluation of a model named {name}."
    if not any(map(Model.is_expert, models.values())):
        yield f"No evaluation of single experts (models named {EXPERT_PREFIX}<domain>)."
    for model in models.values():
        for domain, loss in model.losses.items():
            if not math.isfinite(loss):
                yield f"The loss of {model.name} on {domain} is not a finite number: {loss}."
    if not any(model.routing for model in models.values()):
        yield "No routing was recorded."
    for stage in stages:
        if stage.manifest is None:
            yield f"Stage {stage.name} has a loss curve and no manifest: it is unfinished, or was stopped."
        broken = stage.count_broken_losses()
        if broken:
            yield f"Stage {stage.name}: the training loss is not a finite number at {broken} iterations."
    if not any(stage.curve for stage in stages):
        yield "No loss curves: no stage of this run trained."
    if not data.datasets.rows and data.asks_for(DATA_STAGE):
        yield "No data statement (data/datasets.json): the datasets were given, or an older version made them."
