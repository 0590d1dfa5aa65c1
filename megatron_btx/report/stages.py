"""The stages of a run as its report sees them: how far each one went, at what cost, with what training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.common.manifest import read_manifest
from megatron_btx.recipe.names import CONFIG_FILE, EXPERT_PREFIX, MANIFEST_FILE, METRICS_FILE, SEED_STAGE, VALID_SPLIT
from megatron_btx.report.quantities import mean
from megatron_btx.runner.run_dir import read_checkpointed_iteration, read_metrics, read_yaml
from megatron_btx.runner.schemas import StageManifest, read_count, read_number

_ENDED_EARLY = {"running": "not finished", "stopped": "stopped", "failed": "failed"}
"""Status -> how a report says it. A killed run leaves "running" behind."""

Curve = tuple[tuple[int, float], ...]
"""(iteration, training loss in nats per token), ascending."""


MAX_POINTS_PER_CURVE = 400
GROUPS = (SEED_STAGE, "experts", "mixture and baselines")
"""The panels of the figure, in order."""


@dataclass(frozen=True)
class Stage:
    """One directory of the run that holds a manifest or a loss curve."""

    name: str
    manifest: StageManifest | None
    curve: Curve
    """Empty for a stage that does not train."""
    tokens_per_iteration: float | None
    steps: int | None = None
    """How many it was to train."""
    reached: int | None = None
    """The last one that left metrics or a checkpoint."""
    written: Mapping[str, Any] | None = None
    """The manifest as it stands in its file, for programs."""

    @property
    def _stated(self) -> StageManifest:
        return self.manifest or StageManifest()

    @property
    def parents(self) -> tuple[str, ...]:
        """The stages it is made from."""
        return tuple(self._stated.parents)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that decided its result; empty where nothing states them."""
        return self._stated.settings or {}

    @property
    def unfinished(self) -> str:
        """How far an unfinished stage went, in words; empty for a finished one."""
        if self.manifest is None or self.manifest.is_finished:
            return ""
        status = self.manifest.status or ""
        reached = self.reached or 0
        is_short = self.steps is not None and self.reached is not None and reached < self.steps
        if status not in _ENDED_EARLY and not is_short:
            return ""
        ending = _ENDED_EARLY.get(status, "not finished")
        if not self.steps:
            return ending
        comma = "," * (ending == "not finished")
        return f"{ending}{comma} at step {reached:,} of {self.steps:,}"

    @property
    def tokens(self) -> float | None:
        """What it trained on, up to where an unfinished stage went; None where nothing states it."""
        return self._so_far(self._stated.tokens)

    @property
    def flops(self) -> float | None:
        """What it computed, up to where an unfinished stage went; None where nothing states it."""
        return self._so_far(self._stated.flops)

    @property
    def seconds(self) -> float | None:
        """What all its starts took; None where nothing states it."""
        return self._stated.seconds

    def count_broken_losses(self) -> int:
        """Iterations whose training loss is not a finite number."""
        return sum(not math.isfinite(loss) for _, loss in self.curve)

    def _so_far(self, stated: float | None) -> float | None:
        """The part of a cost of the whole stage that it has come to."""
        if stated is None or not self.unfinished:
            return stated
        if not self.steps:
            return None
        return float(stated) * (self.reached or 0) / self.steps


def read_stage(folder: Path) -> Stage | None:
    """The stage in ``folder``; None when neither a manifest nor a curve is there."""
    if not (folder / MANIFEST_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        return None
    written = read_manifest(folder)
    manifest = None
    if written is not None:
        manifest = StageManifest.model_validate(written)
    curve, logged = read_curve(folder / METRICS_FILE)
    config = read_yaml(folder / CONFIG_FILE)
    stated = manifest or StageManifest()
    steps = stated.steps or read_count(config.get("iterations")) or None
    reached = max(read_checkpointed_iteration(folder), logged) or None
    per_iteration = _tokens_per_iteration(stated, config.get("flags"), steps, curve)
    return Stage(folder.name, manifest, curve, per_iteration, steps, reached, written)


def say_split(recipe: Mapping[str, Any], section: str) -> str:
    """Of which split the losses are, by a section of the run's recipe: " on the test split"; empty without one."""
    if not isinstance(recipe.get(section), dict):
        return ""
    return f" on the {recipe[section].get('split', VALID_SPLIT)} split"


def read_curve(file: Path) -> tuple[Curve, int]:
    """Training loss per iteration from a metrics.jsonl, and the last iteration in it (0: none).

    The last line for an iteration counts. Raises InputError when the file has lines, and none can be read.
    """
    losses: dict[int, float] = {}
    last = 0
    for line in read_metrics(file):
        last = max(last, line.iteration)
        if line.loss is not None:
            losses[line.iteration] = line.loss
    return tuple(sorted(losses.items())), last


def _tokens_per_iteration(stated: StageManifest, flags: object, steps: int | None, curve: Curve) -> float | None:
    if stated.tokens and steps:
        return stated.tokens / steps
    if isinstance(flags, Mapping):
        sequence, batch = read_number(flags.get("seq-length")), read_number(flags.get("global-batch-size"))
        if sequence and batch:
            return sequence * batch
    if stated.tokens and curve and curve[-1][0] and stated.status in (None, "finished"):
        return stated.tokens / curve[-1][0]
    return None


@dataclass(frozen=True)
class LossCurve:
    """A loss curve as it is drawn: means over equal runs of iterations, and their moving average."""

    stage: str
    group: str
    unit: str
    """"tokens" or, where a stage does not say how many it saw, "iterations"."""
    x: tuple[float, ...]
    loss: tuple[float, ...]
    smooth: tuple[float, ...]
    unfinished: bool = False
    """Whether the stage ended early, and its curve with it."""


def make_curve(stage: Stage) -> LossCurve:
    """Reduce a stage's training loss to at most some hundred points, and smooth it over about 5 % of its length."""
    size = math.ceil(len(stage.curve) / MAX_POINTS_PER_CURVE)
    scale, unit = 1.0, "iterations"
    if stage.tokens_per_iteration:
        scale, unit = stage.tokens_per_iteration, "tokens"
    x, losses = [], []
    for start in range(0, len(stage.curve), size):
        part = stage.curve[start : start + size]
        x.append(part[-1][0] * scale)
        losses.append(mean(loss for _, loss in part))
    smooth = _smooth(losses)
    return LossCurve(
        stage.name, group_of(stage.name), unit, tuple(x), tuple(losses), tuple(smooth), bool(stage.unfinished)
    )


def _smooth(losses: list[float]) -> list[float]:
    """The moving average.

    Its window opens gradually at the start, where the loss falls fastest: a wide one would hide the first value.
    """
    reaches = [min(len(losses) // 40, at) for at in range(len(losses))]
    return [mean(losses[at - reach : at + reach + 1]) for at, reach in enumerate(reaches)]


def group_of(stage: str) -> str:
    """The panel a training stage is drawn in."""
    if stage == SEED_STAGE:
        return GROUPS[0]
    if stage.startswith(EXPERT_PREFIX):
        return GROUPS[1]
    return GROUPS[2]
