"""The stages of a run as its report sees them: how far each one went, at what cost, and what it logged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_btx.common.manifest import read_manifest
from megatron_btx.recipe.names import (
    CONFIG_FILE,
    DATA_STAGE,
    EXPERT_PREFIX,
    GENERALIST,
    MANIFEST_FILE,
    METRICS_FILE,
    SEED_STAGE,
)
from megatron_btx.report.quantities import mean, total
from megatron_btx.runner.run_dir import read_checkpointed_iteration, read_metrics, read_yaml
from megatron_btx.runner.schemas import PlannedStage, StageManifest, read_count, read_number

_ENDED_EARLY = {"running": "not finished", "stopped": "stopped", "failed": "failed"}
"""Status -> how a report says it. A killed run leaves "running" behind."""
MEAN = "mean"
"""What the mean over domains is logged as."""
_WATCHED = "lm loss validation "
_LOAD = re.compile(r"moe/load_layer_(\d{1,6})_expert_(\d{1,6})")
_DROPPED = "moe/dropped_layer_"
_DEAD = "moe/dead_experts"

MAX_POINTS_PER_CURVE = 400

Curve = tuple[tuple[int, float], ...]
"""(iteration, loss in nats per token), ascending."""


class RoutingLog(NamedTuple):
    """How a mixture routed while it trained, over the last logged interval."""

    loads: list[list[float]]
    """Share of a layer's choices per expert, [L][E]; empty where some were not logged."""
    dead: int | None
    """(layer, expert) cells under 1 % of an even load; None when no number was logged."""
    dropped: float
    """Share of choices dropped, mean over layers; NaN when none was logged."""


class Log(NamedTuple):
    """What a metrics.jsonl holds."""

    curve: Curve
    """The training loss; empty for a stage that does not train."""
    last: int
    """The last iteration; 0 without any."""
    watched: dict[str, Curve]
    """Domain -> its losses while the stage trained; also their mean."""
    routing: RoutingLog | None
    """None where no mixture trained."""


@dataclass(frozen=True)
class Stage:
    """One directory of the run that holds a manifest or a loss curve."""

    name: str
    manifest: StageManifest
    """An empty one where there is none."""
    written: Mapping[str, Any] | None
    """The manifest as it stands in its file, for programs; None where there is none."""
    log: Log
    tokens_per_iteration: float | None
    steps: int | None
    """How many it was to train."""
    reached: int
    """The last one that left metrics or a checkpoint; 0 without any."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that decided its result; empty where nothing states them."""
        return self.manifest.settings or {}

    @property
    def unfinished(self) -> str:
        """How far an unfinished stage went, in words; empty for a finished one."""
        status = self.manifest.status or ""
        is_short = 0 < self.reached < (self.steps or 0)
        if self.written is None or self.manifest.is_finished or not (status in _ENDED_EARLY or is_short):
            return ""
        ending = _ENDED_EARLY.get(status, "not finished")
        if not self.steps:
            return ending
        comma = "," * (ending == "not finished")
        return f"{ending}{comma} at step {self.reached:,} of {self.steps:,}"

    @property
    def tokens(self) -> float | None:
        """What it trained on, up to where an unfinished stage went; None where nothing states it."""
        return self._so_far(self.manifest.tokens)

    @property
    def flops(self) -> float | None:
        """What it computed, up to where an unfinished stage went; None where nothing states it."""
        return self._so_far(self.manifest.flops)

    def _so_far(self, stated: float | None) -> float | None:
        """The part of a cost of the whole stage that it has come to."""
        if stated is None or not self.unfinished:
            return stated
        if not self.steps:
            return None
        return float(stated) * self.reached / self.steps

    @property
    def experts(self) -> tuple[str, ...]:
        """The models that a mix or an average took, as its settings name them; empty where they do not say."""
        names = self.settings.get("experts")
        if not isinstance(names, list):
            return ()
        return tuple(map(str, names))

    def progress_unit(self) -> tuple[float, str]:
        """What one iteration is, and of what: tokens where the stage says how many."""
        if self.tokens_per_iteration:
            return self.tokens_per_iteration, "tokens"
        return 1.0, "iterations"


