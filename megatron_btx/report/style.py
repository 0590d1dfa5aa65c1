"""How every figure looks: colours, hatches and dashes per name, axes, legends of names, and the PNG writer.

Drawn with matplotlib on a plain canvas: no display, no global state. Colours are from the Okabe-Ito and Tol sets, which
stay apart for colour-blind readers. An expert has one colour in every figure: as a model, as a training stage, and as
a share of the routing.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_btx.pipeline.directory import EXPERT_PREFIX

PAGE_WIDTH_INCHES = 9.0
DOTS_PER_INCH = 160
LARGEST_PIXELS = 6000
"""Of a picture's height and width: one that would be larger gets fewer dots per inch."""
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


class Palette:
    """A colour per name, the same in every figure; beyond ten names the colours repeat with a hatch or a dash."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index: dict[str, int] = {}
        for name in names:
            own = name.removeprefix(EXPERT_PREFIX)
            if own not in FIXED_COLOURS and own not in self._index:
                self._index[own] = len(self._index)

    def rank(self, name: str) -> int:
        """Where the name stands among those with a colour of their own; the others come last."""
        return self._index.get(name.removeprefix(EXPERT_PREFIX), len(self._index))

    def colour(self, name: str) -> str:
        """The colour of a model, an expert or a stage."""
        name = name.removeprefix(EXPERT_PREFIX)
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
        return self._index.get(name.removeprefix(EXPERT_PREFIX), 0) // len(CYCLE)


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
    """Axes without a frame; ``grid``: of "x", "y" or "both" axes, or empty for none."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")
    panel.tick_params(labelsize=8, color="#999999")
    if grid:
        panel.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
        panel.set_axisbelow(True)
