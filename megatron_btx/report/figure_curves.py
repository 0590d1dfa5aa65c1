"""The figure of loss curves: training loss over tokens, one panel per group of stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_btx.report.quantities import is_usable, mean
from megatron_btx.report.stages import GROUPS, LossCurve
from megatron_btx.report.style import INK, Palette, new_page, plain_axes, set_title, shorten

NAMED_CURVES = 16
"""Of a panel: a legend of more would leave no room for them."""
_LARGE_UNITS = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))


def draw_curves(curves: Sequence[LossCurve], palette: Palette) -> Figure:
    """Training loss over tokens, one panel per group of stages."""
    groups = _group_curves(curves)
    figure = new_page(3.9)
    panels = figure.subplots(1, len(groups), squeeze=False).flat
    for panel, (group, members) in zip(panels, groups.items(), strict=True):
        members.sort(key=lambda curve: palette.rank(curve.stage))
        _draw_group(panel, members, palette)
        panel.set_title(group, fontsize=9.5, color=INK)
    figure.axes[0].set_ylabel("training loss, nats per token", fontsize=9)
    set_title(figure, say_fall(curves))
    return figure


def _group_curves(curves: Sequence[LossCurve]) -> dict[str, list[LossCurve]]:
    """Group -> its curves, in the order of the panels; groups without a curve are left out."""
    groups: dict[str, list[LossCurve]] = {}
    for group in GROUPS:
        members = [curve for curve in curves if curve.group == group]
        if members:
            groups[group] = members
    return groups


def _draw_group(panel: Axes, curves: Sequence[LossCurve], palette: Palette) -> None:
    units = set()
    scale, prefix = _choose_unit(max(curve.x[-1] for curve in curves))
    for number, curve in enumerate(curves):
        x = [position / scale for position in curve.x]
        colour = palette.colour(curve.stage)
        label = None
        if number < NAMED_CURVES:
            label = _label_of(curve)
        dash = palette.dash(curve.stage)
        units.add(f"{prefix}{curve.unit}")
        panel.plot(x, _with_gaps(curve.loss), color=colour, linewidth=0.6, alpha=0.3)
        panel.plot(x, _with_gaps(curve.smooth), color=colour, linestyle=dash, linewidth=1.7, label=label)
    panel.set_xlabel(" and ".join(sorted(units)), fontsize=9)
    panel.legend(frameon=False, fontsize=8, loc="best")
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.set_xlim(0, None)
    plain_axes(panel, grid="both")
    _limit_to_bulk(panel, curves)


def _choose_unit(largest: float) -> tuple[float, str]:
    for scale, prefix in _LARGE_UNITS:
        if largest >= scale:
            return scale, prefix
    return 1.0, ""


def _label_of(curve: LossCurve) -> str:
    if curve.unfinished:
        return f"{shorten(curve.stage)} (unfinished)"
    return shorten(curve.stage)


def _with_gaps(losses: Sequence[float]) -> list[float]:
    """The same with a gap where a loss is none."""
    drawable = []
    for loss in losses:
        if not is_usable(loss):
            loss = math.nan
        drawable.append(loss)
    return drawable


def _limit_to_bulk(panel: Axes, curves: Sequence[LossCurve]) -> None:
    """End the loss axis just above the smoothed curves, so that the first noisy steps do not flatten the rest."""
    finite: list[float] = []
    for curve in curves:
        finite += filter(is_usable, curve.smooth)
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.06 * (high - low) or 0.1
        panel.set_ylim(low - 2 * margin, high + 2 * margin)


def say_fall(curves: Sequence[LossCurve]) -> str:
    """Whether every stage ended below where it began."""
    unfallen = [shorten(curve.stage) for curve in curves if not _fell(curve.loss)]
    if unfallen:
        return "Training loss; it did not fall in " + ", ".join(unfallen[:4])
    if len(curves) > 1:
        return "Training loss fell in every stage"
    return "Training loss fell"


def _fell(loss: Sequence[float]) -> bool:
    """Whether the last tenth lies below the first, on average; not when a loss there is not finite."""
    tenth = math.ceil(len(loss) / 10)
    return mean(loss[-tenth:]) < mean(loss[:tenth])
