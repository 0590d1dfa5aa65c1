"""What the finetunings of an ablation came to, read from the metrics of their stages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.folder import PLAN_FILE, RECIPE_FILE, read_plan
from megatron_btx.pipeline.recipe.ablation import stage_name
from megatron_btx.report.numbers import mean
from megatron_btx.report.stages import Stage, left_out, read_json, read_stage

LOSS = "lm loss validation "
MEAN = "mean"
_LOAD = re.compile(r"moe/load_layer_(\d{1,6})_expert_(\d{1,6})")


@dataclass(frozen=True)
class Outcome:
    """What one finetuning came to."""

    losses: Mapping[str, float]
    """Nats per token by domain, and their mean, after the last step; may be NaN."""
    loads: list[list[float]]
    """Share of a layer's choices per expert, over the last logged interval."""
    dead: int | None
    """(layer, expert) cells under 1 % of an even load over that interval; None when no number was logged."""
    dropped: float
    """Share of choices dropped there, mean over layers; NaN when none was logged."""


@dataclass(frozen=True)
class Outcomes:
    """Everything the report of an ablation is computed from."""

    runs: Mapping[str, Mapping[int, Outcome]]
    """Variant -> seed -> outcome of the stages that came to their end, in the recipe's order."""
    seeds: Mapping[str, tuple[int, ...]]
    """Variant -> all its seeds."""
    notes: tuple[str, ...] = field(default=())
    """Which stages are absent from ``runs``, and why; one sentence each."""

    def is_whole(self, variant: str) -> bool:
        """Whether all seeds of a variant came to their end."""
        return len(self.runs.get(variant, ())) == len(self.seeds[variant])


def is_ablation(run: Path) -> bool:
    """Whether ``run`` is the directory of an ablation's run."""
    recipe = run / RECIPE_FILE
    return recipe.is_file() and bool(_read_recipe(recipe).get("ablation"))


def read_outcomes(run: Path) -> Outcomes:
    """The outcomes in the directory ``run``.

    Raises:
        InputError: no ablation's run, or none of its stages has come to its end.
    """
    recipe = run / RECIPE_FILE
    if not recipe.is_file():
        raise InputError(f"{recipe}: does not exist; expected the directory of an ablation's run")
    section = _read_recipe(recipe).get("ablation")
    if not section:
        raise InputError(f"{recipe}: has no ablation; its report is btx report {run}")
    seeds = _seeds(recipe, section, read_plan(run / PLAN_FILE))
    stages = {name: _stage(run / name) for variant in seeds for name in _stages_of(variant, seeds)}
    manifests = {name: stage.manifest for name, stage in stages.items() if stage is not None}
    reasons = left_out(run, manifests | _manifests_beside(run, manifests))
    runs: dict[str, dict[int, Outcome]] = {}
    notes: list[str] = []
    for variant in seeds:
        for seed in seeds[variant]:
            name = stage_name(variant, seed)
            found = reasons.get(name) or _outcome(run / name / "metrics.jsonl", stages[name])
            if isinstance(found, Outcome):
                runs.setdefault(variant, {})[seed] = found
            else:
                notes.append(f"{name}: {found}.")
    if not runs:
        raise InputError(f"{run}: no stage of its ablation has come to its end: {' '.join(notes[:3])}")
    _check_alike(run, runs)
    return Outcomes(runs, seeds, tuple(notes))


def _read_recipe(recipe: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{recipe}: broken YAML ({error}); btx run writes it again") from error
    return tree if isinstance(tree, dict) else {}


def _seeds(recipe: Path, section: Any, plan: list[dict[str, Any]] | None) -> dict[str, tuple[int, ...]]:
    """Variant -> its seeds, of those that were planned: a variant without a setting may have been taken back."""
    variants = section.get("variants") if isinstance(section, dict) else None
    if not isinstance(variants, dict):
        raise InputError(f"{recipe}: ablation: no mapping 'variants' in it; expected the recipe that btx run wrote")
    planned = None if plan is None else {str(entry["stage"]) for entry in plan}
    seeds: dict[str, tuple[int, ...]] = {}
    for name, settings in variants.items():
        own = settings.get("seeds") if isinstance(settings, dict) else None
        listed = own or section.get("seeds")
        if not isinstance(listed, list) or not all(type(seed) is int for seed in listed):
            raise InputError(f"{recipe}: ablation.variants.{name}: no list of seeds; expected the recipe btx run wrote")
        due = [seed for seed in listed if planned is None or stage_name(str(name), seed) in planned]
        if due:
            seeds[str(name)] = tuple(due)
    if not seeds:
        raise InputError(f"{recipe}: ablation: the run's {PLAN_FILE} has none of its variants; run the recipe again")
    return seeds


def _stages_of(variant: str, seeds: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for seed in seeds[variant]:
        yield stage_name(variant, seed)


def _stage(folder: Path) -> Stage | None:
    return read_stage(folder) if folder.is_dir() else None


def _manifests_beside(run: Path, known: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """Manifests of the stages that the finetunings are made from."""
    files = sorted(run.glob("*/manifest.json"))
    return {file.parent.name: read_json(file) for file in files if file.parent.name not in known and file.is_file()}


def _outcome(file: Path, stage: Stage | None) -> Outcome | str:
    """The last values of each kind that a stage logged; or why there are none that could be compared."""
    if stage is None or not file.is_file():
        return "has not run"
    if stage.unfinished:
        return f"is unfinished, {stage.unfinished}"
    last: dict[str, Any] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill; the run went on after it
            continue
        if isinstance(values, dict):
            last |= {name: float(value) for name, value in values.items() if _is_number(value)}
    losses = {name.removeprefix(LOSS): value for name, value in last.items() if name.startswith(LOSS)}
    cells = {(int(m[1]), int(m[2])): value for name, value in last.items() if (m := _LOAD.fullmatch(name))}
    if MEAN not in losses or not cells or "moe/dead_experts" not in last:
        return "holds no validation loss per domain or no routing, so that it has not come to its end"
    layers, experts = sorted({layer for layer, _ in cells}), sorted({expert for _, expert in cells})
    if len(cells) != len(layers) * len(experts):
        return "logged the load of some experts only"
    dead = last["moe/dead_experts"]
    dropped = [value for name, value in last.items() if name.startswith("moe/dropped_layer_")]
    return Outcome(
        losses,
        [[cells[layer, expert] for expert in experts] for layer in layers],
        int(dead) if abs(dead) < 2**53 else None,  # not for NaN, which is below nothing
        mean(dropped),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1000)


def _check_alike(run: Path, runs: Mapping[str, Mapping[int, Outcome]]) -> None:
    """Refuse outcomes on other domains, or of other models, which one table cannot show."""
    shapes = {
        (tuple(sorted(outcome.losses)), len(outcome.loads), len(outcome.loads[0]))
        for variant in runs.values()
        for outcome in variant.values()
    }
    if len(shapes) > 1:
        raise InputError(f"{run}: its stages differ in their domains, layers or experts; run the ablation again")
