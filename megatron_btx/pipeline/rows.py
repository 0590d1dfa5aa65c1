"""How far the stages of a run are, as rows of a table: stage, state, step, loss, tokens/s, time left, time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_btx.ground.errors import InputError, printable
from megatron_btx.pipeline.directory import (
    METRICS_FILE,
    read_last_metrics,
    read_stage_manifest,
)
from megatron_btx.pipeline.records import MetricsLine, StageManifest

_SPEED_STEPS = 20
"""Steps over which the speed is taken."""
_WIDE_COLUMNS = 10_000
"""More than any table of a run has."""
_HEADERS = ("stage", "state", "step", "loss", "tokens/s", "time left", "time")
_TEXT_HEADERS = ("stage", "state", "does", "made from", "why")


@dataclass(frozen=True)
class Row:
    """One stage at one moment; None where it does not apply or is not known yet."""

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of the table's columns."""
        step = loss = speed = left = time = ""
        if self.steps:
            step = f"{self.step or 0}/{self.steps}"
        if self.loss is not None:
            loss = f"{self.loss:.3f}"
        if self.tokens_per_second is not None:
            speed = f"{self.tokens_per_second:,.0f}"
        if self.seconds_left is not None:
            left = _clock(self.seconds_left)
        if self.seconds is not None:
            time = _clock(self.seconds)
        return (self.name, self.state, step, loss, speed, left, time)


def read_row(directory: Path, name: str, state: str, steps: int | None, tokens: int | None) -> Row:
    """The state of a stage from its manifest and the end of its metrics; what cannot be read is left out."""
    seconds = read_shown_manifest(directory).seconds
    if not steps:
        return Row(name, state, seconds=seconds)
    lines = read_last_metrics(directory / METRICS_FILE, _SPEED_STEPS + 1)
    if not lines:
        return Row(name, state, steps=steps, seconds=seconds)
    last = lines[-1]
    speed = left = None
    step_seconds = _median_step_seconds(lines[-_SPEED_STEPS:])
    if step_seconds and tokens:
        speed = tokens / steps / step_seconds
    if step_seconds and state == "running":
        left = (steps - last.iteration) * step_seconds
    return Row(name, state, last.iteration, steps, last.loss, speed, left, seconds)


def read_shown_manifest(directory: Path) -> StageManifest:
    """The manifest of a stage; where it is broken, one that says so: the other stages can be shown all the same."""
    try:
        return read_stage_manifest(directory) or StageManifest()
    except (InputError, OSError):
        return StageManifest(status="unreadable")


def _median_step_seconds(lines: Sequence[MetricsLine]) -> float | None:
    """The usual time between two steps: a median, because a save or a resume lies between some. None: not known."""
    times = []
    for before, after in pairwise(lines):
        steps = after.iteration - before.iteration
        if steps > 0 and before.time is not None and after.time is not None:
            times.append((after.time - before.time) / steps)
    if not times:
        return None
    return max(0.0, statistics.median(times)) or None


def make_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Cells as a table for a terminal. They are text: brackets in a name are no markup."""
    grid = Table(title=Text(printable(title)), title_justify="left")
    for header in headers:
        if header in _TEXT_HEADERS:
            grid.add_column(header, no_wrap=True)
        else:
            grid.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(*[Text(printable(cell)) for cell in row])
    return grid


def make_progress_table(
    rows: Sequence[Row], title: str, headers: Sequence[str] = (), more: Sequence[Sequence[str]] = ()
) -> Table:
    """The rows of a run as a table; ``more`` has the cells of further columns, row by row, under ``headers``."""
    cells = [list(row.cells()) for row in rows]
    for row, further in zip(cells, more, strict=False):
        row.extend(further)
    return make_table((*_HEADERS, *headers), cells, title)


def print_table(table: Table) -> None:
    """Print a table: on a terminal within its width, elsewhere whole, because a program or a file reads it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE_COLUMNS)
    console.print(table)


def describe_row(row: Row) -> str:
    """The row as a line, for where there is no table."""
    name, state, *cells = row.cells()
    parts = []
    for label, cell in zip(("step {}", "loss {}", "{} tokens/s", "{} left", "{} so far"), cells, strict=True):
        if cell:
            parts.append(label.format(cell))
    return f"{name}: {', '.join(parts) or state}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
