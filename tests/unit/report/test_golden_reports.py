"""The reports of two stored runs: a plain one and an ablation. Their numbers stay whatever the code becomes.

A difference is a change that users see: name it in the commit, and write the files again with
``python -m tests.unit.report.test_golden_reports``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.report import build
from megatron_btx.report.pages import to_json, to_markdown
from tests.unit.report.example_run import make_ablation, make_run

GOLDEN = Path(__file__).with_name("golden")
RUNS = {"plain": make_run, "ablation": make_ablation}
POINTS_APART = 40
"""Of the curves every 40th point is kept."""


def reports(root: Path) -> Iterator[tuple[str, str]]:
    """Name and content of every golden file."""
    for name, make in RUNS.items():
        report = build.make_report(make(root / name))
        for file, content in report.numbers.items():
            numbers = json.loads(to_json(content))
            for curve in numbers.get("curves", {}).values():
                for axis in ("x", "loss", "smooth"):
                    curve[axis] = [round(value, 9) for value in curve[axis][::POINTS_APART]]
            yield f"{name}-{file}", json.dumps(numbers, indent=1) + "\n"
        yield f"{name}.md", to_markdown(report.title, report.sections)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number with its place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from flat(item, f"{path}/{key}")
    else:
        yield path, value


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return dict(reports(tmp_path_factory.mktemp("golden")))


@pytest.mark.parametrize("name", [file.name for file in sorted(GOLDEN.iterdir())])
def test_reports_say_what_they_said(name: str, found: dict[str, str]) -> None:
    golden = (GOLDEN / name).read_text(encoding="utf-8")
    if name.endswith("json"):
        now, before = dict(flat(json.loads(found[name]))), dict(flat(json.loads(golden)))
        assert {place: value for place, value in now.items() if before.get(place, value) != value} == {}
        assert now.keys() == before.keys()
    assert found[name] == golden


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in reports(Path(folder)):
            (GOLDEN / file).write_text(content, encoding="utf-8")
