"""The stages of a run as its report sees them: how far each one went, at what cost, and what it logged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from megatron_btx.runner.schemas import StageManifest, read_count, read_number

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
    watched: Mapping[str, Curve] = field(default_factory=dict)
    """Domain -> its losses while the stage trained; also their mean."""
    routing: RoutingLog | None = None
    """None where no mixture trained."""

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

    def last_losses(self) -> dict[str, float]:
        """The loss on every domain after its last step; empty where its end was not watched."""
        if self.unfinished or MEAN not in self.watched:
            return {}
        return {domain: curve[-1][1] for domain, curve in self.watched.items()}

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
    log = read_log(folder / METRICS_FILE)
    config = read_yaml(folder / CONFIG_FILE)
    stated = manifest or StageManifest()
    steps = stated.steps or read_count(config.get("iterations")) or None
    reached = max(read_checkpointed_iteration(folder), log.last) or None
    per_iteration = _tokens_per_iteration(stated, config.get("flags"), steps, log.curve)
    return Stage(folder.name, manifest, log.curve, per_iteration, steps, reached, written, log.watched, log.routing)


class _Log(NamedTuple):
    """What a metrics.jsonl holds."""

    curve: Curve
    last: int
    """The last iteration; 0 without any."""
    watched: dict[str, Curve]
    routing: RoutingLog | None


def read_log(file: Path) -> _Log:
    """What a stage logged; the last line for an iteration counts.

    Raises:
        InputError: the file has lines, and none can be read.
    """
    losses: dict[int, float] = {}
    watched: dict[str, dict[int, float]] = {}
    values: dict[str, Any] = {}
    last = 0
    for line in read_metrics(file):
        last = max(last, line.iteration)
        if line.loss is not None:
            losses[line.iteration] = line.loss
        logged = line.model_extra or {}
        values |= logged
        if f"{_WATCHED}{MEAN}" in logged:
            for domain, loss in _under(_WATCHED, logged).items():
                watched.setdefault(domain, {})[line.iteration] = loss
    curves = {domain: tuple(sorted(of_domain.items())) for domain, of_domain in watched.items()}
    return _Log(tuple(sorted(losses.items())), last, curves, _read_routing(values))


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers whose names begin with ``prefix``, without it."""
    found = {}
    for name, value in values.items():
        number = read_number(value)
        if name.startswith(prefix) and number is not None:
            found[name.removeprefix(prefix)] = number
    return found


def _read_routing(values: Mapping[str, Any]) -> RoutingLog | None:
    """The routing from the last value of every metric."""
    if _DEAD not in values:
        return None
    cells: dict[int, dict[int, float]] = {}
    for name, value in values.items():
        found = _LOAD.fullmatch(name)
        if found:
            cells.setdefault(int(found[1]), {})[int(found[2])] = float(value)
    loads = []
    for layer in sorted(cells):
        loads.append([cells[layer][expert] for expert in sorted(cells[layer])])
    if len(set(map(len, loads))) > 1:
        loads = []
    dead = read_number(values[_DEAD])
    if dead is not None and not abs(dead) < 2**53:  # NaN is below nothing
        dead = None
    return RoutingLog(loads, None if dead is None else int(dead), mean(_under(_DROPPED, values).values()))


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
    scale, unit = stage.progress_unit()
    x, losses = [], []
    for start in range(0, len(stage.curve), size):
        part = stage.curve[start : start + size]
        x.append(part[-1][0] * scale)
        losses.append(mean(loss for _, loss in part))
    smooth = _smooth(losses)
    return LossCurve(stage.name, unit, tuple(x), tuple(losses), tuple(smooth), bool(stage.unfinished))


def _smooth(losses: Sequence[float]) -> list[float]:
    """The moving average.

    Its window opens gradually at the start, where the loss falls fastest: a wide one would hide the first value.
    """
    reaches = [min(len(losses) // 40, at) for at in range(len(losses))]
    return [mean(losses[at - reach : at + reach + 1]) for at, reach in enumerate(reaches)]


def sum_tokens(name: str, known: Mapping[str, Stage], first: str) -> float | None:
    """Tokens that were trained on in a stage and all it is made from, after the seed.

    None when stage ``first`` is not among them, when one is unfinished (what was made from it had an earlier one), or
    when a mix took experts that were not trained in the run, whose budgets are not known.
    """
    line: list[str] = []
    waiting = [name]
    while waiting:
        stage = waiting.pop()
        if stage in (SEED_STAGE, DATA_STAGE) or stage in line:
            continue
        if stage not in known or known[stage].unfinished or _has_given_experts(known[stage]):
            return None
        line.append(stage)
        waiting += known[stage].parents
    spent: list[float] = []
    for stage in line:
        if not known[stage].steps and not known[stage].curve:
            continue
        tokens = known[stage].tokens
        if tokens is None:
            return None
        spent.append(tokens)
    if first not in line or not spent:
        return None
    return total(spent)


def _has_given_experts(mix: Stage) -> bool:
    return any(name != GENERALIST and f"{EXPERT_PREFIX}{name}" not in mix.parents for name in mix.experts)
