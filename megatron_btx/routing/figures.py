"""Figures of routing, like the paper's: shares per layer and expert, one panel per model, one row per label."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_btx.recipe.figures import FAINT, PAGE_WIDTH_INCHES, Palette
from megatron_btx.routing.analysis import overlap

DOTS_PER_INCH = 160


def write_figures(folder: Path, models: dict[str, Any], experts: list[str]) -> list[str]:
    """Draw everything into ``folder``; returns the files' names."""
    figures = {
        "routing.png": draw_shares(models, experts),
        "overlap.png": draw_overlap(models),
        "entropy.png": draw_entropy(models, experts),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DOTS_PER_INCH, metadata={"Software": None})
    return list(figures)


def draw_shares(models: dict[str, Any], experts: list[str]) -> Figure:
    """Per label (a row) and model (a column): stacked shares of all choices over the layers."""
    labels = _labels(models)
    palette = Palette(experts)
    size = (max(PAGE_WIDTH_INCHES, 2.4 * len(models)), 0.9 + 1.5 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    panels: Any = figure.subplots(len(labels), len(models), squeeze=False, sharey=True)
    for row, label in enumerate(labels):
        for column, (name, routed) in enumerate(models.items()):
            panel = panels[row][column]
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_ylim(0, 1)
            if row == 0:
                panel.set_title(name, fontsize=10)
            if column == 0:
                panel.set_ylabel(label, fontsize=9)
            panel.tick_params(labelsize=7)
            if label not in routed:
                panel.text(0.5, 0.5, "not measured", ha="center", va="center", fontsize=8, transform=panel.transAxes)
                continue
            _draw_layers(panel, routed[label], experts, palette)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 8), frameon=False, fontsize=9)
    figure.supxlabel("layer (a cross: an expert under 1 % of an even share)", fontsize=9)
    figure.supylabel("share of choices", fontsize=9)
    return figure


def _draw_layers(panel: Any, routed: dict[str, Any], experts: list[str], palette: Palette) -> None:
    at = list(range(len(routed["layers"])))
    bottom = [0.0] * len(at)
    for expert, name in enumerate(experts):
        heights = [layer[expert] for layer in routed["choices"]]
        panel.bar(at, heights, 0.85, bottom, label=name, color=palette.colour(name), hatch=palette.hatch(name))
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for layer, dead in enumerate(routed["dead"]):
        if dead:
            panel.text(layer, 1.0, "x" * len(dead), ha="center", va="bottom", fontsize=7)
    step = max(1, len(at) // 8)
    panel.set_xticks(at[::step], [str(routed["layers"][layer] + 1) for layer in at[::step]])


def draw_overlap(models: dict[str, Any]) -> Figure:
    """Per model: how alike two labels are routed, 1 less the mean total variation distance."""
    columns = min(4, len(models))
    lines = math.ceil(len(models) / columns)
    labels = _labels(models)
    side = max(2.2, 0.5 + 0.45 * len(labels))
    figure = Figure(figsize=(max(4.5, (side + 0.6) * columns + 0.8), (side + 0.3) * lines), layout="constrained")
    panels: Any = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(models) :]:
        panel.set_axis_off()
    for panel, (name, routed) in zip(panels, models.items(), strict=False):
        own = [label for label in labels if label in routed]
        values = [[overlap(routed[a]["choices"], routed[b]["choices"]) for b in own] for a in own]
        image = panel.imshow(values, vmin=0, vmax=1, cmap="cividis")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "white" if value < 0.6 else "black"
                panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
        panel.set_xticks(range(len(own)), own, rotation=35, ha="right", fontsize=7)
        panel.set_yticks(range(len(own)), own, fontsize=7)
        panel.set_title(name, fontsize=10)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)
    bar.set_label("overlap of routing (1: the same)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_entropy(models: dict[str, Any], experts: list[str]) -> Figure:
    """Per model: mean entropy of the routing probabilities over the layers, a line per label."""
    labels = _labels(models)
    palette = Palette(labels)
    figure = Figure(figsize=(PAGE_WIDTH_INCHES, 2.9), layout="constrained")
    panels: Any = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, (name, routed) in zip(panels, models.items(), strict=True):
        for label in labels:
            if label in routed:
                share = [value / math.log(max(len(experts), 2)) for value in routed[label]["entropy"]]
                layers = [layer + 1 for layer in routed[label]["layers"]]
                panel.plot(layers, share, marker="o", markersize=3, color=palette.colour(label), label=label)
                panel.set_xticks(layers[:: max(1, len(layers) // 8)])
        panel.set_title(name, fontsize=10)
        panel.set_ylim(0, 1.05)
        panel.grid(axis="y", color=FAINT)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=7)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False, fontsize=9)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("entropy, of even routing", fontsize=9)
    return figure


def _labels(models: dict[str, Any]) -> list[str]:
    """All labels, tasks of one domain side by side, in the order in which domains were first given."""
    labels = list(dict.fromkeys(label for routed in models.values() for label in routed))
    domains = list(dict.fromkeys(label.partition("/")[0] for label in labels))
    return sorted(labels, key=lambda label: domains.index(label.partition("/")[0]))
