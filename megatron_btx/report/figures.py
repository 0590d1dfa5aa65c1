"""Figures of a report: losses, training curves, losses while finetuning, and load. Titles say what the numbers say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_btx.report import style
from megatron_btx.report.inputs import RunData
from megatron_btx.report.models import (
    BASELINES,
    BTX,
    EXPERT,
    MIX,
    SEED,
    Cast,
    Line,
    Model,
    find_best,
    routing_distances,
)
from megatron_btx.report.quantities import is_usable, loss_text, mean, spread
from megatron_btx.report.routing import draw_shares
from megatron_btx.report.sections import Study, find_loads, find_watched
from megatron_btx.report.stages import MEAN, Stage, make_curve
from megatron_btx.report.style import FIXED_COLOURS, INK, Palette, shorten, shorten_all
from megatron_btx.runner.schemas import LOSS

LOSS_PANELS, ROUTING_DOMAINS, LINES_SHOWN, MIXTURES_SHOWN = 10, 12, 40, 4
"""What a figure shows at most; the tables and results.json have everything."""
NAMED_CURVES = 16
"""Of a panel: a legend of more would leave no room for them."""
CELLS_WRITTEN = 80
"""Up to so many cells of a load have their number in the figure; more would lie over each other."""
PANELS, _OTHERS = {SEED: "seed", EXPERT: "experts"}, "mixture and baselines"
"""Role of the model that is trained -> the panel of its curve; a last one for all other roles."""
_SEED_LINE: dict[str, Any] = {"color": FIXED_COLOURS[SEED], "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}
_MOMENTS = {MIX: "before finetuning", BTX: "after finetuning"}
_LARGE_UNITS = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))


def make_palette(study: Study) -> Palette:
    """One palette for all figures: experts first, so that they get the clearest colours."""
    names: list[str] = []
    for model in study.cast.models:
        names += model.experts
    names += [model.look for model in study.cast.having(EXPERT)]
    names += [model.look for model in study.cast.models]
    for run in study.runs:
        names += looks_of(run).values()
    return Palette(names)


def looks_of(run: RunData) -> dict[str, str]:
    """Stage -> what decides its colour: that of the model it makes."""
    looks = {stage.name: stage.name for stage in run.stages if stage.log.curve}
    for model in run.models:
        if model.stage is not None:
            looks[model.stage.name] = model.look
    return looks


# --- losses ------------------------------------------------------------------------------------------------


def draw_losses(study: Study, palette: Palette) -> Figure:
    """Losses: one panel per domain, as far as they fit, and one for their mean; one row per model or variant."""
    lines, domains = study.lines, study.domains
    if len(lines) > LINES_SHOWN:  # single experts are the many
        lines = tuple(sorted(lines, key=lambda line: any(model.role == EXPERT for model in line.models))[:LINES_SHOWN])
    columns: dict[str, tuple[str, ...]] = {domain: (domain,) for domain in domains[: LOSS_PANELS - 1]}
    if len(domains) > 1:
        columns[f"mean, {len(domains)} domains"] = domains
    per_row = min(len(columns), 5)
    rows = math.ceil(len(columns) / per_row)
    figure = style.new_page(rows * (0.9 + 0.27 * len(lines)) + 0.7)
    panels = style.make_panels(figure, len(columns), per_row, share_y=True)
    for panel, (title, data) in zip(panels, columns.items(), strict=True):
        _draw_loss_panel(panel, lines, data, palette)
        panel.set_title(shorten(title), fontsize=9.5, color=INK)
    panels[0].set_yticks(range(len(lines)), shorten_all((line.label for line in lines), 30))
    panels[0].set_ylim(len(lines) - 0.5, -0.5)
    style.set_title(figure, say_lowest_loss(study.cast, study.lines))
    unit = "nats per token (lower is better; each panel has its own scale)"
    figure.supxlabel(f"loss{study.on_split}, {unit}", fontsize=9)
    return figure


def _draw_loss_panel(panel: Axes, lines: Sequence[Line], data: Sequence[str], palette: Palette) -> None:
    losses = [line.values(LOSS, data) for line in lines]
    usable = [list(filter(is_usable, values)) for values in losses]
    finite = sum(usable, [])
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    lowest = min((mean(values) for values in usable if values), default=math.nan)
    span = (high - low) or 1.0
    panel.set_xlim(low - 0.12 * span, high + 0.55 * span)
    for row, (line, values) in enumerate(zip(lines, losses, strict=True)):
        broken = [loss_text(loss) for loss in values if not is_usable(loss)] or ["not evaluated"] * (not values)
        if usable[row]:
            model = line.models[0]
            if model.role == SEED:
                panel.axvline(values[0], **_SEED_LINE)
            colour = palette.colour(model.look)
            if len(values) > 1:
                panel.plot(usable[row], [row] * len(usable[row]), "o", color=colour, alpha=0.45, markersize=4, zorder=3)
            if not broken:
                _draw_mean(panel, row, values, colour, lowest)
        if broken:
            panel.text(low, row, ", ".join(broken), va="center", fontsize=7.5, color=INK, style="italic")
    style.plain_axes(panel, grid="y")
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], prune="upper"))


def _draw_mean(panel: Axes, row: int, values: Sequence[float], colour: str, lowest: float) -> None:
    """Draw a model's loss, or the mean of a variant's seeds with its deviation, and write it beside the points."""
    average, deviation = spread(values)
    if math.isnan(deviation):
        panel.plot(average, row, "o", color=colour, markersize=6.5, zorder=3)
    else:
        panel.errorbar(average, row, xerr=deviation, fmt="|", color="black", capsize=3, zorder=3)
    panel.annotate(
        f"{average:.3f}",
        (max(values), row),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=INK,
        fontweight="bold" if average == lowest else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        zorder=2,
    )


def say_lowest_loss(cast: Cast, lines: Sequence[Line]) -> str:
    """Who has the lowest mean loss, as a sentence."""
    best = find_best(lines, cast.domains)
    if not best:
        return "Loss per model and domain"
    compared = [line for line in lines if line.values(LOSS, cast.domains)]
    lowest = mean(best[0].values(LOSS, cast.domains))
    measure = "mean loss" if len(cast.domains) > 1 else "loss"
    names = " and ".join(shorten(line.label) for line in best[:3])
    message = f"Lowest {measure} of {len(compared)} models: {names}, {loss_text(lowest)}"
    mixture, own = cast.find(BTX), cast.loss(BTX)
    is_best = [line.models for line in best] == [[mixture]]
    if is_best and not any(map(cast.find, BASELINES)):
        message += ", the only one that was finetuned"
    is_alone = mixture is not None and not mixture.run
    if is_alone and own is not None and math.isfinite(own) and own != lowest:
        message += f" (btx: {loss_text(own)})"
    return message


# --- curves ------------------------------------------------------------------------------------------------


def draw_curves(study: Study, palette: Palette) -> Figure:
    """Training loss over tokens of every stage, in the panel of the model that it makes."""
    run = study.runs[0]
    looks, trained = looks_of(run), [stage for stage in run.stages if stage.log.curve]
    curves = {stage.name: make_curve(stage) for stage in trained}
    roles = {model.stage.name: model.role for model in run.models if model.stage is not None}
    groups: dict[str, list[Stage]] = {title: [] for title in (*PANELS.values(), _OTHERS)}
    for stage in sorted(trained, key=lambda stage: palette.rank(looks[stage.name])):
        groups[PANELS.get(roles.get(stage.name, ""), _OTHERS)].append(stage)
    groups = {title: stages for title, stages in groups.items() if stages}
    figure = style.new_page(3.9)
    for panel, (group, stages) in zip(style.make_panels(figure, len(groups), len(groups)), groups.items(), strict=True):
        members = [curves[stage.name] for stage in stages]
        scale, prefix = _choose_unit(max(curve.x[-1] for curve in members))
        for number, (stage, curve) in enumerate(zip(stages, members, strict=True)):
            x = [position / scale for position in curve.x]
            colour, dash = palette.colour(looks[stage.name]), palette.dash(looks[stage.name])
            label = shorten(stage.name) + " (unfinished)" * bool(stage.unfinished)
            if number >= NAMED_CURVES:
                label = "_unnamed"
            panel.plot(x, _with_gaps(curve.loss), color=colour, linewidth=0.6, alpha=0.3)
            panel.plot(x, _with_gaps(curve.smooth), color=colour, linestyle=dash, linewidth=1.7, label=label)
        panel.set_xlabel(" and ".join(sorted({f"{prefix}{curve.unit}" for curve in members})), fontsize=9)
        panel.legend(frameon=False, fontsize=8, loc="best")
        _finish_curves(panel, [curve.smooth for curve in members])
        panel.set_title(group, fontsize=9.5, color=INK)
    figure.axes[0].set_ylabel("training loss, nats per token", fontsize=9)
    style.set_title(figure, say_fall({name: curve.loss for name, curve in curves.items()}))
    return figure


def draw_watched(study: Study, palette: Palette) -> Figure:
    """Loss per domain while models were trained: a panel for each domain, as far as they fit, and for their mean."""
    cast = study.cast
    watched = find_watched(cast)[:NAMED_CURVES]
    looks = [model.look for model, _ in watched]
    if len(set(looks)) < len(looks):  # several seeds or runs of one role
        looks = [f"{model.name} {model.run}" for model, _ in watched]
        palette = Palette(looks)
    domains: dict[str, None] = {}
    ends, units = [], set()
    for _, stage in watched:
        scale, unit = stage.progress_unit()
        units.add(unit)
        domains |= dict.fromkeys(domain for domain in stage.log.watched if domain != MEAN)
        ends += [curve[-1][0] * scale for curve in stage.log.watched.values()]
    divisor, prefix = _choose_unit(max(ends))
    shown = list(domains)[: LOSS_PANELS - 1]
    if len(domains) > 1:
        shown.append(MEAN)
    per_row = min(len(shown), 5)
    figure = style.new_page(0.9 + 1.9 * math.ceil(len(shown) / per_row))
    panels = style.make_panels(figure, len(shown), per_row)
    for panel, domain in zip(panels, shown, strict=True):
        drawn = []
        for (model, stage), look in zip(watched, looks, strict=True):
            curve = list(stage.log.watched.get(domain, ()))
            start = cast.loss(MIX, domain)
            if curve and start is not None and model.role == BTX and not model.row.variant:
                curve = [(0, start), *curve]  # the mixture begins with what the mix was measured to have
            x = [iteration * (stage.progress_unit()[0] / divisor) for iteration, _ in curve]
            drawn.append(_with_gaps([loss for _, loss in curve]))
            label, colour, dash = shorten(model.label, 24), palette.colour(look), palette.dash(look)
            panel.plot(x, drawn[-1], "o", color=colour, linestyle=dash, markersize=2.5, linewidth=1.4, label=label)
        seed = cast.loss(SEED, domain)
        if seed is not None and is_usable(seed):
            panel.axhline(seed, **_SEED_LINE)
        panel.set_title(shorten(domain), fontsize=9.5, color=INK)
        _finish_curves(panel, drawn)
        panel.xaxis.set_major_locator(MaxNLocator(3))
    panels[0].legend(frameon=False, fontsize=8, loc="best")
    figure.supxlabel(" and ".join(f"{prefix}{unit}" for unit in sorted(units)), fontsize=9)
    figure.supylabel(f"loss{study.on_split}, nats per token", fontsize=9)
    style.set_title(figure, "Loss per domain while finetuning")
    return figure


def _choose_unit(largest: float) -> tuple[float, str]:
    for scale, prefix in _LARGE_UNITS:
        if largest >= scale:
            return scale, prefix
    return 1.0, ""


def _with_gaps(losses: Sequence[float]) -> list[float]:
    """The same with a gap where a loss is none."""
    return [loss if is_usable(loss) else math.nan for loss in losses]


def _finish_curves(panel: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Axes from zero on, whose loss ends just above the curves: the first noisy steps must not flatten the rest."""
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.set_xlim(0, None)
    style.plain_axes(panel, grid="both")
    finite: list[float] = []
    for curve in curves:
        finite += filter(is_usable, curve)
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.06 * (high - low) or 0.1
        panel.set_ylim(low - 2 * margin, high + 2 * margin)


