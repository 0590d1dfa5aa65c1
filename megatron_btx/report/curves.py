"""Training curves as they are drawn: reduced to some hundred points, and smoothed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_btx.report.inputs import RunData
from megatron_btx.report.models import EXPERT, SEED
from megatron_btx.report.quantities import mean
from megatron_btx.report.stages import Stage

MAX_POINTS_PER_CURVE = 400
PANELS = {SEED: "seed", EXPERT: "experts", "": "mixture and baselines"}
"""Role of the model that is trained -> the panel of its curve, in order; "" for all other roles."""


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


def make_curves(run: RunData) -> list[LossCurve]:
    """The training curve of every stage, in the panel of the model that it makes."""
    roles = {model.stage.name: model.role for model in run.models if model.stage is not None}
    curves = []
    for stage in run.stages:
        if stage.curve:
            curves.append(make_curve(stage, PANELS.get(roles.get(stage.name, ""), PANELS[""])))
    return curves


def make_curve(stage: Stage, group: str) -> LossCurve:
    """Reduce a stage's training loss to at most some hundred points, and smooth it over about 5 % of its length."""
    size = math.ceil(len(stage.curve) / MAX_POINTS_PER_CURVE)
    scale, unit = stage.progress_unit()
    x, losses = [], []
    for start in range(0, len(stage.curve), size):
        part = stage.curve[start : start + size]
        x.append(part[-1][0] * scale)
        losses.append(mean(loss for _, loss in part))
    smooth = _smooth(losses)
    return LossCurve(stage.name, group, unit, tuple(x), tuple(losses), tuple(smooth), bool(stage.unfinished))


def _smooth(losses: Sequence[float]) -> list[float]:
    """The moving average.

    Its window opens gradually at the start, where the loss falls fastest: a wide one would hide the first value.
    """
    reaches = [min(len(losses) // 40, at) for at in range(len(losses))]
    return [mean(losses[at - reach : at + reach + 1]) for at, reach in enumerate(reaches)]
