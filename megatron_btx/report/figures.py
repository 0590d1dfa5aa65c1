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
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_btx.report.facts import routing_distances
from megatron_btx.report.inputs import EXPERT_PREFIX, Model
from megatron_btx.report.numbers import in_digits, mean, usable
from megatron_btx.report.stages import Stage

PAGE_WIDTH_INCHES = 9.0
DOTS_PER_INCH = 160
LARGEST_PIXELS = 6000
"""Of a picture's height and width: one that would be larger gets fewer dots per inch."""
LOSS_PANELS, ROUTING_DOMAINS, MODELS_SHOWN, MIXTURES_SHOWN = 10, 12, 40, 4
"""What a figure shows at most; the tables and results.json have everything."""
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


def as_png(figure: Figure) -> bytes:
    """The picture as a file's content: the same for the same numbers."""
    content = io.BytesIO()
    dots = min(DOTS_PER_INCH, LARGEST_PIXELS / max(figure.get_size_inches()))
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; tables and JSON have it in full.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(content, format="png", dpi=dots, metadata={"Software": None})
    return content.getvalue()


def shortened(name: str, limit: int = 18) -> str:
    """A name as it may stand in a figure: one line, not too long, and no mathematics where it has a dollar."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return (name if len(name) <= limit else f"{name[: limit - 1]}…").replace("$", r"\$")


def draw_losses(all_models: Sequence[Model], domains: tuple[str, ...], palette: Palette) -> Figure:
    """Validation loss: one panel per domain, as far as they fit, and one for their mean, one row per model."""
    models = all_models if len(all_models) <= MODELS_SHOWN else _without_experts(all_models)[:MODELS_SHOWN]
    shown = domains if len(domains) < LOSS_PANELS else domains[: LOSS_PANELS - 1]
    columns = [(domain, [model.losses.get(domain) for model in models]) for domain in shown]
    if len(domains) > 1:
        columns.append((f"mean, {len(domains)} domains", [model.mean_loss(domains) for model in models]))
    per_row = min(len(columns), 5)
    rows = math.ceil(len(columns) / per_row)
    figure = new_page(rows * (0.9 + 0.27 * len(models)) + 0.7)
    axes = figure.subplots(rows, per_row, sharey=True, squeeze=False)
    for panel in axes.flat[len(columns) :]:
        panel.set_visible(False)
    for at, (title, losses) in enumerate(columns):
        _draw_loss_panel(axes.flat[at], title, losses, models, palette)
    axes.flat[0].set_yticks(range(len(models)), [shortened(model.name) for model in models])
    axes.flat[0].set_ylim(len(models) - 0.5, -0.5)
    figure.suptitle(losses_message(all_models, domains), **TITLE)
    figure.supxlabel("validation loss, nats per token (lower is better; each panel has its own scale)", fontsize=9)
    return figure


def _without_experts(models: Sequence[Model]) -> list[Model]:
    """The models, single experts last: where not all can be shown, those are the many."""
    return sorted(models, key=lambda model: model.name.startswith(EXPERT_PREFIX))


def _draw_loss_panel(
    panel: Axes, title: str, losses: list[float | None], models: Sequence[Model], palette: Palette
) -> None:
    finite = [loss for loss in losses if loss is not None and usable(loss)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    span = (high - low) or 1.0
    panel.set_xlim(low - 0.12 * span, high + 0.55 * span)
    seed = next((loss for model, loss in zip(models, losses, strict=True) if model.name == "seed"), None)
    if seed is not None and usable(seed):
        panel.axvline(seed, color=FIXED_COLOURS["seed"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    for row, (model, loss) in enumerate(zip(models, losses, strict=True)):
        if loss is None or not usable(loss):
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
    plain_axes(panel, grid="y")
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], prune="upper"))


def losses_message(models: Sequence[Model], domains: tuple[str, ...]) -> str:
    """Who has the lowest mean loss, as a sentence."""
    means = {model.name: loss for model in models if (loss := model.mean_loss(domains)) is not None}
    finite = {name: loss for name, loss in means.items() if math.isfinite(loss)}
    if not finite:
        return "Validation loss per model and domain"
    lowest = min(finite.values())
    best = [name for name in finite if finite[name] == lowest]
    over = "mean validation loss" if len(domains) > 1 else "validation loss"
    message = f"Lowest {over} of {len(means)} models: {' and '.join(map(shortened, best[:3]))}, {in_digits(lowest)}"
    return message + (f" (btx: {in_digits(finite['btx'])})" if "btx" not in best and "btx" in finite else "")


def draw_routing(all_mixtures: Sequence[Model], palette: Palette) -> Figure:
    """Share of tokens per expert: panels are domains, bars layers, rows mixtures (before and after finetuning)."""
    mixtures = all_mixtures[:MIXTURES_SHOWN]
    domains = list(dict.fromkeys(domain for model in mixtures for domain in model.routing or {}))[:ROUTING_DOMAINS]
    per_row = min(len(domains), 4)
    bands = [domains[start : start + per_row] for start in range(0, len(domains), per_row)]
    figure = new_page(1.0 + 1.75 * len(bands) * len(mixtures))
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
    plain_axes(panel, grid="")
    if not layers:
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", fontsize=8, style="italic")


def routing_message(model: Model) -> str:
    """How far the domains' routing lies apart in ``model``, as a sentence."""
    distances = [distance for distance in routing_distances(model).values() if math.isfinite(distance)]
    if not distances:
        return f"Where tokens go {_moment(model.name)}"
    percent = f"{100 * mean(distances):.0f} %"
    return f"Where tokens go: {_moment(model.name)}, two domains' routing differs by {percent} on average"


def _moment(name: str) -> str:
    return {"mix": "before finetuning", "btx": "after finetuning"}.get(name, shortened(name))


def new_page(height_inches: float) -> Figure:
    """An empty figure as wide as the page."""
    return Figure(figsize=(PAGE_WIDTH_INCHES, height_inches), layout="constrained", facecolor="white")


def plain_axes(panel: Axes, grid: str) -> None:
    """Axes without a frame; ``grid``: of "x", "y" or "both" axes, or empty for none."""
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