def say_fall(losses: Mapping[str, Sequence[float]]) -> str:
    """Whether every stage ended below where it began: the mean of its last tenth below that of its first."""
    unfallen = []
    for stage, curve in losses.items():
        tenth = math.ceil(len(curve) / 10)
        if not mean(curve[-tenth:]) < mean(curve[:tenth]):  # nor when a loss there is not finite
            unfallen.append(shorten(stage))
    if unfallen:
        return "Training loss; it did not fall in " + ", ".join(unfallen[:4])
    return "Training loss fell in every stage" if len(losses) > 1 else "Training loss fell"


# --- routing and load --------------------------------------------------------------------------------------


def draw_routing(study: Study, palette: Palette) -> Figure:
    """Share of tokens per expert and layer: rows are domains, columns mixtures (before and after finetuning)."""
    all_mixtures = study.cast.mixtures()
    experts = all_mixtures[-1].experts
    mixtures = [model for model in all_mixtures if model.experts == experts][-MIXTURES_SHOWN:]
    shown: dict[str, dict[str, Any]] = {}
    for model in mixtures:
        texts = shown.setdefault(_MOMENTS.get(model.role, model.name), {})
        for domain, layers in list((model.routing or {}).items())[:ROUTING_DOMAINS]:
            # Without the dense layers, which have zeros alone.
            kept = {layer: shares for layer, shares in enumerate(layers) if any(shares)}
            texts[domain] = {"layers": list(kept), "choices": list(kept.values())}
    return draw_shares(shown, experts, palette=palette, title=say_routing(mixtures[-1]))


