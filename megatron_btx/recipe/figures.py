"""The report's figures, drawn with matplotlib on a plain canvas: no display, no global state.

Colours are from the Okabe-Ito and Tol sets, which stay apart for colour-blind readers. An expert has one colour in
every figure: as a model, as a training stage, and as a share of the routing. Each function returns a Figure whose
title says what it shows in this run, computed from the numbers.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_btx.recipe.facts import in_digits, routing_distances
from megatron_btx.recipe.report_inputs import EXPERT_PREFIX, Model, Stage

PAGE_WIDTH_INCHES = 9.0
DOTS_PER_INCH = 160
INK, FAINT = "#222222", "#d9d9d9"
FIXED_COLOURS = {
    "seed": "#7a7a7a",
    "average": "#b8a26a",
    "mix": "#f0a58a",
    "btx": "#c8401c",
    "finetune": "#c8401c",
    "dense": "#222222",
    "dense-domains": "#8a8a8a",
}
CYCLE = ("#0072b2", "#e69f00", "#009e73", "#aa4499", "#56b4e9", "#999933", "#332288", "#cc6677", "#44aa99", "#ddcc77")
HATCHES = ("", "///", "...", "xxx")
DASHES = ("-", "--", ":", "-.")
TITLE = {"fontsize": 12, "fontweight": "bold", "color": INK, "x": 0.01, "ha": "left"}
MAX_POINTS_PER_CURVE = 400
LARGE_UNITS = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))


class Palette:
    """A colour per name, the same in every figure; beyond ten names the colours repeat with a hatch or a dash."""

    def __init__(self, names: Sequence[str]) -> None:
        own = dict.fromkeys(name.removeprefix(EXPERT_PREFIX) for name in names)
        self._index = {name: index for index, name in enumerate(name for name in own if name not in FIXED_COLOURS)}

    def rank(self, name: str) -> int:
        """Where the name stands among those with a colour of their own; the others come last."""
        return self._index.get(name.removeprefix(EXPERT_PREFIX), len(self._index))

    def colour(self, name: str) -> str:
        name = name.removeprefix(EXPERT_PREFIX)
        return FIXED_COLOURS.get(name) or CYCLE[self._index[name] % len(CYCLE)]

    def hatch(self, name: str) -> str:
        return HATCHES[self._round(name) % len(HATCHES)]

    def dash(self, name: str) -> str:
        return DASHES[self._round(name) % len(DASHES)]

    def _round(self, name: str) -> int:
        """How often the colours were used up before this name."""
        return self._index.get(name.removeprefix(EXPERT_PREFIX), 0) // len(CYCLE)


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


def curve_of(stage: Stage) -> Curve:
    """Reduce a stage's training loss to at most some hundred points, and smooth it over about 5 % of its length."""
    size = math.ceil(len(stage.curve) / MAX_POINTS_PER_CURVE)
    parts = [stage.curve[start : start + size] for start in range(0, len(stage.curve), size)]
    scale = stage.tokens_per_iteration or 1.0
    x = [part[-1][0] * scale for part in parts]
    loss = [math.fsum(value for _, value in part) / len(part) for part in parts]
    reach = len(loss) // 40
    # The window opens gradually at the start, where the loss falls fastest: a wide one would hide the first value.
    windows = [loss[at - min(reach, at) : at + min(reach, at) + 1] for at in range(len(loss))]
    smooth = [math.fsum(window) / len(window) for window in windows]
    unit = "tokens" if stage.tokens_per_iteration else "iterations"
    return Curve(stage.name, group_of(stage.name), unit, tuple(x), tuple(loss), tuple(smooth))


def group_of(stage: str) -> str:
    """The panel a training stage is drawn in."""
    return "seed" if stage == "seed" else "experts" if stage.startswith("expert") else "mixture and baselines"


def as_png(figure: Figure) -> bytes:
    """The picture as a file's content: the same for the same numbers."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; tables and JSON have it in full.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(content, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return content.getvalue()


def shortened(name: str, limit: int = 18) -> str:
    """A name as it may stand in a figure: one line, not too long, and no mathematics where it has a dollar."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return (name if len(name) <= limit else f"{name[: limit - 1]}…").replace("$", r"\$")


