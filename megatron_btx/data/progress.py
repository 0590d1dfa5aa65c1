"""How far a long piece of work is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Bytes done out of a total, with rate and time left, on stderr.

    A log file gets plain lines instead of a bar, and none at all for work that ends before the first is due.
    """

    def __init__(self, what: str, total_bytes: int, quiet: bool = False) -> None:
        self._what = what
        self._total_bytes = max(total_bytes, 1)
        self._done_bytes = 0
        self._started = self._last_line = time.monotonic()
        self._quiet = quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(what, total=self._total_bytes)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done_bytes: int) -> None:
        """Count further input bytes as done."""
        self._done_bytes += done_bytes
        if self._bar is not None:
            self._bar.advance(self._task, done_bytes)
            return
        now = time.monotonic()
        if not self._quiet and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        rate = self._done_bytes / seconds
        left = (self._total_bytes - self._done_bytes) / rate if rate > 0 else float("inf")
        share = self._done_bytes / self._total_bytes
        return (
            f"{self._what}: {share:.0%} of {self._total_bytes / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s, {left:.0f} s left"
        )
