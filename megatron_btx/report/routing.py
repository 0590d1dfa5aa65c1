"""Routing as pictures: figures like the paper's, and a page that colours tokens by the expert that takes them.

The page is one file, needs no network, and lets the reader choose the layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

from megatron_btx.common.files import write_atomically
from megatron_btx.common.shares import DEAD_SHARE, find_dead_experts, routing_distance
from megatron_btx.report import style
from megatron_btx.report.pages import render_page
from megatron_btx.report.style import (
    CYCLE,
    DASHES,
    HATCHES,
    Palette,
    choose_ticks,
    make_panels,
    new_page,
    shorten,
    shorten_all,
)

POINTS_PER_INCH = 72
LEGEND_POINTS = 8.5
MARKERS = ("o", "s", "^", "D", "v")
"""One more than there are dashes, so that a dash and a marker meet again after twenty rounds of the colours only."""
SHARES = {
    "choices": "Share of all choices that go to each expert",
    "first": "Share of first choices (a token's largest gate) that go to each expert",
}
_NOT_MEASURED = "not measured"

Routed = Mapping[str, Any]
"""The numbers of one model and label, as routing.json has them."""
Models = Mapping[str, Mapping[str, Routed]]
"""Model -> label -> numbers."""


def write_figures(folder: Path, models: Models, experts: Sequence[str]) -> list[str]:
    """Draw everything into ``folder``; returns the files' names.

    Everything is drawn before anything is written, and each file is replaced as a whole.
    """
    pictures = {
        "routing.png": style.to_png(draw_shares(models, experts, "choices")),
        "routing-first.png": style.to_png(draw_shares(models, experts, "first")),
        "overlap.png": style.to_png(draw_overlap(models)),
        "entropy.png": style.to_png(draw_entropy(models, experts)),
    }
    for name, picture in pictures.items():
        write_atomically(folder / name, picture)
    return list(pictures)


def draw_shares(
    models: Models, experts: Sequence[str], key: str = "choices", palette: Palette | None = None, title: str = ""
) -> Figure:
    """Per label (a row) and model (a column): stacked shares over the layers.

    Args:
        key: what is shared out, a key of :data:`SHARES`.
        palette: by default one of the experts alone.
        title: by default what is shared out.
    """
    labels, palette = _order_labels(models), palette or Palette(experts)
    layers = _count_layers(models)
    width = max(style.PAGE_WIDTH_INCHES, 1.6 + len(models) * max(2.3, 0.072 * layers))  # a bar holds a small digit
    height = 0.7 + len(labels) * min(1.5, max(0.8, 48 / len(labels)))
    slot_points = (width - 1.6) / len(models) / layers * POINTS_PER_INCH
    figure = new_page(height, width)
    panels = figure.subplots(len(labels), len(models), squeeze=False, sharey=True)
    has_dead = False
    for row, label in enumerate(labels):
        panels[row][0].set_ylabel(_wrap(label), fontsize=8.5, rotation=0, ha="right", va="center")
        for panel, routed in zip(panels[row], models.values(), strict=True):
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=7)
            if label not in routed:
                style.say_absent(panel, _NOT_MEASURED)
                continue
            shares_LE = routed[label][key]
            style.draw_shares(panel, shares_LE, experts, palette, routed[label]["layers"])
            # Counted in what is drawn: an expert may have choices, and no first ones.
            has_dead |= _write_dead_counts(panel, shares_LE, slot_points)
    for panel, name in zip(panels[0], models, strict=True):
        panel.set_title(shorten(name, 26), fontsize=9.5)
    note = ""
    panels[0][0].set_ylim(0, 1)
    panels[0][0].set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    if has_dead:
        panels[0][0].set_ylim(0, 1.3)
        note = f" (n × above a bar: n experts under {100 * DEAD_SHARE:g} % of an even share)"
    handles = [Patch(facecolor=palette.colour(name), hatch=palette.hatch(name), edgecolor="white") for name in experts]
    _add_legend(figure, handles, experts, title or SHARES[key])
    figure.supxlabel(f"layer{note}", fontsize=9)
    return figure


def _count_layers(models: Models) -> int:
    """Layers of the model that has the most."""
    return max((len(routed["layers"]) for labels in models.values() for routed in labels.values()), default=1) or 1


def _write_dead_counts(panel: Axes, shares_LE: Sequence[Sequence[float]], slot_points: float) -> bool:
    """Write above each bar how many of its experts are dead; returns whether there are any.

    Args:
        slot_points: about how wide a bar and its gap are.
    """
    rotation = 90
    if slot_points > 24:
        rotation = 0
    size = min(7.0, 0.9 * slot_points)
    has_dead = False
    for at, shares_E in enumerate(shares_LE):
        count = len(find_dead_experts(shares_E))
        if count:
            has_dead = True
            text = panel.text(at, 1.04, f"{count} ×", ha="center", va="bottom", fontsize=size, rotation=rotation)
            text.set_in_layout(False)
    return has_dead


def draw_overlap(models: Models) -> Figure:
    """Per model: how alike two labels are routed, 1 less the mean total variation distance."""
    labels = _order_labels(models)
    cell, points = _choose_cell(len(labels))
    side = max(1.6, cell * len(labels))
    columns = max(1, min(len(models), int(18 / (side + 1.6))))
    lines = math.ceil(len(models) / columns)
    figure = new_page((side + 1.5) * lines, max(4.5, (side + 1.6) * columns + 0.8))
    panels = make_panels(figure, len(models), columns)
    for panel, (name, routed) in zip(panels, models.items(), strict=True):
        panel.set_title(shorten(name, 26), fontsize=9.5)
        own = [label for label in labels if label in routed]
        if not own:
            style.say_absent(panel, _NOT_MEASURED)
            continue
        style.draw_heat_map(panel, _overlaps(routed, own), _write_overlap, points, is_square=True)
        names = shorten_all(own, 28)
        panel.set_xticks(range(len(own)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
        panel.set_yticks(range(len(own)), names, fontsize=7)
    style.add_heat_scale(figure, panels, "overlap of routing, all choices (1: the same)")
    return figure


def _choose_cell(labels: int) -> tuple[float, float]:
    """Inches of a cell, and points of its number."""
    if labels <= 8:
        return 0.42, 7.0
    if labels <= 16:
        return 0.3, 6.0
    return 0.21, 5.0


def _overlaps(routed: Mapping[str, Routed], labels: Sequence[str]) -> list[list[float]]:
    rows = []
    for one in labels:
        rows.append([1 - routing_distance(routed[one]["choices"], routed[other]["choices"]) for other in labels])
    return rows


def _write_overlap(overlap: float) -> str:
    if overlap >= 0.995:
        return "1"
    return f"{overlap:.2f}".removeprefix("0")


def draw_entropy(models: Models, experts: Sequence[str]) -> Figure:
    """Per model: mean entropy of the routing probabilities over the layers, a line per label."""
    labels = _order_labels(models)
    looks = {label: _choose_line(at) for at, label in enumerate(labels)}
    handles = [Line2D([], [], **look) for look in looks.values()]
    columns = min(3, len(models))
    figure = new_page(0.4 + 2.4 * math.ceil(len(models) / columns))
    panels = make_panels(figure, len(models), columns, share_y=True)
    for panel, (name, routed) in zip(panels, models.items(), strict=True):
        _draw_entropies(panel, routed, looks, math.log(max(len(experts), 2)))
        panel.set_title(shorten(name, 26), fontsize=9.5)
    for panel in panels[::columns]:
        panel.set_ylabel("entropy / even routing's", fontsize=8.5)
    title = "Entropy of the routing probabilities (1: even over all experts)"
    _add_legend(figure, handles, labels, title)
    figure.supxlabel("layer", fontsize=9)
    return figure


def _draw_entropies(
    panel: Axes, routed: Mapping[str, Routed], looks: Mapping[str, dict[str, Any]], even: float
) -> None:
    """A line per label; ``even``: the entropy of even routing, in nats."""
    layers: set[int] = set()
    for label, look in looks.items():
        if label in routed:
            numbers = [layer + 1 for layer in routed[label]["layers"]]
            panel.plot(numbers, [entropy / even for entropy in routed[label]["entropy"]], **look)
            layers.update(numbers)
    panel.set_ylim(0, 1.05)
    panel.set_xticks(choose_ticks(sorted(layers)))
    panel.grid(axis="y", color=style.FAINT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=7)


def _choose_line(at: int) -> dict[str, Any]:
    """The look of line number ``at``. Not by Palette, which takes a and expert-a, btx and finetune for one."""
    turn, colour = divmod(at, len(CYCLE))
    return {
        "color": CYCLE[colour],
        "linestyle": DASHES[turn % len(DASHES)],
        "marker": MARKERS[turn % len(MARKERS)],
        "linewidth": 1.2,
        "markersize": 3,
    }


def _add_legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str], title: str) -> None:
    """A legend above the panels: as many columns as fit, and the figure higher by what its rows take.

    With handles of its own: gathered ones leave out names with an underscore, and what the first panel lacks.
    """
    texts = shorten_all(names, 28)
    widest = max((TextPath((0, 0), text, size=LEGEND_POINTS).get_extents().width for text in texts), default=0.0)
    entry = widest + 6 * LEGEND_POINTS  # its handle and the gaps
    columns = max(1, int(figure.get_figwidth() * POINTS_PER_INCH / entry))
    rows = math.ceil(len(texts) / columns)
    legend = figure.legend(
        handles,
        texts,
        title=title,
        loc="outside upper center",
        ncols=math.ceil(len(texts) / max(rows, 1)),
        frameon=False,
        fontsize=LEGEND_POINTS,
        handlelength=2.6,
        columnspacing=1.8,
    )
    legend.get_title().set(fontsize=10.5, fontweight="bold")
    figure.set_figheight(figure.get_figheight() + (1.6 * rows + 2.5) * LEGEND_POINTS / POINTS_PER_INCH)


def _wrap(label: str) -> str:
    """A label as it may stand left of a row: a domain, and below it the task."""
    return "/\n".join(shorten_all(label.split("/"), 22))


def _domain_of(label: str) -> str:
    return label.partition("/")[0]


def _order_labels(models: Models) -> list[str]:
    """All labels, tasks of one domain side by side, in the order in which domains were first given."""
    labels: dict[str, None] = {}
    for routed in models.values():
        labels |= dict.fromkeys(routed)
    domains = list(dict.fromkeys(map(_domain_of, labels)))
    return sorted(labels, key=lambda label: domains.index(_domain_of(label)))


# --- the page of tokens ---------------------------------------------------------------------------------------

Texts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model -> label -> pieces, layers and gates [L, T, E] of a text."""


