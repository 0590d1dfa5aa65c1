"""Figures of an ablation: the losses of its variants, and how each loads its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_btx.report.ablation_outcomes import MEAN, Outcome, losses_over_seeds
from megatron_btx.report.quantities import is_usable, loss_text, mean, spread
from megatron_btx.report.style import (
    CYCLE,
    add_heat_scale,
    choose_ticks,
    draw_heat_map,
    make_panels,
    new_page,
    plain_axes,
    shorten,
    shorten_all,
    write_percent,
)

CELLS_WRITTEN = 80
"""Up to so many cells of a load have their number in the figure; more would lie over each other."""

Runs = Mapping[str, Mapping[int, Outcome]]


def draw_variants(variants: Runs, on_split: str) -> Figure:
    """Mean loss per variant: a point for each seed, and mean ± deviation."""
    figure = new_page(1.0 + 0.38 * len(variants))
    panel = figure.subplots()
    for row, runs in enumerate(variants.values()):
        _draw_seeds(panel, row, losses_over_seeds(runs, MEAN))
    panel.set_yticks(range(len(variants)), shorten_all(variants, 30))
    panel.invert_yaxis()
    plain_axes(panel, grid="x")
    panel.set_xlabel(f"loss{on_split}, mean of domains (nats per token)")
    return figure


def _draw_seeds(panel: Axes, row: int, losses: Sequence[float]) -> None:
    usable = list(filter(is_usable, losses))
    broken = [loss_text(loss) for loss in losses if not is_usable(loss)]
    panel.plot(usable, [row] * len(usable), "o", color=CYCLE[0], alpha=0.45, markersize=5, markeredgewidth=0)
    if broken:
        where = panel.get_yaxis_transform()
        panel.text(0.01, row, ", ".join(broken), transform=where, va="center", fontsize=8, style="italic")
        return
    average, deviation = spread(losses)
    if math.isnan(deviation):
        deviation = 0.0
    panel.errorbar(average, row, xerr=deviation, fmt="|", color="black", capsize=4)


def draw_loads(variants: Runs) -> Figure:
    """Load per layer and expert of every variant, mean over its seeds."""
    columns = min(5, len(variants))
    figure = new_page(1.9 * math.ceil(len(variants) / columns))
    panels = make_panels(figure, len(variants), columns)
    for panel, (variant, runs) in zip(panels, variants.items(), strict=True):
        load_LE = _mean_loads([outcome.loads for outcome in runs.values()])
        layers, experts = len(load_LE), len(load_LE[0])
        if layers * experts <= CELLS_WRITTEN:
            draw_heat_map(panel, load_LE, write_percent)
        else:
            draw_heat_map(panel, load_LE, lambda share: "")
        panel.set_title(shorten(variant), fontsize=8)
        panel.set_xticks(choose_ticks(range(experts)))
        ticks = choose_ticks(range(layers))
        panel.set_yticks(ticks, [str(layer + 1) for layer in ticks])
        panel.tick_params(labelsize=7, length=0)
    add_heat_scale(figure, panels, "share of the layer's choices")
    figure.supxlabel("expert, in the order of the mix", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    return figure


def _mean_loads(loads: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Per layer and expert the mean over the seeds."""
    means = []
    for layer_rows in zip(*loads, strict=True):
        means.append([mean(shares) for shares in zip(*layer_rows, strict=True)])
    return means
