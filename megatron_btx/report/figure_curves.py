"""The figure of loss curves: training loss over tokens, one panel per group of stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_btx.report.figures import INK, TITLE, Palette, new_page, plain_axes, shortened
from megatron_btx.report.inputs import EXPERT_PREFIX
from megatron_btx.report.numbers import mean, usable
from megatron_btx.report.stages import Stage

MAX_POINTS_PER_CURVE = 400
NAMED_CURVES = 16
"""Of a panel: a legend of more would leave no room for them."""
LARGE_UNITS = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))


@dataclass(frozen=True)
class Curve:
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


def curve_of(stage: Stage) -> Curve:
    """Reduce a stage's training loss to at most some hundred points, and smooth it over about 5 % of its length."""
    size = math.ceil(len(stage.curve) / MAX_POINTS_PER_CURVE)
    parts = [stage.curve[start : start + size] for start in range(0, len(stage.curve), size)]
    scale = stage.tokens_per_iteration or 1.0
    x = [part[-1][0] * scale for part in parts]
    loss = [mean(value for _, value in part) for part in parts]
    reach = len(loss) // 40
    # The window opens gradually at the start, where the loss falls fastest: a wide one would hide the first value.
    windows = [loss[at - min(reach, at) : at + min(reach, at) + 1] for at in range(len(loss))]
    smooth = [mean(window) for window in windows]
    unit = "tokens" if stage.tokens_per_iteration else "iterations"
    group = group_of(stage.name)
    return Curve(stage.name, group, unit, tuple(x), tuple(loss), tuple(smooth), bool(stage.unfinished))


def group_of(stage: str) -> str:
    """The panel a training stage is drawn in."""
    if stage == "seed":
        return "seed"
    return "experts" if stage.startswith(EXPERT_PREFIX) else "mixture and baselines"


def draw_curves(curves: Sequence[Curve], palette: Palette) -> Figure:
    """Training loss over tokens, one panel per group of stages."""
    groups = sorted({curve.group for curve in curves}, key=["seed", "experts", "mixture and baselines"].index)
    figure = new_page(3.9)
    for panel, group in zip(figure.subplots(1, len(groups), squeeze=False).flat, groups, strict=True):
        members = sorted((curve for curve in curves if curve.group == group), key=lambda one: palette.rank(one.stage))
        largest = max(curve.x[-1] for curve in members)
        scale, prefix = next((unit for unit in LARGE_UNITS if largest >= unit[0]), (1.0, ""))
        for at, curve in enumerate(members):
            losses, smooth = (_drawable(values) for values in (curve.loss, curve.smooth))
            name = shortened(curve.stage) + (" (unfinished)" if curve.unfinished else "")
            x, colour = [position / scale for position in curve.x], palette.colour(curve.stage)
            panel.plot(x, losses, color=colour, linewidth=0.6, alpha=0.3)
            style: dict[str, Any] = {"color": colour, "linestyle": palette.dash(curve.stage), "linewidth": 1.7}
            panel.plot(x, smooth, label=name if at < NAMED_CURVES else None, **style)
        panel.set_title(group, fontsize=9.5, color=INK)
        panel.set_xlabel(" and ".join(sorted({f"{prefix}{curve.unit}" for curve in members})), fontsize=9)
        panel.legend(frameon=False, fontsize=8, loc="best")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_xlim(0, None)
        plain_axes(panel, grid="both")
        _limit_to_bulk(panel, members)
    figure.axes[0].set_ylabel("training loss, nats per token", fontsize=9)
    figure.suptitle(curves_message(curves), **TITLE)
    return figure


def _drawable(losses: Sequence[float]) -> list[float]:
    """The same with a gap where a loss is none."""
    return [loss if usable(loss) else math.nan for loss in losses]


def _limit_to_bulk(panel: Axes, curves: Sequence[Curve]) -> None:
    """End the loss axis just above the smoothed curves, so that the first noisy steps do not flatten the rest."""
    finite = [loss for curve in curves for loss in curve.smooth if usable(loss)]
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.06 * (high - low) or 0.1
        panel.set_ylim(low - 2 * margin, high + 2 * margin)


def curves_message(curves: Sequence[Curve]) -> str:
    """Whether every stage ended below where it began."""
    unfallen = [curve.stage for curve in curves if not _fell(curve.loss)]
    if not unfallen:
        return "Training loss fell in every stage" if len(curves) > 1 else "Training loss fell"
    return "Training loss; it did not fall in " + ", ".join(shortened(stage) for stage in unfallen[:4])


def _fell(loss: Sequence[float]) -> bool:
    """Whether the last tenth lies below the first, on average; not when a loss there is not finite."""
    tenth = math.ceil(len(loss) / 10)
    return mean(loss[-tenth:]) < mean(loss[:tenth])
