"""Loss curves as they are drawn: a few hundred points of each stage, and their moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_btx.pipeline.directory import EXPERT_PREFIX
from megatron_btx.report.inputs import SEED
from megatron_btx.report.quantities import mean
from megatron_btx.report.stages import Stage

MAX_POINTS_PER_CURVE = 400
GROUPS = (SEED, "experts", "mixture and baselines")
"""The panels of the figure, in order."""


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
    largest_reach = len(losses) // 40
    smooth = []
    for at in range(len(losses)):
        reach = min(largest_reach, at)
        smooth.append(mean(losses[at - reach : at + reach + 1]))
    return smooth


def group_of(stage: str) -> str:
    """The panel a training stage is drawn in."""
    if stage == SEED:
        return GROUPS[0]
    if stage.startswith(EXPERT_PREFIX):
        return GROUPS[1]
    return GROUPS[2]
