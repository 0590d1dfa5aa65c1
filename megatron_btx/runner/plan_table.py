"""The plan of a run as a table: every stage, what it does, its size and what it is made from."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_btx.common.errors import InputError
from megatron_btx.data.domains import Domain
from megatron_btx.data.inputs import expand_inputs
from megatron_btx.plan.stage import Program, Stage, one_line
from megatron_btx.recipe.names import DATA_STAGE, IMPORT_PREFIX, TRAIN_SPLIT
from megatron_btx.runner.decisions import KEEP, SKIP, Action, list_kept
from megatron_btx.runner.progress_table import find_width, make_table, say

_HEADERS = ("stage", "state", "does", "processes", "steps", "tokens", "FLOPs", "made from")
_PURPOSES = {
    "megatron_btx.pretrain": "train",
    "megatron_btx.evaluate": "evaluate",
    "megatron_btx.mixing.cli": "combine models",
    "megatron_btx.mixing.convert_hf": "convert",
    "megatron_btx.data.datasets": "make datasets",
    "megatron_btx.report.build": "report",
}
"""Module of a program -> what a stage of it does."""
_BYTES_PER_TOKEN, _EPOCHS_AT_MOST = 4, 4
"""Of English and code; up to some four epochs repeated text is worth nearly what new text is (arXiv:2305.16264)."""
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def make_plan_table(stages: Sequence[Stage], actions: Mapping[str, Action], title: str) -> Table:
    """The stages that have something to do as rows; see :func:`describe_finished` for the others."""
    rows = [_cells(stage, actions[stage.name]) for stage in stages if actions[stage.name].verb != SKIP]
    return make_table(_HEADERS, rows, title)


def describe_finished(stages: Sequence[Stage], actions: Mapping[str, Action]) -> str:
    """The stages that are finished, in one line; empty for none."""
    finished = [stage.name for stage in stages if actions[stage.name].verb == SKIP]
    if not finished:
        return ""
    return f"finished: {', '.join(finished)}"


def describe_kept(stages: Sequence[Stage], actions: Mapping[str, Action]) -> str:
    """What keep means for the stages that it is said of, in one line; empty for none."""
    kept = [f"{name}: {one_line(why)}" for name, why in list_kept(actions, [stage.name for stage in stages]).items()]
    meaning = "made otherwise, so btx run would stop; name them in --rerun, or give another --output"
    return f"keep: {meaning} ({'; '.join(kept)})" * bool(kept)


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


def render(table: Table) -> str:
    """The table as plain text."""
    console = Console(file=io.StringIO(), width=find_width())
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines)


def _cells(stage: Stage, action: Action) -> list[str]:
    steps, tokens = say(stage.iterations, "{:,}".format), say(stage.tokens, "{:,}".format)
    flops, parents = say(stage.flops, with_prefix), ", ".join(stage.parents)
    return [stage.name, action.verb, _purpose(stage), str(stage.processes), steps, tokens, flops, parents]


def _purpose(stage: Stage) -> str:
    if stage.name.startswith(IMPORT_PREFIX):
        return "import a model"
    if isinstance(stage.program, Program):
        return _PURPOSES.get(stage.program.module, stage.program.module)
    return stage.program[0]


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
