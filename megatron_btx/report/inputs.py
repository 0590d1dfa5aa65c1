"""What a run left behind, read for its report: models with their scores, stages and the data statement.

Nothing here judges or draws. A part that is missing becomes a note, so that the report can say what is absent. A part
that is there and cannot be read is an :class:`InputError`, because a report that silently leaves out a number is worse
than none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import read_json_object
from megatron_btx.recipe.names import (
    DATA_STAGE,
    DATASETS_FILE,
    DENSE_DOMAINS_STAGE,
    EVALUATION_FILE,
    EXPERT_PREFIX,
    RECIPE_FILE,
    REPORT_STAGE,
    VALID_SPLIT,
    is_set_aside,
)
from megatron_btx.report.models import (
    AVERAGE,
    BTX,
    DENSE,
    EXPERT,
    MIX,
    TUNED_AVERAGE,
    Cast,
    Model,
    guess_row,
    guess_table,
    sort_models,
)
from megatron_btx.report.stages import MEAN, Stage, find_left_out, read_stage, sum_tokens
from megatron_btx.runner.run_dir import make_loss, read_evaluation, read_model_table, read_plan, read_yaml
from megatron_btx.runner.schemas import ModelRow, Score


@dataclass(frozen=True)
class DatasetRow:
    """One split of one domain."""

    domain: str
    split: str
    documents: int | None
    tokens: int | None
    size_bytes: int | None
    """Of the files that it is made of; None where they were split by shares."""


@dataclass(frozen=True)
class Datasets:
    """What datasets.json states; nothing of a run that was given its datasets."""

    rows: tuple[DatasetRow, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    """The tokenizer's flags, the seed of the split, and the texts of every domain, in words."""


@dataclass(frozen=True)
class RunData(Cast):
    """Everything the report of a run is computed from."""

    name: str
    stages: tuple[Stage, ...]
    datasets: Datasets
    notes: tuple[str, ...] = ()
    """What is absent, or broken; one sentence each."""
    marked: tuple[str, ...] = ()
    """What was left out or went a part of its way only; one sentence each."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """As recipe.yaml has it; empty where there is none."""
    on_split: str = ""
    """" on the test split", or what the losses are of; empty where nothing says it."""
    planned: frozenset[str] | None = None
    """The stages that the recipe asks for; None where nothing says it."""

    def asks_for(self, stage: str) -> bool:
        """Whether the recipe asks for a stage, as far as that is known."""
        return self.planned is None or stage in self.planned

    def tokens_after_seed(self, role: str) -> float | None:
        """Tokens that a finetuned model and all it is made from consumed after the seed; None where that is unknown."""
        known = {stage.name: stage for stage in self.stages}
        first = {BTX: self._stage_of(MIX), DENSE: DENSE_DOMAINS_STAGE, TUNED_AVERAGE: self._stage_of(AVERAGE)}
        return sum_tokens(self._stage_of(role), known, first[role])

    def had_equal_tokens(self, role: str) -> bool:
        """Whether a baseline was trained on as many tokens as the mixture, and both are known."""
        tokens = self.tokens_after_seed(BTX)
        return tokens is not None and tokens == self.tokens_after_seed(role)

    def _stage_of(self, role: str) -> str:
        for model in self.models:
            if model.role == role and not model.row.variant and model.row.stage:
                return model.row.stage
        return guess_row(role).stage or ""


def read_run(run: Path) -> RunData:
    """Read the run directory ``run``. Raises InputError when it is none, or when a file in it is broken."""
    if not run.is_dir():
        raise InputError(f"{run}: no such directory; expected a run directory such as runs/quickstart, made by btx run")
    folders = [path for path in sorted(run.iterdir()) if path.is_dir() and path.name != REPORT_STAGE]
    folders = [folder for folder in folders if not is_set_aside(folder.name)]
    found = {stage.name: stage for stage in map(read_stage, folders) if stage is not None}
    plan = read_plan(run)
    reasons = find_left_out(plan, {name: stage.manifest for name, stage in found.items()})
    stages = {name: stage for name, stage in found.items() if name not in reasons}
    files = [folder / EVALUATION_FILE for folder in folders if folder.name not in reasons]
    evaluations = [file for file in files if file.is_file()]
    planned = None if plan is None else [entry.stage for entry in plan]
    recipe = read_yaml(run / RECIPE_FILE)
    table = read_model_table(run)
    if table is None:
        table = guess_table(stages if planned is None else planned)
    models = _read_models(table, evaluations, stages)
    datasets = Datasets()
    if DATA_STAGE not in reasons:
        datasets = read_datasets(run / DATA_STAGE / DATASETS_FILE)
    if not found and not evaluations and not datasets.rows:
        raise InputError(
            f"{run}: not a run directory: no */manifest.json, */metrics.jsonl, */evaluation.json or data/datasets.json "
            "in it; give the directory that btx run made, or run the recipe first"
        )
    data = RunData(
        models,
        collect_domains(models),
        run.resolve().name,
        tuple(stages.values()),
        datasets,
        recipe=recipe,
        on_split=_say_split(recipe),
        planned=None if planned is None else frozenset(planned),
    )
    return replace(data, marked=tuple(_marks(data, reasons)), notes=tuple(_notes(data)))


def collect_domains(models: Sequence[Model]) -> tuple[str, ...]:
    """Every domain on which a model has a loss."""
    return tuple(dict.fromkeys(chain.from_iterable(model.losses for model in models)))


def join_runs(runs: Sequence[RunData]) -> Cast:
    """The models of one run, or of several side by side."""
    if len(runs) == 1:
        return runs[0]
    models = [replace(model, run=run.name) for run in runs for model in run.models]
    names = list(dict.fromkeys(model.name for model in models))
    models.sort(key=lambda model: names.index(model.name))  # stable: of one name in the order of the runs
    return Cast(sort_models(models), collect_domains(models))


def _say_split(recipe: Mapping[str, Any]) -> str:
    """Of which split the losses are, by the run's recipe: " on the test split"; empty where it does not say."""
    for section in ("evaluate", "ablation"):
        if isinstance(recipe.get(section), dict):
            return f" on the {recipe[section].get('split', VALID_SPLIT)} split"
    return ""