def draw_losses(models: Sequence[Model], domains: tuple[str, ...], palette: Palette) -> Figure:
    """Validation loss: one panel per domain and one for their mean, one row per model."""
    columns = [(domain, [model.losses.get(domain) for model in models]) for domain in domains]
    if len(domains) > 1:
        columns.append(("mean over domains", [model.mean_loss(domains) for model in models]))
    per_row = min(len(columns), 5)
    rows = math.ceil(len(columns) / per_row)
    figure = _page(rows * (0.9 + 0.27 * len(models)) + 0.7)
    axes = figure.subplots(rows, per_row, sharey=True, squeeze=False)
    for panel in axes.flat[len(columns) :]:
        panel.set_visible(False)
    for at, (title, losses) in enumerate(columns):
        _draw_loss_panel(axes.flat[at], title, losses, models, palette)
    axes.flat[0].set_yticks(range(len(models)), [shortened(model.name) for model in models])
    axes.flat[0].set_ylim(len(models) - 0.5, -0.5)
    figure.suptitle(losses_message(models, domains), **TITLE)
    figure.supxlabel("validation loss, nats per token (lower is better; each panel has its own scale)", fontsize=9)
    return figure


def _draw_loss_panel(
    panel: Axes, title: str, losses: list[float | None], models: Sequence[Model], palette: Palette
) -> None:
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = (high - low) or 1.0
    panel.set_xlim(low - 0.12 * span, high + 0.55 * span)
    seed = next((loss for model, loss in zip(models, losses, strict=True) if model.name == "seed"), None)
    if seed is not None and math.isfinite(seed):
        panel.axvline(seed, color=FIXED_COLOURS["seed"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for row, (model, loss) in enumerate(zip(models, losses, strict=True)):
        if loss is None or not math.isfinite(loss):
            text = "not evaluated" if loss is None else in_digits(loss)
            panel.text(low, row, text, va="center", fontsize=7.5, color=INK, style="italic")
            continue
        best = loss == low
        panel.plot(loss, row, "o", color=palette.colour(model.name), markersize=6.5, zorder=3)
        panel.annotate(
            f"{loss:.3f}",
            (loss, row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=INK,
            fontweight="bold" if best else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=2,
        )
    panel.set_title(shortened(title), fontsize=9.5, color=INK)
    _plain_axes(panel, grid="y")
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], prune="upper"))


def losses_message(models: Sequence[Model], domains: tuple[str, ...]) -> str:
    """Who has the lowest mean loss, as a sentence."""
    means = {model.name: mean for model in models if (mean := model.mean_loss(domains)) is not None}
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not finite:
        return "Validation loss per model and domain"
    best = min(finite, key=finite.__getitem__)
    over = "mean validation loss" if len(domains) > 1 else "validation loss"
    message = f"Lowest {over} of {len(means)} models: {shortened(best)}, {finite[best]:.3f}"
    return message + (f" (btx: {finite['btx']:.3f})" if best != "btx" and "btx" in finite else "")


def draw_curves(curves: Sequence[Curve], palette: Palette) -> Figure:
    """Training loss over tokens, one panel per group of stages."""
    groups = sorted({curve.group for curve in curves}, key=["seed", "experts", "mixture and baselines"].index)
    figure = _page(3.9)
    for panel, group in zip(figure.subplots(1, len(groups), squeeze=False).flat, groups, strict=True):
        members = sorted((curve for curve in curves if curve.group == group), key=lambda one: palette.rank(one.stage))
        largest = max(curve.x[-1] for curve in members)
        scale, prefix = next((unit for unit in LARGE_UNITS if largest >= unit[0]), (1.0, ""))
        for curve in members:
            x, colour = [position / scale for position in curve.x], palette.colour(curve.stage)
            panel.plot(x, curve.loss, color=colour, linewidth=0.6, alpha=0.3)
            style: dict[str, Any] = {"color": colour, "linestyle": palette.dash(curve.stage), "linewidth": 1.7}
            panel.plot(x, curve.smooth, label=shortened(curve.stage), **style)
        panel.set_title(group, fontsize=9.5, color=INK)
        panel.set_xlabel(" and ".join(sorted({f"{prefix}{curve.unit}" for curve in members})), fontsize=9)
        panel.legend(frameon=False, fontsize=8, loc="best")
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.set_xlim(0, None)
        _plain_axes(panel, grid="both")
        _limit_to_bulk(panel, members)
    figure.axes[0].set_ylabel("training loss, nats per token", fontsize=9)
    figure.suptitle(curves_message(curves), **TITLE)
    return figure


