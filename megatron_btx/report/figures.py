"""Figures of a plain run: losses and routing. Their titles say what they show, from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_btx.report.comparisons import routing_distances
from megatron_btx.report.inputs import BTX, DENSE, MIX, SEED, Model
from megatron_btx.report.quantities import is_usable, loss_text, mean
from megatron_btx.report.stages import Stage
from megatron_btx.report.style import (
    FIXED_COLOURS,
    INK,
    Figure,
    Palette,
    draw_shares,
    new_page,
    plain_axes,
    say_absent,
    set_title,
    shorten,
    shorten_all,
)

LOSS_PANELS, ROUTING_DOMAINS, MODELS_SHOWN, MIXTURES_SHOWN = 10, 12, 40, 4
"""What a figure shows at most; the tables and results.json have everything."""
_MOMENTS = {MIX: "before finetuning", BTX: "after finetuning"}


def make_palette(models: Mapping[str, Model], stages: Sequence[Stage]) -> Palette:
    """One palette for all figures of a run: experts first, so that they get the clearest colours."""
    names: list[str] = []
    for model in models.values():
        names += model.experts
    names += [name for name, model in models.items() if model.is_expert()]
    names += models
    names += [stage.name for stage in stages if stage.curve]
    return Palette(names)


def draw_losses(all_models: Sequence[Model], domains: tuple[str, ...], palette: Palette, on_split: str) -> Figure:
    """Losses: one panel per domain, as far as they fit, and one for their mean, one row per model."""
    models = all_models
    if len(models) > MODELS_SHOWN:
        models = sorted(models, key=Model.is_expert)[:MODELS_SHOWN]  # single experts are the many
    shown = domains
    if len(domains) >= LOSS_PANELS:
        shown = domains[: LOSS_PANELS - 1]
    columns = []
    for domain in shown:
        columns.append((domain, [model.losses.get(domain) for model in models]))
    if len(domains) > 1:
        columns.append((f"mean, {len(domains)} domains", [model.mean_loss(domains) for model in models]))
    per_row = min(len(columns), 5)
    rows = math.ceil(len(columns) / per_row)
    figure = new_page(rows * (0.9 + 0.27 * len(models)) + 0.7)
    axes = figure.subplots(rows, per_row, sharey=True, squeeze=False)
    for panel in axes.flat[len(columns) :]:
        panel.set_visible(False)
    for panel, (title, losses) in zip(axes.flat, columns, strict=False):
        _draw_loss_panel(panel, losses, models, palette)
        panel.set_title(shorten(title), fontsize=9.5, color=INK)
    axes.flat[0].set_yticks(range(len(models)), shorten_all(model.name for model in models))
    axes.flat[0].set_ylim(len(models) - 0.5, -0.5)
    set_title(figure, say_lowest_loss(all_models, domains))
    figure.supxlabel(f"loss{on_split}, nats per token (lower is better; each panel has its own scale)", fontsize=9)
    return figure


def _draw_loss_panel(panel: Axes, losses: list[float | None], models: Sequence[Model], palette: Palette) -> None:
    finite = [loss for loss in losses if loss is not None and is_usable(loss)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    span = (high - low) or 1.0
    panel.set_xlim(low - 0.12 * span, high + 0.55 * span)
    for row, (model, loss) in enumerate(zip(models, losses, strict=True)):
        if loss is None:
            panel.text(low, row, "not evaluated", va="center", fontsize=7.5, color=INK, style="italic")
        elif not is_usable(loss):
            panel.text(low, row, loss_text(loss), va="center", fontsize=7.5, color=INK, style="italic")
        else:
            if model.name == SEED:
                panel.axvline(loss, color=FIXED_COLOURS[SEED], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            panel.plot(loss, row, "o", color=palette.colour(model.name), markersize=6.5, zorder=3)
            _write_loss(panel, loss, row, is_best=loss == low)
    plain_axes(panel, grid="y")
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], prune="upper"))


def _write_loss(panel: Axes, loss: float, row: int, is_best: bool) -> None:
    """Write a loss beside its point, in bold when it is the lowest."""
    weight = "normal"
    if is_best:
        weight = "bold"
    panel.annotate(
        f"{loss:.3f}",
        (loss, row),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=INK,
        fontweight=weight,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        zorder=2,
    )


def say_lowest_loss(models: Sequence[Model], domains: tuple[str, ...]) -> str:
    """Who has the lowest mean loss, as a sentence."""
    means = {}
    for model in models:
        loss = model.mean_loss(domains)
        if loss is not None:
            means[model.name] = loss
    finite = {name: loss for name, loss in means.items() if math.isfinite(loss)}
    if not finite:
        return "Loss per model and domain"
    lowest = min(finite.values())
    best = [name for name, loss in finite.items() if loss == lowest]
    measure = "loss"
    if len(domains) > 1:
        measure = "mean loss"
    names = " and ".join(map(shorten, best[:3]))
    message = f"Lowest {measure} of {len(means)} models: {names}, {loss_text(lowest)}"
    if best == [BTX] and DENSE not in means:
        message += ", the only one that was finetuned"
    if BTX in finite and BTX not in best:
        message += f" (btx: {loss_text(finite[BTX])})"
    return message


def draw_routing(all_mixtures: Sequence[Model], palette: Palette) -> Figure:
    """Share of tokens per expert: panels are domains, bars layers, rows mixtures (before and after finetuning)."""
    mixtures = all_mixtures[:MIXTURES_SHOWN]
    routed: dict[str, None] = {}
    for model in mixtures:
        routed |= dict.fromkeys(model.routing or {})
    domains = list(routed)[:ROUTING_DOMAINS]
    per_row = min(len(domains), 4)
    bands = math.ceil(len(domains) / per_row)
    figure = new_page(1.0 + 1.75 * bands * len(mixtures))
    axes = figure.subplots(bands * len(mixtures), per_row, sharey=True, squeeze=False)
    for panel in axes.flat:
        panel.set_visible(False)
    for number, domain in enumerate(domains):
        band, column = divmod(number, per_row)
        for row, model in enumerate(mixtures):
            panel = axes[band * len(mixtures) + row][column]
            panel.set_visible(True)
            _draw_routing_panel(panel, model, domain, palette)
            if row == 0:
                panel.set_title(shorten(domain), fontsize=9.5, color=INK)
            if column == 0:
                panel.set_ylabel(f"{_name_moment(model.name)}\nshare of tokens", fontsize=8.5)
    for panel in axes[-1]:
        panel.set_xlabel("layer", fontsize=9)
    _add_expert_legend(figure, mixtures, palette)
    set_title(figure, say_routing(mixtures[-1]))
    return figure


def _draw_routing_panel(panel: Axes, model: Model, domain: str, palette: Palette) -> None:
    layers = (model.routing or {}).get(domain, ())
    draw_shares(panel, layers, model.experts, palette, range(len(layers)))
    plain_axes(panel, grid="")
    if not layers:
        say_absent(panel, "not recorded")


def _add_expert_legend(figure: Figure, mixtures: Sequence[Model], palette: Palette) -> None:
    experts: dict[str, None] = {}
    for model in mixtures:
        experts |= dict.fromkeys(model.experts)
    handles, labels = [], []
    for name in experts:
        handles.append(Patch(facecolor=palette.colour(name), hatch=palette.hatch(name), edgecolor="white"))
        label = f"{shorten(name)} expert"
        if name == SEED:
            label += " (generalist)"
        labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=8.5)


def say_routing(model: Model) -> str:
    """How far the domains' routing lies apart in ``model``, as a sentence."""
    moment = _name_moment(model.name)
    if not model.chooses_experts():
        return f"Where tokens go {moment}: soft routing sends each to every expert"
    distances = list(filter(math.isfinite, routing_distances(model).values()))
    if not distances:
        return f"Where tokens go {moment}"
    percent = f"{100 * mean(distances):.0f} %"
    return f"Where tokens go: {moment}, two domains' routing differs by {percent} on average"


def _name_moment(name: str) -> str:
    return _MOMENTS.get(name, shorten(name))
