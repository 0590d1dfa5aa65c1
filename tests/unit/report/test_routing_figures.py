"""Figures of routing: every name is drawn as it is, nothing is cut or overlaps, and a failure leaves the old files."""

from __future__ import annotations

import math
import random
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from megatron_btx.report import routing as figures
from megatron_btx.report.routing import draw_entropy, draw_overlap, draw_shares, write_figures

TASKS = [
    *("general", "math/gsm8k", "math/minerva", "code/humaneval", "code/mbpp", "code/apps"),
    *("knowledge/naturalquestions", "knowledge/triviaqa", "knowledge/mmlu", "law/bar", "law/contracts", "news"),
]
FILES = ["routing.png", "routing-first.png", "overlap.png", "entropy.png"]
HOSTILE = ["a$b$_{", "$x_{$", "$", "_hidden", r"c\$d$", "ü <b> & 漢", "line\nbreak"]


def routed(experts: int, layers: int, dead: int = 0) -> dict[str, Any]:
    """A result like route_label's, of which the first experts are dead; of first choices one expert more."""
    source = random.Random(layers)

    def shares(none: int) -> list[float]:
        values = [0.0] * none + [0.5 + source.random() for _ in range(experts - none)]
        return [value / sum(values) for value in values]

    return {
        "layers": list(range(layers)),
        "choices": [shares(dead) for _ in range(layers)],
        "first": [shares(dead + 1) for _ in range(layers)],
        "entropy": [source.random() * math.log(experts) for _ in range(layers)],
        "dead": [list(range(dead)) for _ in range(layers)],
    }


def result(models: list[str], labels: list[str], experts: int, layers: int, dead: int = 0) -> dict[str, Any]:
    return {model: {label: routed(experts, layers, dead) for label in labels} for model in models}


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text().replace(r"\$", "$") for text in figure.legends[0].get_texts()]


def rows_of(figure: Figure) -> list[str]:
    """The names of a heat map's rows."""
    return [text.get_text().replace(r"\$", "$") for text in figure.axes[0].get_yticklabels()]


def drawn(figure: Figure) -> Figure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.draw_without_rendering()
    return figure


def inside(box: Bbox, outer: Bbox) -> bool:
    return outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_drawn(name, tmp_path):
    """As model, label and expert: no mathematics, no warning, no missing entry."""
    models = result([name, "other"], [name, f"math/{name}"], 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_figures(tmp_path, models, [name, "b"]) == FILES
    shown = name.replace("\n", "?")
    assert legend_of(draw_shares(models, [name, "b"])) == [shown, "b"]
    assert rows_of(draw_entropy(models, [name, "b"])) == [shown, f"math/{shown}"]


def test_the_legend_has_what_the_first_model_lacks():
    """A label that only the second model has is there, and its panel of the first one says so."""
    models = {"a": {"x": routed(2, 2)}, "b": {"x": routed(2, 2), "y/_z": routed(2, 2)}, "c": {}}
    assert rows_of(draw_entropy(models, ["e", "_f"])) == ["x"]
    shares = draw_shares(models, ["e", "_f"])
    assert legend_of(shares) == ["e", "_f"]
    assert [text.get_text() for axes in shares.axes for text in axes.texts].count("not measured") == 3
    drawn(draw_overlap(models))


@pytest.mark.parametrize(("labels", "experts", "layers"), [(TASKS, 16, 32), (TASKS[1:7], 4, 4)])
def test_nothing_is_cut_or_overlaps(labels, experts, layers):
    """Bounded sizes; the legend within the figure; labels of rows beside their row and no other text."""
    names = [f"expert {number}" for number in range(experts)]
    models = result(["before", "btx"], labels, experts, layers, dead=2)
    shares, entropy, overlaps = draw_shares(models, names), draw_entropy(models, names), draw_overlap(models)
    for figure, most in ((shares, (9.0, 20.0)), (entropy, (18.0, 5.0)), (overlaps, (12.0, 6.0))):
        width, height = drawn(figure).get_size_inches()
        assert width <= most[0] and height <= most[1]
    legend = shares.legends[0].get_window_extent()
    assert inside(legend, shares.bbox)
    assert not any(axes.get_tightbbox().overlaps(legend) for axes in shares.axes)
    assert legend.height < shares.bbox.height / 3
    assert all(inside(axes.get_tightbbox(), entropy.bbox) for axes in entropy.axes)
    rows = [axes for axes in shares.axes if axes.get_ylabel()]
    boxes = [axes.yaxis.label.get_window_extent() for axes in rows]
    assert len(boxes) == len(labels) and all(inside(box, shares.bbox) for box in boxes)
    assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:], strict=False))
    for axes, box in zip(rows, boxes, strict=True):
        assert box.x1 <= min(tick.get_window_extent().x0 for tick in axes.get_yticklabels())