def say_routing(model: Model) -> str:
    """How far the domains' routing lies apart in ``model``, as a sentence."""
    moment = _MOMENTS.get(model.role, shorten(model.name))
    if not model.chooses_experts():
        return f"Where tokens go {moment}: soft routing sends each to every expert"
    distances = list(filter(math.isfinite, routing_distances(model).values()))
    if not distances:
        return f"Where tokens go {moment}"
    percent = f"{100 * mean(distances):.0f} %"
    return f"Where tokens go: {moment}, two domains' routing differs by {percent} on average"


def draw_loads(study: Study, _: Palette) -> Figure:
    """Load per layer and expert of every variant, mean over its seeds."""
    variants = find_loads(study)
    columns = min(5, len(variants))
    figure = style.new_page(1.9 * math.ceil(len(variants) / columns))
    panels = style.make_panels(figure, len(variants), columns)
    for panel, (variant, seeds) in zip(panels, variants.items(), strict=True):
        load_LE = []
        for layers in zip(*seeds, strict=False):
            load_LE.append([mean(shares) for shares in zip(*layers, strict=False)])
        experts = len(load_LE[0])
        style.draw_heat_map(panel, load_LE, style.write_percent if len(load_LE) * experts <= CELLS_WRITTEN else None)
        panel.set_title(shorten(variant), fontsize=8)
        panel.set_xticks(style.choose_ticks(experts))
        ticks = style.choose_ticks(len(load_LE))
        panel.set_yticks(ticks, [str(layer + 1) for layer in ticks])
        panel.tick_params(labelsize=7, length=0)
    style.add_heat_scale(figure, panels, "share of the layer's choices")
    figure.supxlabel("expert, in the order of the mix", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    return figure


FIGURES: Mapping[str, Callable[[Study, Palette], Figure]] = {
    "losses.png": draw_losses,
    "curves.png": draw_curves,
    "finetuning.png": draw_watched,
    "routing.png": draw_routing,
    "load.png": draw_loads,
}
"""An image of a section, by its name -> what draws it."""