def read_stage(folder: Path) -> Stage | None:
    """The stage in ``folder``; None when neither a manifest nor a curve is there."""
    if not (folder / MANIFEST_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        return None
    written = read_manifest(folder)
    manifest = StageManifest.model_validate(written or {})
    log = read_log(folder / METRICS_FILE)
    config = read_yaml(folder / CONFIG_FILE)
    steps = manifest.steps or read_count(config.get("iterations")) or None
    per_iteration = _tokens_per_iteration(manifest, config.get("flags"), steps, log.curve)
    reached = max(read_checkpointed_iteration(folder), log.last)
    return Stage(folder.name, manifest, written, log, per_iteration, steps, reached)


def find_left_out(planned: Sequence[PlannedStage] | None, manifests: Mapping[str, StageManifest]) -> dict[str, str]:
    """Stages that are not of the run's plan, and why; none without a plan. Without a manifest it is an empty one.

    A stage is of the plan when it stands there with the same fingerprint, which its parents' are a part of.
    """
    if planned is None:
        return {}
    due = {entry.stage: entry.fingerprint for entry in planned}
    reasons = {}
    for name, manifest in manifests.items():
        if name not in due:
            reasons[name] = "not a stage of this run's recipe"
        elif manifest.fingerprint and due[name] and manifest.fingerprint != due[name]:
            reasons[name] = "made with other settings, or from other stages, than this run's recipe has"
    return reasons


def read_log(file: Path) -> Log:
    """What a stage logged; the last line for an iteration counts.

    Raises:
        InputError: the file has lines, and none can be read.
    """
    losses: dict[int, float] = {}
    watched: dict[str, dict[int, float]] = {}
    values: dict[str, float] = {}
    last = 0
    for line in read_metrics(file):
        last = max(last, line.iteration)
        if line.loss is not None:
            losses[line.iteration] = line.loss
        logged = dict(line.numbers())
        values |= logged
        if f"{_WATCHED}{MEAN}" in logged:
            for domain, loss in _under(_WATCHED, logged).items():
                watched.setdefault(domain, {})[line.iteration] = loss
    curves = {domain: tuple(sorted(of_domain.items())) for domain, of_domain in watched.items()}
    return Log(tuple(sorted(losses.items())), last, curves, _read_routing(values))


def _under(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """The numbers whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _read_routing(values: Mapping[str, float]) -> RoutingLog | None:
    if _DEAD not in values:
        return None
    cells: dict[int, dict[int, float]] = {}
    for name, value in values.items():
        found = _LOAD.fullmatch(name)
        if found:
            cells.setdefault(int(found[1]), {})[int(found[2])] = value
    loads = []
    for layer in sorted(cells):
        loads.append([cells[layer][expert] for expert in sorted(cells[layer])])
    if len(set(map(len, loads))) > 1:
        loads = []
    dead = None
    if math.isfinite(values[_DEAD]):
        dead = int(values[_DEAD])
    return RoutingLog(loads, dead, mean(_under(_DROPPED, values).values()))


def _tokens_per_iteration(manifest: StageManifest, flags: object, steps: int | None, curve: Curve) -> float | None:
    if manifest.tokens and steps:
        return manifest.tokens / steps
    if isinstance(flags, Mapping):
        sequence, batch = read_number(flags.get("seq-length")), read_number(flags.get("global-batch-size"))
        if sequence and batch:
            return sequence * batch
    if manifest.tokens and curve and curve[-1][0] and manifest.status in (None, "finished"):
        return manifest.tokens / curve[-1][0]
    return None


class LossCurve(NamedTuple):
    """A loss curve as it is drawn: means over equal runs of iterations, and their moving average."""

    unit: str
    """"tokens" or, where a stage does not say how many it saw, "iterations"."""
    x: list[float]
    loss: list[float]
    smooth: list[float]


def make_curve(stage: Stage) -> LossCurve:
    """Reduce a stage's training loss to at most some hundred points, and smooth it over about 5 % of its length."""
    size = math.ceil(len(stage.log.curve) / MAX_POINTS_PER_CURVE)
    scale, unit = stage.progress_unit()
    x, losses = [], []
    for start in range(0, len(stage.log.curve), size):
        part = stage.log.curve[start : start + size]
        x.append(part[-1][0] * scale)
        losses.append(mean(loss for _, loss in part))
    # The window opens gradually at the start, where the loss falls fastest: a wide one would hide the first value.
    smooth = []
    for at in range(len(losses)):
        reach = min(len(losses) // 40, at)
        smooth.append(mean(losses[at - reach : at + reach + 1]))
    return LossCurve(unit, x, losses, smooth)


def sum_tokens(name: str, known: Mapping[str, Stage], first: str) -> float | None:
    """Tokens that were trained on in a stage and all it is made from, after the seed.

    None when stage ``first`` is not among them, when one is unfinished (what was made from it had an earlier one), or
    when a mix took experts that were not trained in the run, whose budgets are not known.
    """
    line: dict[str, Stage] = {}
    waiting = [name]
    while waiting:
        place = waiting.pop()
        if place in (SEED_STAGE, DATA_STAGE) or place in line:
            continue
        stage = known.get(place)
        if stage is None or stage.unfinished:
            return None
        parents = stage.manifest.parents
        if any(expert != GENERALIST and f"{EXPERT_PREFIX}{expert}" not in parents for expert in stage.experts):
            return None
        line[place] = stage
        waiting += parents
    trained = [stage.tokens for stage in line.values() if stage.steps or stage.log.curve]
    spent = [tokens for tokens in trained if tokens is not None]
    if first not in line or not spent or len(spent) < len(trained):
        return None
    return total(spent)