def test_forty_labels_are_all_named():
    """A row each, within the figure, which is still one to look at."""
    labels = [f"domain{number}/ordinary-task-{number}" for number in range(40)]
    figure = drawn(draw_entropy(result(["a", "b"], labels, 4, 4), list("abcd")))
    assert len(rows_of(figure)) == 40 and figure.get_figheight() < 12
    assert all(inside(axes.get_tightbbox(), figure.bbox) for axes in figure.axes)


@pytest.mark.parametrize("layers", [4, 32])
@pytest.mark.parametrize(("key", "count"), [("choices", 12), ("first", 13)])
def test_dead_experts_are_counted(layers, key, count):
    """One short count per layer, explained on the axis, under the title and beside the next one."""
    figure = drawn(draw_shares(result(["a", "b"], ["x", "y"], 16, layers, dead=12), [f"e{n}" for n in range(16)], key))
    assert "n experts under 1 % of an even share" in figure.get_supxlabel()
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == [f"{count} ×"] * layers
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(inside(box, axes.get_window_extent()) for box in boxes)
        assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:], strict=False))
    calm = draw_shares(result(["a"], ["x"], 16, layers), [f"e{n}" for n in range(16)])
    assert calm.get_supxlabel() == "layer" and not calm.axes[0].texts


@pytest.mark.parametrize("key", ["choices", "first"])
def test_bars_are_the_shares(key):
    """Of what the title says; one on the other, in the experts' order."""
    models = result(["a"], ["x"], 3, 2)
    figure = draw_shares(models, list("abc"), key)
    assert ("first choices" if key == "first" else "all choices") in figure.legends[0].get_title().get_text()
    bottom = [0.0, 0.0]
    for expert, bars in enumerate(figure.axes[0].collections):
        for layer, bar in enumerate(bars.get_paths()):
            low, high = bar.get_extents().y0, bar.get_extents().y1
            assert low == pytest.approx(bottom[layer])
            assert high - low == pytest.approx(models["a"]["x"][key][layer][expert])
            bottom[layer] = high
    assert bottom == pytest.approx([1.0, 1.0])


@contextmanager
def full_disk(largest_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write in its middle fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_figures(tmp_path, monkeypatch):
    """And nothing half-written; the error names the file."""
    for name in FILES:
        (tmp_path / name).write_text("old")
    monkeypatch.setattr("megatron_btx.report.style.DOTS_PER_INCH", 160)  # more than the disk takes
    with full_disk(4096), pytest.raises(OSError) as caught:
        write_figures(tmp_path, result(["a"], ["x"], 3, 2), list("abc"))
    assert caught.value.filename == str(tmp_path / "routing.png")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == dict.fromkeys(FILES, b"old")


def test_what_cannot_be_drawn_leaves_the_old_figures(tmp_path, monkeypatch):
    """The last one fails: the ones before it are not replaced either."""

    def fail(*_arguments: Any) -> Figure:
        raise ValueError("not drawn")

    monkeypatch.setattr(figures, "draw_entropy", fail)
    for name in FILES:
        (tmp_path / name).write_text("old")
    with pytest.raises(ValueError, match="not drawn"):
        write_figures(tmp_path, result(["a"], ["x"], 3, 2), list("abc"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == dict.fromkeys(FILES, b"old")
