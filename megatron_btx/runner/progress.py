"""What a run is doing, shown while it goes on: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from megatron_btx.plan.stage import Stage
from megatron_btx.runner.progress_table import HEADERS, Row, describe_cells, make_progress_table, read_row

LINE_SECONDS = 15.0
"""Between two lines about a running stage where there is no terminal."""
_TABLE_SECONDS = 1.0


class Reporter:
    """Who is told what happens to the stages of a run; this one tells nobody."""

    def set(self, stage: str, state: str, why: str = "") -> None:
        """A stage changes its state."""

    def update(self) -> None:
        """Another turn of the runner."""


class Progress(Reporter):
    """Shows a run while it goes on. Use as a context manager; call :meth:`update` often, it paces itself."""

    def __init__(self, run: Path, stages: Sequence[Stage]) -> None:
        self.run, self.stages = run, stages
        self.states: dict[str, str] = {stage.name: "waiting" for stage in stages}
        self.console = Console(file=sys.stdout)
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
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
        if self.live:
            return
        text = f"{stage}: {state}"
        if why:
            text += f" ({why})"
        _print_line(text)

    def update(self) -> None:
        """Show the running stages anew when it is time to."""
        if self.live is None:
            self._print_due_lines()
        elif time.monotonic() - self.last_update > _TABLE_SECONDS:
            self.last_update = time.monotonic()
            self._refresh(self.live)

    def _print_due_lines(self) -> None:
        now = time.monotonic()
        for stage in self.stages:
            if self.states[stage.name] == "running" and now - self.last_line[stage.name] > LINE_SECONDS:
                self.last_line[stage.name] = now
                _print_line(describe_cells(HEADERS, self._row(stage).cells()))

    def _row(self, stage: Stage) -> Row:
        return read_row(self.run / stage.name, stage.name, self.states[stage.name], stage.iterations, stage.tokens)

    def _refresh(self, live: Live) -> None:
        rows = [self._row(stage) for stage in self.stages]
        live.update(make_progress_table(rows, str(self.run)), refresh=True)


def _print_line(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
