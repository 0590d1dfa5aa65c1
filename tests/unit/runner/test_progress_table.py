"""What is shown of a run: of this moment alone, and readable at every width."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_btx import cli
from megatron_btx.data.domains import Domain
from megatron_btx.plan.stage import Stage
from megatron_btx.runner.decisions import Action
from megatron_btx.runner.local import Machine
from megatron_btx.runner.tables import Reporter, Row, describe_repeats, make_plan_table, make_progress_table, read_row
from tests.unit.runner.running import run_stages

ROWS = [
    Row("expert-knowledge", "running", 500, 1000, 3.2134, 5123.0, 600.0, 1234.0),
    Row("data", "finished", seconds=4.0),
    Row("finetune", "queued", 0, 1000),
]
JOBS = [("8301", "may run 9:32 more"), ("8302", ""), ("8303", "waits for expert-knowledge, mix, evaluate-experts")]
SHOWN = ("expert-knowledge", "500/1000", "3.213", "5,123", "10:00", "20:34", "0:04", "queued", "0/1000")


def words_at(width: int, table: Any) -> list[str]:
    """What stands on a terminal of this width."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return " ".join(lines).replace(",", " ").replace(":", " ").split()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_nothing_of_a_run_is_cut_at_any_width(width: int) -> None:
    """Jobs of Slurm need some 130 columns in one line; their numbers are what one looks for."""
    for table, further in (
        (make_progress_table(ROWS, "runs/x"), []),
        (make_progress_table(ROWS, "runs/x", ("job", "why"), JOBS), [text for job in JOBS for text in job]),
    ):
        shown = words_at(width, table)
        for text in (*SHOWN, *further):
            assert set(text.replace(",", " ").replace(":", " ").split()) <= set(shown), (width, text)


def test_a_run_without_jobs_is_a_table_at_80_columns_and_one_with_jobs_at_120() -> None:
    assert "┃" in words_at(80, make_progress_table(ROWS, "runs/x"))
    assert "┃" in words_at(120, make_progress_table(ROWS, "runs/x", ("job", "why"), JOBS))


def test_a_plan_is_whole_at_80_columns() -> None:
    parents = tuple(f"expert-{number}" for number in range(12))
    stage = Stage("mix", ("true",), parents, iterations=1000, tokens=1_000_000)
    shown = words_at(80, make_plan_table([stage], {"mix": Action("run", "")}, "runs/x"))
    assert {*parents, "mix", "train"} <= set(shown)


def log(folder: Path, first: int, last: int, began: float) -> None:
    """Append a line per step, a second each."""
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            line = {"iteration": step, "time": began + step - first, "lm loss": 10.0 - step}
            file.write(json.dumps(line) + "\n")


def test_a_resumed_stage_shows_what_it_does_and_not_what_the_killed_one_did(tmp_path: Path) -> None:
    folder, now = tmp_path / "seed", time.time()
    log(folder, 1, 9, now - 900)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("4\n")
    manifest = {"stage": "seed", "status": "running", "started": now - 30, "seconds": 60.0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    at_once = read_row(folder, "seed", "running", 20, 20_480)
    assert at_once.cells() == ("seed", "running", "4/20", "", "", "", "1:00")
    log(folder, 5, 7, now - 6)
    later = read_row(folder, "seed", "running", 20, 20_480)
    assert later.cells() == ("seed", "running", "7/20", "3.000", "1,024", "0:13", "1:00")
    killed_again = read_row(folder, "seed", "interrupted", 20, 20_480)
    assert killed_again.cells() == ("seed", "interrupted", "7/20", "3.000", "1,024", "", "1:00")


def test_a_start_says_when_it_began(tmp_path: Path) -> None:
    """btx status, in another process, knows by it what is of this start."""
    before = time.time()
    assert run_stages([Stage("a", ("true",))], tmp_path, Machine((), 1), Reporter()) == 0
    assert before <= json.loads((tmp_path / "a" / "manifest.json").read_text())["started"] <= time.time()


def test_status_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps([{"stage": "expert-of-a-rather-long-name", "steps": 1000}]))
    log(tmp_path / "expert-of-a-rather-long-name", 1, 9, 0.0)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "9/1000" in shown and "1.000" in shown and "…" not in shown


def test_a_plan_says_which_texts_are_read_many_times(tmp_path: Path) -> None:
    """4 MB of math are about a million tokens, of which 90 % train; a text that is not there yet is not counted."""
    (tmp_path / "math.jsonl").write_bytes(b"x" * 4_000_000)
    (tmp_path / "code.jsonl").write_bytes(b"x" * 4_000_000)
    shared = Domain(text=[str(tmp_path / "math.jsonl")], shares={"train": 0.9, "test": 0.1})
    given = Domain(train=[str(tmp_path / "code.jsonl")], test=["/nowhere"])
    texts = {"math": shared, "code": given, "wiki": Domain(train=["/nowhere"])}
    blend = ["0.6", "data/math.train", "0.3", "data/code.train", "0.1", "data/wiki.train"]
    stages = [Stage("data", ("true",)), Stage("finetune", ("true",), settings={"train-data-path": blend}, tokens=12**7)]
    said = "note: finetune reads math.train some 24 times; finetune reads code.train some 11 times (at 4 bytes a token)"
    assert describe_repeats(stages, texts) == said
    few = [Stage("finetune", ("true",), settings={"train-data-path": blend}, tokens=3_000_000)]
    assert describe_repeats(few, texts) == ""
