"""How every figure looks: colours, hatches and dashes per name, axes, panels of several figures, and the PNG writer.

Drawn with matplotlib on a plain canvas: no display, no global state. Colours are from the Okabe-Ito and Tol sets, which
stay apart for colour-blind readers. An expert has one colour in every figure: as a model, as a training stage, and as
a share of the routing.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from megatron_btx.report.quantities import is_usable

PAGE_WIDTH_INCHES = 9.0
DOTS_PER_INCH = 160
LARGEST_PIXELS = 6000
"""Of a picture's height and width: one that would be larger gets fewer dots per inch."""
INK, FAINT = "#222222", "#d9d9d9"
FIXED_COLOURS = {
    "seed": "#7a7a7a",
    "average": "#b8a26a",
    "average-finetuned": "#7d6a2f",
    "mix": "#f0a58a",
    "btx": "#c8401c",
    "finetune": "#c8401c",
    "dense": "#222222",
    "dense-domains": "#8a8a8a",
}
CYCLE = ("#0072b2", "#e69f00", "#009e73", "#aa4499", "#56b4e9", "#999933", "#332288", "#cc6677", "#44aa99", "#ddcc77")
HATCHES = ("", "///", "...", "xxx")
DASHES = ("-", "--", ":", "-.")
HEAT_COLOURS = "cividis"
_TICKS = 8
_HALF_BAR = 0.43


class Palette:
    """A colour per name, the same in every figure; beyond ten names the colours repeat with a hatch or a dash."""

    def __init__(self, names: Sequence[str]) -> None:
        own = dict.fromkeys(name for name in names if name not in FIXED_COLOURS)
        self._index = {name: number for number, name in enumerate(own)}

    def rank(self, name: str) -> int:
        """Where the name stands among those with a colour of their own; the others come last."""
        return self._index.get(name, len(self._index))

    def colour(self, name: str) -> str:
        """The colour of a model, an expert or a stage."""
        if name in FIXED_COLOURS:
            return FIXED_COLOURS[name]
        return CYCLE[self._index[name] % len(CYCLE)]

    def hatch(self, name: str) -> str:
        """The hatch of its areas."""
        return HATCHES[self._round(name) % len(HATCHES)]

    def dash(self, name: str) -> str:
        """The dash of its lines."""
        return DASHES[self._round(name) % len(DASHES)]

    def _round(self, name: str) -> int:
        """How often the colours were used up before this name."""
        return self._index.get(name, 0) // len(CYCLE)


def to_png(figure: Figure) -> bytes:
    """The picture as a file's content: the same for the same numbers."""
    return _draw(figure, format="png", metadata={"Software": None})


def to_pdf(figure: Figure) -> bytes:
    """The same for print."""
    return _draw(figure, format="pdf", metadata={"CreationDate": None})


def _draw(figure: Figure, **form: Any) -> bytes:
    content = io.BytesIO()
    dots = min(DOTS_PER_INCH, LARGEST_PIXELS / max(figure.get_size_inches()))
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; tables and JSON have it in full.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(content, dpi=dots, **form)
    return content.getvalue()


def shorten(name: str, limit: int = 18) -> str:
    """A name as it may stand in a figure: one line, not too long, and no mathematics where it has a dollar."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    if len(name) > limit:
        name = f"{name[: limit - 1]}…"
    return name.replace("$", r"\$")


def shorten_all(names: Iterable[str], limit: int = 18) -> list[str]:
    """Names as they may stand in a figure."""
    return [shorten(name, limit) for name in names]


def new_page(height_inches: float, width_inches: float = PAGE_WIDTH_INCHES) -> Figure:
    """An empty figure, by default as wide as the page."""
    return Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="white")


def set_title(figure: Figure, text: str) -> None:
    """Write what the figure shows above it, flush left."""
    figure.suptitle(text, fontsize=12, fontweight="bold", color=INK, x=0.01, ha="left")


def plain_axes(panel: Axes, grid: str) -> None:
    """Axes without a frame; ``grid``: of "x", "y" or "both" axes."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")
    panel.tick_params(labelsize=8, color="#999999")
    panel.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    panel.set_axisbelow(True)


def draw_shares(
    panel: Axes, shares_LE: Sequence[Sequence[float]], experts: Sequence[str], palette: Palette, layers: Sequence[int]
) -> None:
    """Draw a bar per layer, which the experts' shares fill from below.

    One artist per expert, because a figure may have ten thousand bars. Only the hatch is white: edges would hide small
    shares. ``layers``: their numbers, from 0.
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
    ticks = choose_ticks(len(shares_LE))
    panel.set_xticks(ticks, [str(layers[at] + 1) for at in ticks])


def draw_heat_map(
    panel: Axes,
    values: Sequence[Sequence[float]],
    write: Callable[[float], str] | None,
    font_size: float = 6.5,
    is_square: bool = False,
) -> None:
    """Draw values between 0 and 1 as colours, with their numbers on them; ``write`` makes a number's text."""
    image = panel.imshow(values, vmin=0.0, vmax=1.0, cmap=HEAT_COLOURS)
    if not is_square:
        image.axes.set_aspect("auto")
    if write is None:
        return
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "white" if value < 0.55 else "black"
            text = panel.text(column, row, write(value), ha="center", va="center", color=ink, fontsize=font_size)
            text.set_in_layout(False)


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


def choose_ticks(count: int) -> range:
    """At most eight of so many places, evenly spaced: those whose number is written."""
    return range(0, count, max(1, math.ceil(count / _TICKS)))


def write_percent(share: float) -> str:
    """A share on a heat map."""
    if not is_usable(share):
        return "NaN"
    return f"{share:.0%}"
