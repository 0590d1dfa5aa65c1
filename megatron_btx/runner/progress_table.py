"""How far the stages of a run are, as rows of a table: stage, state, step, loss, tokens/s, time left, time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Column, Table
from rich.text import Text

from megatron_btx.common.errors import InputError, printable
from megatron_btx.recipe.names import METRICS_FILE
from megatron_btx.runner.run_dir import read_checkpointed_iteration, read_last_metrics, read_stage_manifest
from megatron_btx.runner.schemas import MetricsLine, StageManifest

_SPEED_STEPS = 20
"""Steps over which the speed is taken."""
_WIDE_COLUMNS = 10_000
"""More than any table of a run has."""
HEADERS = ("stage", "state", "step", "loss", "tokens/s", "time left", "time")
_TEXT_HEADERS = ("stage", "state", "does", "made from", "why")
_WRAPPED_HEADERS = ("made from", "why")


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
        step = f"{self.step or 0}/{self.steps}" * bool(self.steps)
        loss, speed = say(self.loss, "{:.3f}".format), say(self.tokens_per_second, "{:,.0f}".format)
        return (self.name, self.state, step, loss, speed, say(self.seconds_left, _clock), say(self.seconds, _clock))


def say(value: float | None, write: Callable[[float], str]) -> str:
    """A number as text; empty where there is none."""
    if value is None:
        return ""
    return write(value)


def read_row(directory: Path, name: str, state: str, steps: int | None, tokens: int | None) -> Row:
    """The state of a stage from its manifest and the end of its metrics; what cannot be read is left out."""
    manifest = read_shown_manifest(directory)
    seconds = manifest.seconds
    if not steps:
        return Row(name, state, seconds=seconds)
    lines = read_last_metrics(directory / METRICS_FILE, _SPEED_STEPS + 1)
    if state == "running" and manifest.started is not None:  # what an earlier start logged is of another moment
        lines = [line for line in lines if (line.time or 0.0) >= manifest.started]
    if not lines:
        return Row(name, state, read_checkpointed_iteration(directory), steps, seconds=seconds)
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


class WholeTable(Table):
    """A table that is a line for every row where it does not fit: rich would cut its cells, down to nothing."""

    lines: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Called by rich when the width is known."""
        if self.__rich_measure__(console, options.update(max_width=_WIDE_COLUMNS)).minimum <= options.max_width:
            yield from super().__rich_console__(console, options)  # type: ignore[misc]
        else:
            yield from map(Text, self.lines)


def make_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Cells as a table for a terminal. They are text: brackets in a name are no markup."""
    texts = [[printable(cell) for cell in row] for row in rows]
    columns = []
    for header, *cells in zip(headers, *texts, strict=True):
        column = Column(header)
        if header not in _WRAPPED_HEADERS:
            column.no_wrap, column.min_width = True, max(map(cell_len, (header, *cells)))
        if header not in _TEXT_HEADERS:
            column.justify = "right"
        columns.append(column)
    grid = WholeTable(*columns, title=Text(printable(title)), title_justify="left", show_edge=False, pad_edge=False)
    for row in texts:
        grid.add_row(*map(Text, row))
    grid.lines = [printable(title), *(describe_cells(headers, row) for row in texts)]
    return grid


def make_progress_table(
    rows: Sequence[Row], title: str, headers: Sequence[str] = (), more: Sequence[Sequence[str]] = ()
) -> Table:
    """The rows of a run as a table; ``more`` has the cells of further columns, row by row, under ``headers``."""
    cells = [list(row.cells()) for row in rows]
    for row, further in zip(cells, more, strict=False):
        row.extend(further)
    return make_table((*HEADERS, *headers), cells, title)


def find_width() -> int:
    """Of the terminal; elsewhere a table is printed whole, because a program or a file reads it."""
    console = Console()
    if console.is_terminal:
        return console.width
    return _WIDE_COLUMNS


def describe_cells(headers: Sequence[str], cells: Sequence[str]) -> str:
    """A row of a table as a line: "seed: running, step 5/10, loss 3.210"."""
    parts = []
    for header, cell in zip(headers[1:], cells[1:], strict=True):
        if cell.strip():
            parts.append(f"{header} {cell.strip()}".removeprefix("state "))
    return f"{cells[0].strip()}: {', '.join(parts)}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