def _limit_to_bulk(panel: Axes, curves: Sequence[Curve]) -> None:
    """End the loss axis just above the smoothed curves, so that the first noisy steps do not flatten the rest."""
    finite = [loss for curve in curves for loss in curve.smooth if math.isfinite(loss)]
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
    return math.fsum(loss[-tenth:]) < math.fsum(loss[:tenth])


def draw_routing(mixtures: Sequence[Model], palette: Palette) -> Figure:
    """Share of tokens per expert: panels are domains, bars layers, rows mixtures (before and after finetuning)."""
    domains = list(dict.fromkeys(domain for model in mixtures for domain in model.routing or {}))
    per_row = min(len(domains), 4)
    bands = [domains[start : start + per_row] for start in range(0, len(domains), per_row)]
    figure = _page(1.0 + 1.75 * len(bands) * len(mixtures))
    axes: Any = figure.subplots(len(bands) * len(mixtures), per_row, sharey=True, squeeze=False)
    for band, members in enumerate(bands):
        for row, model in enumerate(mixtures):
            panels = axes[band * len(mixtures) + row]
            for at, panel in enumerate(panels):
                if at >= len(members):
                    panel.set_visible(False)
                    continue
                _draw_shares(panel, model, members[at], palette)
                if row == 0:
                    panel.set_title(shortened(members[at]), fontsize=9.5, color=INK)
            panels[0].set_ylabel(f"{_moment(model.name)}\nshare of tokens", fontsize=8.5)
    for panel in axes[-1]:
        panel.set_xlabel("layer", fontsize=9)
    experts = list(dict.fromkeys(expert for model in mixtures for expert in model.experts))
    handles = [Patch(facecolor=palette.colour(name), hatch=palette.hatch(name), edgecolor="white") for name in experts]
    labels = [f"{shortened(name)} expert" + (" (generalist)" if name == "seed" else "") for name in experts]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=8.5)
    figure.suptitle(routing_message(mixtures[-1]), **TITLE)
    return figure


def _draw_shares(panel: Axes, model: Model, domain: str, palette: Palette) -> None:
    layers = (model.routing or {}).get(domain, ())
    bottoms = [0.0] * len(layers)
    for index, expert in enumerate(model.experts):
        shares = [layer[index] for layer in layers]
        look: dict[str, Any] = {"color": palette.colour(expert), "hatch": palette.hatch(expert), "edgecolor": "white"}
        panel.bar(range(1, len(layers) + 1), shares, bottom=bottoms, width=0.86, linewidth=0.6, **look)
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
    panel.set_ylim(0, 1)
    panel.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _plain_axes(panel, grid="")
    if not layers:
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", fontsize=8, style="italic")


def routing_message(model: Model) -> str:
    """How far the domains' routing lies apart in ``model``, as a sentence."""
    distances = [distance for distance in routing_distances(model).values() if math.isfinite(distance)]
    if not distances:
        return f"Where tokens go {_moment(model.name)}"
    mean = math.fsum(distances) / len(distances)
    return f"Where tokens go: {_moment(model.name)}, two domains' routing differs by {100 * mean:.0f} % on average"


def _moment(name: str) -> str:
    return {"mix": "before finetuning", "btx": "after finetuning"}.get(name, shortened(name))


def _page(height_inches: float) -> Figure:
    return Figure(figsize=(PAGE_WIDTH_INCHES, height_inches), layout="constrained", facecolor="white")


def _plain_axes(panel: Axes, grid: str) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")
    panel.tick_params(labelsize=8, color="#999999")
    if grid:
        panel.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
        panel.set_axisbelow(True)


def palette_of(models: Mapping[str, Model], stages: Sequence[Stage]) -> Palette:
    """One palette for all figures of a run: experts first, so that they get the clearest colours."""
    experts = [expert for model in models.values() for expert in model.experts]
    single = [name for name in models if name.startswith(EXPERT_PREFIX)]
    return Palette([*experts, *single, *models, *(stage.name for stage in stages if stage.curve)])