def _read_models(
    table: Sequence[ModelRow], evaluations: Sequence[Path], stages: Mapping[str, Stage]
) -> tuple[Model, ...]:
    """The models of the table and of the evaluations, in the report's order.

    Raises:
        InputError: a file is broken, or two of them have the same score of a model.
    """
    models = {row.name: Model(row, stage=stages.get(row.stage or "")) for row in table}
    sources: dict[tuple[str, str, str], Path] = {}
    for file in evaluations:
        evaluation = read_evaluation(file)
        experts = tuple(evaluation.experts or ())
        for name, found in evaluation.models.items():
            scores = [score for score in evaluation.scores if score.model == name]
            for score in scores:
                place = (name, score.measure, score.data)
                if place in sources:
                    raise InputError(f"{file}: model {name!r} is in {sources[place]}, too; remove one")
                sources[place] = file
            if name not in models:
                row = guess_row(name)
                models[name] = Model(row, stage=stages.get(row.stage or ""))
            known = models[name]
            stated: dict[str, Any] = {"scores": (*known.scores, *scores)}
            if found.parameters is not None:
                stated |= {"parameters": found.parameters, "active_parameters": found.active_parameters}
            if found.routing:
                if any(len(shares) != len(experts) for shares in chain.from_iterable(found.routing.values())):
                    raise InputError(
                        f"{file}: model {name!r}: routing is not of {len(experts)} experts; evaluate again"
                    )
                stated |= {"routing": found.routing, "experts": experts}
            models[name] = replace(known, **stated)
    for name, model in models.items():
        if model.row.variant and not model.scores:
            models[name] = replace(model, scores=_last_scores(model))
    return sort_models(models.values())


def _last_scores(model: Model) -> tuple[Score, ...]:
    """The losses after the last step of what made a variant, which no stage of its own evaluates."""
    stage = model.stage
    if stage is None or stage.unfinished or MEAN not in stage.log.watched:
        return ()
    curves = {domain: curve for domain, curve in stage.log.watched.items() if domain != MEAN}
    return tuple(make_loss(model.name, domain, curve[-1][1], None) for domain, curve in curves.items())


