"""A run as tables and lines: what it would do, how far it is, and what it does now."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_btx.common.errors import InputError
from megatron_btx.common.table import describe_cells, make_table
from megatron_btx.data.domains import Domain
from megatron_btx.data.inputs import expand_inputs
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import DATA_STAGE, METRICS_FILE, TRAIN_SPLIT
from megatron_btx.runner.decisions import KEEP, SKIP, Action
from megatron_btx.runner.run_dir import parse_metrics, read_checkpointed_iteration, read_end, read_stage_manifest
from megatron_btx.runner.schemas import MetricsLine, StageManifest

_SPEED_STEPS = 20
"""Steps over which the speed is taken."""
HEADERS = ("stage", "state", "step", "loss", "tokens/s", "time left", "time")
_PLAN_HEADERS = ("stage", "state", "kind", "processes", "steps", "tokens", "FLOPs", "made from")
_BYTES_PER_TOKEN, _EPOCHS_AT_MOST = 4, 4
"""Of English and code; up to some four epochs repeated text is worth nearly what new text is (arXiv:2305.16264)."""
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LINE_SECONDS = 15.0
"""Between two lines about a running stage where there is no terminal."""


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
    lines = parse_metrics(read_end(directory / METRICS_FILE).splitlines()[-_SPEED_STEPS:])
    if state == "running" and manifest.started is not None:  # what an earlier start logged is of another moment
        lines = [line for line in lines if (line.time or 0.0) >= manifest.started]
    if not lines:
        return Row(name, state, read_checkpointed_iteration(directory), steps, seconds=seconds)
    last = lines[-1]
    speed = left = None
    step_seconds = _median_step_seconds(lines)
    if step_seconds and tokens:
        speed = tokens / steps / step_seconds
    if step_seconds and state == "running":
        left = (steps - last.iteration) * step_seconds
    return Row(name, state, last.iteration, steps, last.loss, speed, left, seconds)


def read_shown_manifest(directory: Path) -> StageManifest:
    """The manifest of a stage; where it is broken, one that says so: the other stages can be shown all the same."""
    try:
        return read_stage_manifest(directory)
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


def make_progress_table(
    rows: Sequence[Row], title: str, headers: Sequence[str] = (), more: Sequence[Sequence[str]] = ()
) -> Table:
    """The rows of a run as a table; ``more`` has the cells of further columns, row by row, under ``headers``."""
    cells = [list(row.cells()) for row in rows]
    for row, further in zip(cells, more, strict=False):
        row.extend(further)
    return make_table((*HEADERS, *headers), cells, title)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def make_plan_table(stages: Sequence[Stage], actions: Mapping[str, Action], title: str) -> Table:
    """The stages that have something to do as rows."""
    rows = []
    for stage in stages:
        verb = actions[stage.name].verb
        if verb == SKIP:
            continue
        steps, tokens = say(stage.iterations, "{:,}".format), say(stage.tokens, "{:,}".format)
        flops, parents = say(stage.flops, with_prefix), ", ".join(stage.parents)
        rows.append([stage.name, verb, stage.kind, str(stage.processes), steps, tokens, flops, parents])
    return make_table(_PLAN_HEADERS, rows, title)


def describe_total(stages: Sequence[Stage], actions: Mapping[str, Action]) -> str:
    """The estimate of all that is to be trained."""
    due = [stage for stage in stages if actions[stage.name].verb not in (SKIP, KEEP)]
    tokens, flops = sum(stage.tokens or 0 for stage in due), sum(stage.flops or 0.0 for stage in due)
    unknown = sum(bool(stage.tokens) and stage.flops is None for stage in due)
    text = f"{_count(len(due), 'stage')} to run, {tokens:,} tokens to train on"
    if flops:
        text += f", some {with_prefix(flops)} FLOPs"
    if unknown:
        text += f" (without {_count(unknown, 'stage')} whose vocabulary is not known yet)"
    return text


def describe_repeats(stages: Sequence[Stage], texts: Mapping[str, Domain]) -> str:
    """The texts that stages read many times, by a guess of their tokens from their bytes; empty for none."""
    sizes: dict[str, float] = {}
    for domain, text in texts.items():
        with contextlib.suppress(InputError):  # a text that is not there yet
            files = expand_inputs(text.train or text.text or [])
            share = (text.shares or {}).get("train", 1.0)
            sizes[f"{DATA_STAGE}/{domain}.{TRAIN_SPLIT}"] = files.size_bytes() * share / _BYTES_PER_TOKEN
    repeats = []
    for stage in stages:
        for name, times in count_epochs(stage.deciding_settings(), stage.tokens, sizes).items():
            if times > _EPOCHS_AT_MOST:
                repeats.append(f"{stage.name} reads {Path(name).name} some {times:.0f} times")
    return f"note: {'; '.join(repeats)} (at {_BYTES_PER_TOKEN} bytes a token)" * bool(repeats)


def count_epochs(settings: Mapping[str, Any], tokens: float | None, sizes: Mapping[str, float]) -> dict[str, float]:
    """How often training reads each dataset of its blend.

    Args:
        settings: of the stage that trains; others have no blend.
        sizes: tokens of the datasets that are known.
    """
    blend = settings.get("train-data-path")
    if not isinstance(blend, list) or not tokens:
        return {}
    shares = dict(zip(map(str, blend[1::2]), blend[::2], strict=False))
    whole = sum(map(float, shares.values()))
    return {
        name: tokens * float(shares[name]) / whole / size for name, size in sizes.items() if size and name in shares
    }


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def with_prefix(value: float) -> str:
    """``value`` with a metric prefix, as "2.5 T"."""
    for size, prefix in _PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


class Reporter:
    """Who is told what happens to the stages of a run; this one tells nobody."""

    def set(self, stage: str, state: str, why: str = "") -> None:
        """A stage changes its state."""

    def update(self) -> None:
        """Another turn of the runner."""


class Progress(Reporter):
    """Shows a run while it goes on: on a terminal as a table, elsewhere in lines. Use as a context manager."""

    def __init__(self, run: Path, stages: Sequence[Stage]) -> None:
        self.run, self.stages = run, stages
        self.states: dict[str, str] = {stage.name: "waiting" for stage in stages}
        console = Console(file=sys.stdout)
        self.live: Live | None = None
        if console.is_terminal:
            self.live = Live(console=console, get_renderable=self._make_table, refresh_per_second=1)
        self.last_line: dict[str, float] = {}

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def set(self, stage: str, state: str, why: str = "") -> None:
        """A stage changes its state; ``why`` is said where there is no table."""
        self.states[stage] = state
        self.last_line[stage] = time.monotonic()
        if self.live:
            return
        _print_line(f"{stage}: {state}{f' ({why})' if why else ''}")

    def update(self) -> None:
        """Say how far the running stages are, where that was not said for a while and there is no table."""
        now = time.monotonic()
        for stage in self.stages:
            is_running = self.states[stage.name] == "running" and not self.live
            if is_running and now - self.last_line[stage.name] > LINE_SECONDS:
                self.last_line[stage.name] = now
                _print_line(describe_cells(HEADERS, self._row(stage).cells()))

    def _row(self, stage: Stage) -> Row:
        return read_row(self.run / stage.name, stage.name, self.states[stage.name], stage.iterations, stage.tokens)

    def _make_table(self) -> Table:
        return make_progress_table([self._row(stage) for stage in self.stages], str(self.run))


def _print_line(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
