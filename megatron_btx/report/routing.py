"""Routing as pictures: figures like the paper's, and a page that colours tokens by the expert that takes them.

The page is one file, needs no network, and lets the reader choose the layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

from megatron_btx.common.files import write_atomically
from megatron_btx.common.shares import DEAD_SHARE, find_dead_experts, overlaps
from megatron_btx.report import style
from megatron_btx.report.pages import render_page
from megatron_btx.report.style import HATCHES, Palette, make_panels, new_page, shorten, shorten_all

POINTS_PER_INCH = 72
LEGEND_POINTS = 8.5
_CELLS = ((8, (0.42, 7.0)), (16, (0.3, 6.0)), (2**30, (0.21, 5.0)))
"""Up to so many rows or columns -> inches of a cell, and points of its number."""
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
    layers = (
        max((len(routed["layers"]) for of_model in models.values() for routed in of_model.values()), default=1) or 1
    )
    width = max(style.PAGE_WIDTH_INCHES, 1.6 + len(models) * max(2.3, 0.072 * layers))  # a bar holds a small digit
    height = 0.7 + len(labels) * min(1.5, max(0.8, 48 / len(labels)))
    slot_points = (width - 1.6) / len(models) / layers * POINTS_PER_INCH
    figure = new_page(height, width)
    panels = figure.subplots(len(labels), len(models), squeeze=False, sharey=True)
    has_dead = False
    for row, label in enumerate(labels):
        name = "/\n".join(shorten_all(label.split("/"), 22))  # a domain, and below it the task
        panels[row][0].set_ylabel(name, fontsize=8.5, rotation=0, ha="right", va="center")
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


def _write_dead_counts(panel: Axes, shares_LE: Sequence[Sequence[float]], slot_points: float) -> bool:
    """Write above each bar (with its gap ``slot_points`` wide) how many of its experts are dead; whether any is."""
    rotation = 0 if slot_points > 24 else 90
    size = min(7.0, 0.9 * slot_points)
    counts = [len(find_dead_experts(shares_E)) for shares_E in shares_LE]
    for at, count in enumerate(counts):
        if count:
            text = panel.text(at, 1.04, f"{count} ×", ha="center", va="bottom", fontsize=size, rotation=rotation)
            text.set_in_layout(False)
    return any(counts)


def draw_overlap(models: Models) -> Figure:
    """Per model: how alike two labels are routed, 1 less the mean total variation distance."""
    maps = {}
    for name, routed in models.items():
        own = [label for label in _order_labels(models) if label in routed]
        rows = overlaps({label: routed[label]["choices"] for label in own})
        maps[name] = _HeatMap([list(row.values()) for row in rows.values()], own, own)
    return _draw_maps(maps, "overlap of routing, all choices (1: the same)")


def draw_entropy(models: Models, experts: Sequence[str]) -> Figure:
    """Per model: mean entropy of the routing probabilities, a row per label and a column per layer."""
    even = math.log(max(len(experts), 2))
    maps = {}
    for name, routed in models.items():
        own = [label for label in _order_labels(models) if label in routed]
        rows = [[entropy / even for entropy in routed[label]["entropy"]] for label in own]
        layers: list[int] = max((routed[label]["layers"] for label in own), key=len, default=[])
        maps[name] = _HeatMap(rows, own, [str(layer + 1) for layer in layers])
    return _draw_maps(maps, "entropy of routing by layer (1: even)")


class _HeatMap(NamedTuple):
    """Numbers between 0 and 1, with the names of their rows and columns."""

    values: list[list[float]]
    rows: list[str]
    columns: list[str]


def _draw_maps(maps: Mapping[str, _HeatMap], scale: str) -> Figure:
    """Heat maps side by side, by model, with one scale of colours."""
    most = max((max(len(one.rows), len(one.columns)) for one in maps.values()), default=1)
    cell, points = next(size for labels, size in _CELLS if most <= labels)
    width = max(1.6, cell * max(len(one.columns) for one in maps.values()))
    height = max(0.6, cell * max(len(one.rows) for one in maps.values()))
    columns = max(1, min(len(maps), int(18 / (width + 1.6))))
    lines = math.ceil(len(maps) / columns)
    figure = new_page((height + 1.5) * lines, max(4.5, (width + 1.6) * columns + 0.8))
    panels = make_panels(figure, len(maps), columns)
    for panel, (name, one) in zip(panels, maps.items(), strict=True):
        panel.set_title(shorten(name, 26), fontsize=9.5)
        if not one.values:
            style.say_absent(panel, _NOT_MEASURED)
            continue
        style.draw_heat_map(panel, one.values, _write_part, points, is_square=one.rows == one.columns)
        names: dict[str, Any] = {}
        if one.rows == one.columns:
            names = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        panel.set_xticks(range(len(one.columns)), shorten_all(one.columns, 28), fontsize=7, **names)
        panel.set_yticks(range(len(one.rows)), shorten_all(one.rows, 28), fontsize=7)
    style.add_heat_scale(figure, panels, scale)
    return figure


def _write_part(part: float) -> str:
    if part >= 0.995:
        return "1"
    return f"{part:.2f}".removeprefix("0")


def _add_legend(figure: Figure, handles: Sequence[Patch], names: Sequence[str], title: str) -> None:
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


def _order_labels(models: Models) -> list[str]:
    """All labels, tasks of one domain side by side, in the order in which domains were first given."""
    labels: dict[str, None] = {}
    for routed in models.values():
        labels |= dict.fromkeys(routed)
    domain_of = {label: label.partition("/")[0] for label in labels}
    domains = list(dict.fromkeys(domain_of.values()))
    return sorted(labels, key=lambda label: domains.index(domain_of[label]))


# --- the page of tokens ---------------------------------------------------------------------------------------

Texts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model -> label -> pieces, layers and gates [L, T, E] of a text; see ``evaluation.analyze_routing.route_text``."""


def write_page(file: Path, texts: Texts, experts: Sequence[str], trained: Collection[str] = ()) -> None:
    """Write the page: the whole one or, when that fails, none.

    It opens on the first of the models in ``trained``: the routers of a fresh mix say nothing yet.
    """
    palette = Palette(experts)
    models: dict[str, dict[str, Any]] = {}
    for model, labels in texts.items():
        models[model] = {}
        for label, routed in labels.items():
            layers = [list(map(_pair, gates_TE)) for gates_TE in routed["gates"]]
            models[model][label] = {"pieces": routed["pieces"], "layers": routed["layers"], "gates": layers}
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


def _pair(gates_E: Sequence[float]) -> list[tuple[int, float]]:
    """(expert, gate) for the gates above zero, largest first: most of them are zeros."""
    pairs = [(expert, gate) for expert, gate in enumerate(gates_E) if gate > 0]
    return sorted(pairs, key=lambda pair: -pair[1])  # stable: of equal ones the first expert, as argmax takes it