def _marks(data: RunData, reasons: Mapping[str, str]) -> Iterator[str]:
    """What the report leaves out, and what it shows in part."""
    left_out: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        left_out.setdefault(reason, []).append(name)
    for reason, names in left_out.items():
        yield f"Left out: {', '.join(names)}: {reason}."
    unfinished = [stage for stage in data.stages if stage.unfinished]
    for stage in unfinished:
        shown = "Its curve, tokens and FLOPs are those up to there."
        yield f"Stage {stage.name} is unfinished: {stage.unfinished}. {shown}"
    for stage in unfinished:
        made = [other for other in data.stages if stage.name in other.manifest.parents]
        earlier = [other.name for other in made if not other.unfinished]
        if earlier:
            yield f"Made before {stage.name} started again: {', '.join(earlier)}."
    for model in data.variants():
        if model.scores or model.row.stage in reasons or (model.stage is not None and model.stage.unfinished):
            continue
        if model.stage is None:
            yield f"{model.name}: has not run."
        else:
            yield f"{model.name}: holds no loss per domain, so that it has not come to its end."


def _notes(data: RunData) -> Iterator[str]:
    if not data.variants():
        for model in data.models:
            if not model.scores and data.asks_for(model.row.stage or model.name):
                yield f"No evaluation of a model named {model.name}."
        if not data.having(EXPERT):
            yield f"No evaluation of single experts (models named {EXPERT_PREFIX}<domain>)."
    for model in data.models:
        for domain, loss in model.losses.items():
            if not math.isfinite(loss):
                yield f"The loss of {model.name} on {domain} is not a finite number: {loss}."
    if not data.mixtures() and not data.variants():
        yield "No routing was recorded."
    for stage in data.stages:
        if stage.written is None:
            yield f"Stage {stage.name} has a loss curve and no manifest: it is unfinished, or was stopped."
        broken = sum(not math.isfinite(loss) for _, loss in stage.log.curve)
        if broken:
            yield f"Stage {stage.name}: the training loss is not a finite number at {broken} iterations."
    if not any(stage.log.curve for stage in data.stages):
        yield "No loss curves: no stage of this run trained."
    if not data.datasets.rows and data.asks_for(DATA_STAGE):
        yield "No data statement (data/datasets.json): the datasets were given, or an older version made them."


# --- the data statement ---------------------------------------------------------------------------------------

_REMEDY = "run the stage that writes it again"


def read_datasets(file: Path) -> Datasets:
    """The data statement in ``file``; an empty one when there is no such file. Raises InputError when it is broken."""
    if not file.is_file():
        return Datasets()
    content = read_json_object(file, _REMEDY)
    try:
        rows = []
        for domain, splits in content["domains"].items():
            for split, sizes in splits.items():
                own_files = content["sources"][domain].get(split, {})
                row = DatasetRow(domain, split, sizes.get("documents"), sizes.get("tokens"), own_files.get("bytes"))
                rows.append(row)
        return Datasets(tuple(rows), _read_sources(content))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: is no data statement of btx datasets ({error!r}); {_REMEDY}") from error


def _read_sources(content: dict[str, Any]) -> dict[str, str]:
    sources = {flag: name_path(value) for flag, value in content["tokenizer"].items()}
    for domain, texts in content["sources"].items():
        for source, text in texts.items():
            files = list(map(name_path, text["files"]))
            said = f"{len(files)} file(s), {text['bytes']:,} bytes"
            if source == "text":  # whose documents were split by shares
                said += f", split by shares with seed {content['seed']}"
            if len(files) > 2:
                files[1:-1] = ["…"]
            sources[f"{domain}: {source}"] = f"{said}: {', '.join(files)}"
    return sources


def name_path(value: object) -> str:
    """A value as text; of a path the last part, because a report is read elsewhere."""
    if os.path.isabs(text := str(value)):
        return Path(text).name
    return text
