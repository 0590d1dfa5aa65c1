"""Figures of routing, like the paper's: shares per layer and expert, one panel per model, one row per label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

from megatron_btx.evaluation.routing import overlap
from megatron_btx.ground.files import write_atomically
from megatron_btx.report.figures import CYCLE, DASHES, FAINT, PAGE_WIDTH_INCHES, Palette, as_png, shortened
from megatron_btx.training.telemetry import DEAD_SHARE

POINTS_PER_INCH = 72
LEGEND_POINTS = 8.5
MARKERS = ("o", "s", "^", "D", "v")
"""One more than there are dashes, so that a dash and a marker meet again after twenty rounds of the colours only."""
SHARES = {
    "choices": "Share of all choices that go to each expert",
    "first": "Share of first choices (a token's largest gate) that go to each expert",
}


def write_figures(folder: Path, models: dict[str, Any], experts: list[str]) -> list[str]:
    """Draw everything into ``folder``; returns the files' names.

    Everything is drawn before anything is written, and each file is replaced as a whole.
    """
    pictures = {
        "routing.png": as_png(draw_shares(models, experts, "choices")),
        "routing-first.png": as_png(draw_shares(models, experts, "first")),
        "overlap.png": as_png(draw_overlap(models)),
        "entropy.png": as_png(draw_entropy(models, experts)),
    }
    for name, picture in pictures.items():
        write_atomically(folder / name, picture)
    return list(pictures)


def draw_shares(models: dict[str, Any], experts: list[str], key: str = "choices") -> Figure:
    """Per label (a row) and model (a column): stacked shares over the layers.

    Args:
        key: what is shared out, a key of :data:`SHARES`.
    """
    labels, palette = _labels(models), Palette(experts)
    layers = max((len(routed["layers"]) for of in models.values() for routed in of.values()), default=1)
    width = max(PAGE_WIDTH_INCHES, 1.6 + len(models) * max(2.3, 0.072 * layers))  # a bar holds a small digit
    height = 0.7 + len(labels) * min(1.5, max(0.8, 48 / len(labels)))
    slot_points = (width - 1.6) / len(models) / layers * POINTS_PER_INCH
    figure = Figure(figsize=(width, height), layout="constrained")
    panels: Any = figure.subplots(len(labels), len(models), squeeze=False, sharey=True)
    dead = False
    for row, label in enumerate(labels):
        for column, (name, routed) in enumerate(models.items()):
            panel = panels[row][column]
            panel.spines[["top", "right"]].set_visible(False)
            if row == 0:
                panel.set_title(shortened(name, 26), fontsize=9.5)
            if column == 0:
                panel.set_ylabel(_wrapped(label), fontsize=8.5, rotation=0, ha="right", va="center")
            panel.tick_params(labelsize=7)
            if label in routed:
                dead |= _draw_layers(panel, routed[label], experts, palette, key, slot_points)
            else:
                _say_not_measured(panel)
    panels[0][0].set_ylim(0, 1.3 if dead else 1)
    panels[0][0].set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    handles = [Patch(facecolor=palette.colour(e), hatch=palette.hatch(e), edgecolor="white") for e in experts]
    _legend(figure, handles, experts, SHARES[key])
    note = f" (n × above a bar: n experts under {100 * DEAD_SHARE:g} % of an even share)" if dead else ""
    figure.supxlabel(f"layer{note}", fontsize=9)
    return figure


def _draw_layers(
    panel: Axes, routed: dict[str, Any], experts: list[str], palette: Palette, key: str, slot_points: float
) -> bool:
    """The bars of one panel, as one artist per expert (a figure may have ten thousand bars).

    Only the hatch is white: edges would hide small shares.

    Args:
        slot_points: about how wide a bar and its gap are.

    Returns:
        Whether a layer has experts under the share that counts as dead.
    """
    shares_LE = routed[key]
    bottom = [0.0] * len(shares_LE)
    for expert, name in enumerate(experts):
        top = [low + layer[expert] for low, layer in zip(bottom, shares_LE, strict=True)]
        bars = [
            [(at - 0.43, low), (at + 0.43, low), (at + 0.43, high), (at - 0.43, high)]
            for at, (low, high) in enumerate(zip(bottom, top, strict=True))
        ]
        look: dict[str, Any] = {"facecolor": palette.colour(name), "hatch": palette.hatch(name) or None}
        panel.add_collection(PolyCollection(bars, edgecolor="white", linewidth=0, **look), autolim=False)
        bottom = top
    panel.set_xlim(-0.6, len(shares_LE) - 0.4)
    # Counted in what is drawn: an expert may have choices, and no first ones.
    counts = [sum(share < DEAD_SHARE / len(experts) for share in layer) for layer in shares_LE]
    look = {"fontsize": min(7.0, 0.9 * slot_points), "rotation": 0 if slot_points > 24 else 90, "in_layout": False}
    for at, count in enumerate(counts):
        if count:
            panel.text(at, 1.04, f"{count} ×", ha="center", va="bottom", **look)
    ticks = _some(range(len(shares_LE)))
    panel.set_xticks(ticks, [str(routed["layers"][at] + 1) for at in ticks])
    return any(counts)


def draw_overlap(models: dict[str, Any]) -> Figure:
    """Per model: how alike two labels are routed, 1 less the mean total variation distance."""
    labels = _labels(models)
    cell, points = (0.42, 7.0) if len(labels) <= 8 else (0.3, 6.0) if len(labels) <= 16 else (0.21, 5.0)
    side = max(1.6, cell * len(labels))
    columns = max(1, min(len(models), int(18 / (side + 1.6))))
    lines = math.ceil(len(models) / columns)
    size = (max(4.5, (side + 1.6) * columns + 0.8), (side + 1.5) * lines)
    figure = Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(models) :]:
        panel.set_axis_off()
    for panel, (name, routed) in zip(panels, models.items(), strict=False):
        panel.set_title(shortened(name, 26), fontsize=9.5)
        own = [label for label in labels if label in routed]
        if not own:
            _say_not_measured(panel)
            continue
        values = [[overlap(routed[a]["choices"], routed[b]["choices"]) for b in own] for a in own]
        panel.imshow(values, vmin=0, vmax=1, cmap="cividis")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "white" if value < 0.6 else "black"
                text = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
                panel.text(column, row, text, ha="center", va="center", fontsize=points, color=ink, in_layout=False)
        names = [shortened(label, 28) for label in own]
        panel.set_xticks(range(len(own)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
        panel.set_yticks(range(len(own)), names, fontsize=7)
    scale = ScalarMappable(Normalize(0, 1), "cividis")
    bar = figure.colorbar(scale, ax=list(panels), shrink=0.8, aspect=30)
    bar.set_label("overlap of routing, all choices (1: the same)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_entropy(models: dict[str, Any], experts: list[str]) -> Figure:
    """Per model: mean entropy of the routing probabilities over the layers, a line per label."""
    labels = _labels(models)
    looks = {label: _line(at) for at, label in enumerate(labels)}
    columns = min(3, len(models))
    lines = math.ceil(len(models) / columns)
    figure = Figure(figsize=(PAGE_WIDTH_INCHES, 0.4 + 2.4 * lines), layout="constrained")
    panels: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(models) :]:
        panel.set_axis_off()
    for panel, (name, routed) in zip(panels.flat, models.items(), strict=False):
        for label, look in looks.items():
            if label in routed:
                share = [value / math.log(max(len(experts), 2)) for value in routed[label]["entropy"]]
                panel.plot([layer + 1 for layer in routed[label]["layers"]], share, **look)
        panel.set_title(shortened(name, 26), fontsize=9.5)
        panel.set_ylim(0, 1.05)
        panel.set_xticks(_some(sorted({layer + 1 for of in routed.values() for layer in of["layers"]})))
        panel.grid(axis="y", color=FAINT)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=7)
    for panel in panels[:, 0]:
        panel.set_ylabel("entropy / even routing's", fontsize=8.5)
    title = "Entropy of the routing probabilities (1: even over all experts)"
    _legend(figure, [Line2D([], [], **look) for look in looks.values()], labels, title)
    figure.supxlabel("layer", fontsize=9)
    return figure


def _line(at: int) -> dict[str, Any]:
    """The look of line number ``at``. Not by Palette, which takes a and expert-a, btx and finetune for one."""
    turn, colour = divmod(at, len(CYCLE))
    look = {"color": CYCLE[colour], "linestyle": DASHES[turn % len(DASHES)], "marker": MARKERS[turn % len(MARKERS)]}
    return {**look, "linewidth": 1.2, "markersize": 3}


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str], title: str) -> None:
    """A legend above the panels: as many columns as fit, and the figure higher by what its rows take.

    With handles of its own: gathered ones leave out names with an underscore, and what the first panel lacks.
    """
    texts = [shortened(name, 28) for name in names]
    widest = max((TextPath((0, 0), text, size=LEGEND_POINTS).get_extents().width for text in texts), default=0.0)
    entry = widest + 6 * LEGEND_POINTS  # its handle and the gaps
    columns = max(1, int(figure.get_figwidth() * POINTS_PER_INCH / entry))
    rows = math.ceil(len(texts) / columns)
    style: dict[str, Any] = {"frameon": False, "fontsize": LEGEND_POINTS, "handlelength": 2.6, "columnspacing": 1.8}
    legend = figure.legend(
        handles, texts, title=title, loc="outside upper center", ncols=math.ceil(len(texts) / max(rows, 1)), **style
    )
    legend.get_title().set(fontsize=10.5, fontweight="bold")
    figure.set_figheight(figure.get_figheight() + (1.6 * rows + 2.5) * LEGEND_POINTS / POINTS_PER_INCH)


def _say_not_measured(panel: Axes) -> None:
    panel.text(0.5, 0.5, "not measured", ha="center", va="center", fontsize=8, transform=panel.transAxes)
    panel.set_xticks([])


def _some(layers: Sequence[int]) -> Sequence[int]:
    """At most eight of the layers, evenly spaced: those whose number is written."""
    return layers[:: math.ceil(len(layers) / 8) or 1]


def _wrapped(label: str) -> str:
    """A label as it may stand left of a row: a domain, and below it the task."""
    return "/\n".join(shortened(part, 22) for part in label.split("/"))


def _labels(models: dict[str, Any]) -> list[str]:
    """All labels, tasks of one domain side by side, in the order in which domains were first given."""
    labels = list(dict.fromkeys(label for routed in models.values() for label in routed))
    domains = list(dict.fromkeys(label.partition("/")[0] for label in labels))
    return sorted(labels, key=lambda label: domains.index(label.partition("/")[0]))