def write_page(file: Path, texts: Texts, experts: Sequence[str], trained: Collection[str] = ()) -> None:
    """Write the page: the whole one or, when that fails, none.

    It opens on the first model whose routers were trained, because those of a fresh mix say nothing yet; without one,
    on the first.

    Args:
        texts: model -> label -> the result of :func:`megatron_btx.evaluation.token_routes.route_text`.
        trained: the models whose routers were trained.
    """
    palette = Palette(experts)
    models: dict[str, dict[str, Any]] = {}
    for model, labels in texts.items():
        models[model] = {label: _pack(routed) for label, routed in labels.items()}
    content = {
        "experts": experts,
        "colours": list(map(palette.colour, experts)),
        "hatches": [HATCHES.index(palette.hatch(name)) for name in experts],
        "opened": next((name for name in texts if name in trained), next(iter(texts), None)),
        "models": models,
    }
    data = jinja2.utils.htmlsafe_json_dumps(
        content, dumps=json.dumps, ensure_ascii=True, sort_keys=False, separators=(",", ":")
    )
    page = render_page("tokens.html.j2", title=f"Tokens by expert: {', '.join(texts)}", data=data)
    write_atomically(file, page.encode("utf-8", "xmlcharrefreplace"))


def _pack(routed: Mapping[str, Any]) -> dict[str, Any]:
    """The same with pairs [expert, gate] for the gates above zero, largest first: most of [L, T, E] is zeros."""
    layers = [list(map(_pair, gates_TE)) for gates_TE in routed["gates"]]
    return {"pieces": routed["pieces"], "layers": routed["layers"], "gates": layers}


def _pair(gates_E: Sequence[float]) -> list[tuple[int, float]]:
    pairs = [(expert, gate) for expert, gate in enumerate(gates_E) if gate > 0]
    return sorted(pairs, key=lambda pair: -pair[1])  # stable: of equal ones the first expert, as argmax takes it
