"""``--btx-metrics FILE``: every scalar that Megatron logs, one JSON object per step, in full precision.

Megatron prints rounded losses and sends exact ones to TensorBoard alone. Here its TensorBoard writer is joined by one
that collects the scalars of a step and appends them as one line when the step's log is complete. After a resume the
file goes on; the last line of an iteration counts. A step after which Megatron evaluates has two.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_btx.engine import patch
from megatron_btx.training.hooks import Callback


class MetricsWriter(Callback):
    """A TensorBoard writer that also keeps each step's scalars, and writes them as one line of JSON."""

    def __init__(self, file: Path, inner: Any | None) -> None:
        """Append to ``file``; pass everything on to ``inner``, Megatron's own writer, if there is one."""
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        # Unbuffered lines: what was logged survives a SIGKILL.
        self._file = open(file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - open as long as the run
        if _ends_within_a_line(file):
            self._file.write("\n")
        self._inner = inner
        self._scalars: dict[str, float] = {}
        self._line: dict[str, float] = {}

    def add_scalar(self, tag: str, value: Any, step: int) -> None:
        """Keep one scalar, except Megatron's second copy of each by samples instead of steps."""
        if not tag.endswith(" vs samples"):
            self._scalars[tag] = float(value)
        if self._inner is not None:
            self._inner.add_scalar(tag, value, step)

    def after_log(self, iteration: int, losses: dict[str, Any]) -> None:
        """Append the collected scalars, and the losses whatever Megatron's log intervals are."""
        self._scalars |= {name: float(value) for name, value in losses.items()}
        if self._scalars:
            self._write({"iteration": iteration, "time": time.time(), **self._scalars})

    def after_evaluation(self, iteration: int, is_test: bool) -> None:
        """Append the step's line once more, with what Megatron's own evaluation found after it was written.

        Args:
            is_test: Megatron gives its losses the names of the validation set's; here they have their own.
        """
        found = self._scalars
        if is_test:
            found = {name.replace(" validation", " test", 1): value for name, value in found.items()}
        if found:
            before = self._line if self._line.get("iteration") == iteration else {"time": time.time()}
            self._write({"iteration": iteration, **before, **found})

    def _write(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._line, self._scalars = line, {}

    def __getattr__(self, name: str) -> Any:
        # Text, histograms and flushes are TensorBoard's alone.
        if self._inner is None:
            return lambda *_args, **_kwargs: None
        return getattr(self._inner, name)


def _ends_within_a_line(file: Path) -> bool:
    """Whether the last line was cut, by a full disk say: the next one must not be appended to it."""
    with open(file, "rb") as existing:
        if existing.seek(0, os.SEEK_END) == 0:
            return False
        existing.seek(-1, os.SEEK_END)
        return existing.read() != b"\n"


def write_metrics(args: argparse.Namespace) -> list[Callback]:
    """Join Megatron's TensorBoard writer on the rank that logs (the last one), if --btx-metrics is given.

    Returns:
        what must follow the steps; nothing on the other ranks.

    Raises:
        MegatronVersionError: the installed Megatron keeps its writer elsewhere.
    """
    if not args.btx_metrics or args.rank != args.world_size - 1:
        return []
    from megatron.training import global_vars

    name = "_GLOBAL_TENSORBOARD_WRITER"
    patch.expect(global_vars, name)
    writer = MetricsWriter(Path(args.btx_metrics), getattr(global_vars, name))
    patch.replace(global_vars, name, writer)
    return [writer]
