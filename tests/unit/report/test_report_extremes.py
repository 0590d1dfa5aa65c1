"""Reports of runs beyond what runs are: many domains, huge numbers, odd files and names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.report import build as report
from megatron_btx.report.inputs import read_run
from megatron_btx.report.style import to_png
from tests.unit.report.example_run import (
    build_report,
    change,
    evaluation,
    make_run,
    results,
    write_evaluation,
    write_json,
)


def test_many_domains_make_a_picture_that_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty domains and their experts: bounded in height, and every number in the table."""
    from matplotlib import image

    monkeypatch.setattr("megatron_btx.report.style.DOTS_PER_INCH", 160)
    domains = [f"d{number}" for number in range(30)]
    names = ("seed", *(f"expert-{domain}" for domain in domains), "mix", "btx", "dense")
    models: dict[str, Any] = {name: {"losses": dict.fromkeys(domains, 2.0)} for name in names}
    for name in ("mix", "btx"):
        models[name]["routing"] = {domain: [[1.0] * 30] for domain in domains}
    folder = build_report(write_evaluation(tmp_path, {"models": models, "experts": domains})).folder
    for picture in folder.glob("*.png"):
        assert image.imread(picture).shape[0] < 4_000, picture.name
    text = (folder / "report.md").read_text()
    assert "| d29 |" in text and "28 of 435 pairs" in text


def test_no_picture_is_larger_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from matplotlib import image
    from matplotlib.figure import Figure

    monkeypatch.setattr("megatron_btx.report.style.DOTS_PER_INCH", 160)
    monkeypatch.setattr("megatron_btx.report.style.LARGEST_PIXELS", 300)
    assert max(image.imread(io.BytesIO(to_png(Figure(figsize=(1, 20))))).shape) <= 300


def test_huge_numbers_are_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    change(
        run / "evaluate-moe" / "evaluation.json",
        lambda of: of["models"]["btx"]["losses"].update(math=1e300, code=1e308),
    )
    change(run / "evaluate-dense" / "evaluation.json", lambda of: of["models"]["dense"]["losses"].update(code=-1e308))
    change(run / "seed" / "manifest.json", lambda of: of.update(tokens=10**400, seconds=1e30, flops=10**308))
    with open(run / "finetune" / "metrics.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"iteration": 1048, "lm loss": 1e308}\n{"iteration": 1049, "lm loss": 1e308}\n')
        lines.write('{"iteration": 1e999, "lm loss": 1}\n{"iteration": 1050, "lm loss": "high"}\n')
    assert report.main([str(run)]) == 0
    printed, text = capsys.readouterr().out, (run / "report" / "report.md").read_text()
    assert "1.000e+300" in printed and "1.000e+300" in text
    assert not [word for word in f"{printed} {text}".split() if len(word.strip("|*")) > 60 and word[0].isdigit()]


@pytest.mark.usefixtures("undrawn")
def test_a_domain_called_mean_has_a_column_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(json.dumps(evaluation()).replace('"math"', '"mean"'))
    assert report.main([str(write_evaluation(tmp_path, content))]) == 0
    header = capsys.readouterr().out.splitlines()[2]
    assert header.split("  ")[-1].strip() == "mean over domains" and header.split().count("mean") == 2


def test_pipes_are_not_read(tmp_path: Path) -> None:
    """They would be waited for, forever."""
    run = make_run(tmp_path)
    (run / "seed" / "checkpoint").mkdir()
    for pipe in ("plan.json", "recipe.yaml", "seed/config.yaml", "seed/checkpoint/latest_checkpointed_iteration.txt"):
        os.mkfifo(run / pipe)
    assert len(read_run(run).stages) == 9


@pytest.mark.usefixtures("undrawn")
def test_a_report_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_evaluation(tmp_path, evaluation())
    for make in (lambda: (run / "report").write_text("x"), lambda: (run / "report").symlink_to("/nowhere")):
        make()
        assert report.main([str(run)]) == 2
        assert "report: is no folder" in capsys.readouterr().err
        (run / "report").unlink()


def test_odd_manifests_and_many_curves_are_borne(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A status that is no text; a hundred experts, whose names would fill the panel."""
    run = make_run(tmp_path)
    change(
        run / "seed" / "manifest.json", lambda content: content.update(status={"a": 1}, steps=2_000, parents={"x": [1]})
    )
    for number in range(100):
        write_json(run / f"expert-x{number}" / "manifest.json", {"tokens": 10, "steps": 10, "status": "finished"})
        (run / f"expert-x{number}" / "metrics.jsonl").write_text('{"iteration": 10, "lm loss": 2}\n')
    build_report(run)
    assert len(results(run)["curves"]) == 107
    assert [str(warning.message) for warning in recwarn] == []
