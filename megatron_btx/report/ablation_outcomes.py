"""What the finetunings of an ablation came to, read from the metrics of their stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_btx.common.errors import InputError
from megatron_btx.recipe.names import MANIFEST_FILE, METRICS_FILE, PLAN_FILE, RECIPE_FILE
from megatron_btx.report.quantities import mean
from megatron_btx.report.stages import Stage, read_stage, say_split
from megatron_btx.report.stale import find_left_out, planned_fingerprints
from megatron_btx.runner.run_dir import read_metrics, read_stage_manifest, read_yaml
from megatron_btx.runner.schemas import StageManifest

MEAN = "mean"
_LOSS = "lm loss validation "
_LOAD = re.compile(r"moe/load_layer_(\d{1,6})_expert_(\d{1,6})")
_DROPPED = "moe/dropped_layer_"
_DEAD = "moe/dead_experts"


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
    notes: tuple[str, ...] = ()
    """Which stages are absent from ``runs``, and why; one sentence each."""
    on_split: str = ""
    """" on the test split", or what the losses are of."""

    def is_whole(self, variant: str) -> bool:
        """Whether all seeds of a variant came to their end."""
        return len(self.runs.get(variant, ())) == len(self.seeds[variant])

    def first(self) -> Outcome:
        """One of the outcomes; all have the same domains, layers and experts."""
        return list(list(self.runs.values())[0].values())[0]

    def domains(self) -> list[str]:
        """The domains, and the mean behind them."""
        domains = [domain for domain in self.first().losses if domain != MEAN]
        return [*domains, MEAN]

    def all_seeds(self) -> list[int]:
        """Every seed of some variant."""
        return sorted(set[int]().union(*self.seeds.values()))


def losses_over_seeds(runs: Mapping[int, Outcome], domain: str) -> list[float]:
    """A variant's losses on a domain, or their mean over domains."""
    return [outcome.losses[domain] for outcome in runs.values()]


def is_ablation(run: Path) -> bool:
    """Whether ``run`` is the directory of an ablation's run."""
    return bool(read_yaml(run / RECIPE_FILE).get("ablation"))


def read_outcomes(run: Path) -> Outcomes:
    """The outcomes in the directory ``run``.

    Raises:
        InputError: no ablation's run, or none of its stages has come to its end.
    """
    seeds = _read_seeds(run)
    named = {stage_name(variant, seed): (variant, seed) for variant, own in seeds.items() for seed in own}
    stages = {name: read_stage(run / name) for name in named}
    reasons = find_left_out(run, _read_manifests(run, stages))
    runs: dict[str, dict[int, Outcome]] = {}
    notes: list[str] = []
    for name, (variant, seed) in named.items():
        found = reasons.get(name) or _read_outcome(run / name / METRICS_FILE, stages[name])
        if isinstance(found, Outcome):
            runs.setdefault(variant, {})[seed] = found
        else:
            notes.append(f"{name}: {found}.")
    if not runs:
        raise InputError(f"{run}: no stage of its ablation has come to its end: {' '.join(notes[:3])}")
    _check_alike(run, runs)
    return Outcomes(runs, seeds, tuple(notes), say_split(read_yaml(run / RECIPE_FILE), "ablation"))


def _read_seeds(run: Path) -> dict[str, tuple[int, ...]]:
    """Variant -> its seeds, of those that were planned: a variant without a setting may have been taken back."""
    recipe = run / RECIPE_FILE
    if not recipe.is_file():
        raise InputError(f"{recipe}: does not exist; expected the directory of an ablation's run")
    section = read_yaml(recipe).get("ablation")
    if not section:
        raise InputError(f"{recipe}: has no ablation; its report is btx report {run}")
    planned = planned_fingerprints(run)
    seeds: dict[str, tuple[int, ...]] = {}
    try:
        for variant, settings in section["variants"].items():
            own = (settings or {}).get("seeds") or section["seeds"]
            due = tuple(seed for seed in own if planned is None or stage_name(variant, seed) in planned)
            if due:
                seeds[str(variant)] = due
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{recipe}: ablation: variants and their seeds are not there ({error!r}); expected the recipe that btx run "
            "wrote"
        ) from error
    if not seeds:
        raise InputError(f"{recipe}: ablation: the run's {PLAN_FILE} has none of its variants; run the recipe again")
    return seeds


def _read_manifests(run: Path, stages: Mapping[str, Stage | None]) -> dict[str, StageManifest | None]:
    """Manifests of the finetunings, and of the stages that they are made from."""
    manifests = {name: stage.manifest for name, stage in stages.items() if stage is not None}
    for file in sorted(run.glob(f"*/{MANIFEST_FILE}")):
        if file.parent.name not in manifests and file.is_file():
            manifests[file.parent.name] = read_stage_manifest(file.parent)
    return manifests


def _read_outcome(file: Path, stage: Stage | None) -> Outcome | str:
    """The last values of each kind that a stage logged; or why there are none that could be compared."""
    if stage is None or not file.is_file():
        return "has not run"
    if stage.unfinished:
        return f"is unfinished, {stage.unfinished}"
    last = dict(chain.from_iterable(line.numbers() for line in read_metrics(file)))
    losses = _values_under(last, _LOSS)
    if MEAN not in losses or _DEAD not in last:
        return "holds no loss per domain or no routing, so that it has not come to its end"
    loads = _tabulate_loads(last)
    if not loads:
        return "logged the load of some experts only, or of none"
    dead = None
    if abs(last[_DEAD]) < 2**53:  # not for NaN, which is below nothing
        dead = int(last[_DEAD])
    return Outcome(losses, loads, dead, mean(_values_under(last, _DROPPED).values()))


def _values_under(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The values whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _tabulate_loads(last: Mapping[str, float]) -> list[list[float]]:
    """The loads as [L, E]; empty when some are not there."""
    cells: dict[int, dict[int, float]] = {}
    for name, value in last.items():
        found = _LOAD.fullmatch(name)
        if found:
            cells.setdefault(int(found[1]), {})[int(found[2])] = value
    loads = []
    for layer in sorted(cells):
        loads.append([cells[layer][expert] for expert in sorted(cells[layer])])
    if len(set(map(len, loads))) > 1:
        return []
    return loads


def _check_alike(run: Path, runs: Mapping[str, Mapping[int, Outcome]]) -> None:
    """Refuse outcomes on other domains, or of other models, which one table cannot show."""
    outcomes = chain.from_iterable(variant.values() for variant in runs.values())
    shapes = {(tuple(sorted(one.losses)), len(one.loads), len(one.loads[0])) for one in outcomes}
    if len(shapes) > 1:
        raise InputError(f"{run}: its stages differ in their domains, layers or experts; run the ablation again")


def stage_name(variant: str, seed: int) -> str:
    """The stage that finetunes one variant with one seed."""
    return f"ablation-{variant}-s{seed}"
