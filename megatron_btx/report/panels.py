"""The two panels that several figures are made of: shares of experts stacked over the layers, and a heat map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from megatron_btx.report.quantities import is_usable
from megatron_btx.report.style import Palette

HEAT_COLOURS = "cividis"
_TICKS = 8
_HALF_BAR = 0.43


def draw_shares(
    panel: Axes, shares_LE: Sequence[Sequence[float]], experts: Sequence[str], palette: Palette, layers: Sequence[int]
) -> None:
    """Draw a bar per layer, which the experts' shares fill from below.

    One artist per expert, because a figure may have ten thousand bars. Only the hatch is white: edges would hide small
    shares.

    Args:
        layers: numbers of the layers, from 0.
    """
    bottoms = [0.0] * len(shares_LE)
    for expert, name in enumerate(experts):
        bars = []
        for at, shares_E in enumerate(shares_LE):
            low, high = bottoms[at], bottoms[at] + shares_E[expert]
            left, right = at - _HALF_BAR, at + _HALF_BAR
            bars.append([(left, low), (right, low), (right, high), (left, high)])
            bottoms[at] = high
        hatch = palette.hatch(name) or None
        collection = PolyCollection(bars, facecolor=palette.colour(name), hatch=hatch, edgecolor="white", linewidth=0)
        panel.add_collection(collection, autolim=False)
    panel.set_xlim(-0.6, len(shares_LE) - 0.4)
    panel.set_ylim(0, 1)
    panel.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    ticks = choose_ticks(range(len(shares_LE)))
    panel.set_xticks(ticks, [str(layers[at] + 1) for at in ticks])


def draw_heat_map(
    panel: Axes,
    values: Sequence[Sequence[float]],
    write: Callable[[float], str],
    font_size: float = 6.5,
    is_square: bool = False,
) -> None:
    """Draw values between 0 and 1 as colours, with their numbers on them.

    Args:
        write: makes a number's text; an empty one leaves it out.
    """
    image = panel.imshow(values, vmin=0.0, vmax=1.0, cmap=HEAT_COLOURS)
    if not is_square:
        image.axes.set_aspect("auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "black"
            if value < 0.55:
                ink = "white"
            style = {"ha": "center", "va": "center", "color": ink, "fontsize": font_size, "in_layout": False}
            text = write(value)
            if text:
                panel.text(column, row, text, **style)  # type: ignore[arg-type]


def add_heat_scale(figure: Figure, panels: Sequence[Axes], label: str) -> None:
    """Draw the scale of heat maps beside them."""
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), HEAT_COLOURS), ax=list(panels), shrink=0.7, aspect=30)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def make_panels(figure: Figure, count: int, columns: int, share_y: bool = False) -> list[Axes]:
    """So many panels in rows of ``columns``; places that are left over stay empty."""
    lines = math.ceil(count / columns)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=share_y).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return panels[:count]


def say_absent(panel: Axes, text: str) -> None:
    """Write in an empty panel why it is empty."""
    panel.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, style="italic", transform=panel.transAxes)
    panel.set_xticks([])


def choose_ticks(places: Sequence[int]) -> Sequence[int]:
    """At most eight of the places, evenly spaced: those whose number is written."""
    step = max(1, math.ceil(len(places) / _TICKS))
    return places[::step]


def write_percent(share: float) -> str:
    """A share on a heat map."""
    if not is_usable(share):
        return "NaN"
    return f"{share:.0%}"
