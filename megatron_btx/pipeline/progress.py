"""What a run is doing: stage, step, loss, tokens/s, time left; live on a terminal, as lines elsewhere."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_btx.ground.errors import InputError, printable
from megatron_btx.ground.manifest import read_manifest
from megatron_btx.pipeline.stage import Stage

LINE_SECONDS = 15.0
"""Between two lines about a running stage where there is no terminal."""
_TAIL_BYTES, _TAIL_BYTES_AT_MOST = 2**15, 2**26
_SPEED_STEPS = 20
"""Steps over which the speed is taken."""
_WIDE_COLUMNS = 10_000
"""More than any table of a run has."""
_HEADERS = ("stage", "state", "step", "loss", "tokens/s", "time left", "time")


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
        return (
            self.name,
            self.state,
            f"{self.step or 0}/{self.steps}" if self.steps else "",
            "" if self.loss is None else f"{self.loss:.3f}",
            "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}",
            "" if self.seconds_left is None else _clock(self.seconds_left),
            "" if self.seconds is None else _clock(self.seconds),
        )


def read_row(directory: Path, name: str, state: str, steps: int | None, tokens: int | None) -> Row:
    """The state of a stage from its manifest and the end of its metrics.jsonl; what cannot be read is left out."""
    manifest = shown_manifest(directory)
    lines = _tail(directory / "metrics.jsonl") if steps else []
    last: dict[str, Any] = lines[-1] if lines else {}
    step_seconds = _step_seconds(lines[-_SPEED_STEPS:])
    running = state == "running" and bool(last) and step_seconds > 0
    return Row(
        name,
        state,
        last.get("iteration"),
        steps,
        _number(last.get("lm loss")),
        tokens / steps / step_seconds if steps and tokens and step_seconds else None,
        (steps - last["iteration"]) * step_seconds if steps and running else None,
        _number(manifest.get("seconds")),
    )


def shown_manifest(directory: Path) -> Mapping[str, Any]:
    """The manifest of a stage; where it is broken, one that says so: the other stages can be shown all the same."""
    try:
        return read_manifest(directory) or {}
    except (InputError, OSError):
        return {"status": "unreadable"}


def _number(value: Any) -> float | None:
    """``value`` where it is a number that can be reckoned with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, float) or value.bit_length() < 64 else None


def _step_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """The usual time between two steps: a median, because a save or a resume lies between some. 0: not known."""
    pairs = [(before, after) for before, after in pairwise(lines) if after["iteration"] > before["iteration"]]
    times = [(after["time"] - before["time"]) / (after["iteration"] - before["iteration"]) for before, after in pairs]
    return max(0.0, statistics.median(times)) if times else 0.0


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last metrics; a first line cut by the window, or a last one torn by a kill, is passed over.

    The window grows until it holds the steps that a speed is taken over: a line of a wide mixture has 20 KB and more.
    """
    window, found = _TAIL_BYTES, list[dict[str, Any]]()
    if not path.is_file():  # opening a pipe would wait forever
        return []
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            while len(found) <= _SPEED_STEPS:
                stream.seek(max(0, size - window))
                found = _metrics_in(stream.read().decode("utf-8", "replace"))
                if window >= size or window > _TAIL_BYTES_AT_MOST:
                    break
                window *= 8
    except OSError:
        return []
    return found


def _metrics_in(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
            continue
        if _number(entry["iteration"]) is not None and _number(entry.get("time")) is not None:
            found.append(entry)
    return found


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table for a terminal."""
    grid = Table(title=Text(printable(title)), title_justify="left")
    for header in _HEADERS:
        grid.add_column(header, justify="left" if header in ("stage", "state") else "right", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row.cells()))  # as text: brackets in a name are no markup
    return grid


def print_table(rows: Sequence[Row], title: str) -> None:
    """Print the rows: on a terminal within its width, elsewhere whole, because a program or a file reads them."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE_COLUMNS)
    console.print(table(rows, title))


class Progress:
    """Shows a run while it goes on. Use as a context manager; call :meth:`update` often, it paces itself."""

    def __init__(self, run: Path, stages: Sequence[Stage]) -> None:
        self.run, self.stages = run, stages
        self.states: dict[str, str] = {stage.name: "waiting" for stage in stages}
        self.console = Console(file=sys.stdout)
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.last_update = 0.0
        self.last_line: dict[str, float] = {}

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._refresh(self.live)
            self.live.stop()

    def set(self, stage: str, state: str, why: str = "") -> None:
        """A stage changes its state; ``why`` is said where there is no table."""
        self.states[stage] = state
        self.last_line[stage] = time.monotonic()
        if not self.live:
            self._line(f"{stage}: {state}" + (f" ({why})" if why else ""))

    def update(self) -> None:
        """Show the running stages anew when it is time to."""
        now = time.monotonic()
        if self.live and now - self.last_update > 1.0:
            self.last_update = now
            self._refresh(self.live)
        for stage in self.stages if not self.live else ():
            if self.states[stage.name] == "running" and now - self.last_line[stage.name] > LINE_SECONDS:
                self.last_line[stage.name] = now
                self._line(_sentence(self._row(stage)))

    def _row(self, stage: Stage) -> Row:
        return read_row(self.run / stage.name, stage.name, self.states[stage.name], stage.iterations, stage.tokens)

    def _refresh(self, live: Live) -> None:
        live.update(table([self._row(stage) for stage in self.stages], str(self.run)), refresh=True)

    def _line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _sentence(row: Row) -> str:
    name, state, *cells = row.cells()
    labels = ("step {}", "loss {}", "{} tokens/s", "{} left", "{} so far")
    parts = [label.format(cell) for label, cell in zip(labels, cells, strict=True) if cell]
    return f"{name}: {', '.join(parts) if parts else state}"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
