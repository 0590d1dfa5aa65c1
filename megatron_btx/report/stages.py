"""The stages of a run as its report sees them: how far each one went, at what cost, with what training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.ground.errors import InputError
from megatron_btx.ground.files import read_json_object
from megatron_btx.pipeline.directory import (
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    read_checkpointed_iteration,
    read_metrics,
)
from megatron_btx.pipeline.records import LARGEST_COUNT
from megatron_btx.report.membership import Manifest, parents_of

FINISHED = "finished"
_ENDED_EARLY = {"running": "not finished", "stopped": "stopped", "failed": "failed"}
"""Status -> how a report says it. A killed run leaves "running" behind."""

Curve = tuple[tuple[int, float], ...]
"""(iteration, training loss in nats per token), ascending."""


@dataclass(frozen=True)
class Stage:
    """One directory of the run that holds a manifest or a loss curve."""

    name: str
    manifest: Manifest | None
    curve: Curve
    """Empty for a stage that does not train."""
    tokens_per_iteration: float | None
    steps: int | None = None
    """How many it was to train."""
    reached: int | None = None
    """The last one that left metrics or a checkpoint."""

    @property
    def parents(self) -> tuple[str, ...]:
        """The stages it is made from."""
        return parents_of(self.manifest)

    @property
    def unfinished(self) -> str:
        """How far an unfinished stage went, in words; empty for a finished one."""
        status = str((self.manifest or {}).get("status"))
        if self.manifest is None or status == FINISHED:
            return ""
        reached = self.reached or 0
        is_short = self.steps is not None and self.reached is not None and reached < self.steps
        if status not in _ENDED_EARLY and not is_short:
            return ""
        ending = _ENDED_EARLY.get(status, "not finished")
        if not self.steps:
            return ending
        comma = "," * (ending == "not finished")
        return f"{ending}{comma} at step {reached:,} of {self.steps:,}"

    def cost(self, key: str) -> float | None:
        """What the stage took; None where nothing states it.

        Args:
            key: "tokens" or "flops", which count up to where an unfinished stage went; "seconds", of all its starts.
        """
        stated = read_number(self.manifest, key)
        if key == "seconds" or stated is None or not self.unfinished:
            return stated
        if not self.steps:
            return None
        return stated * (self.reached or 0) / self.steps


def read_stage(folder: Path) -> Stage | None:
    """The stage in ``folder``; None when neither a manifest nor a curve is there."""
    manifest: Manifest | None = None
    curve: Curve = ()
    logged = 0
    if not (folder / MANIFEST_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        return None
    if (folder / MANIFEST_FILE).is_file():
        manifest = read_manifest_file(folder / MANIFEST_FILE)
    if (folder / METRICS_FILE).is_file():
        curve, logged = read_curve(folder / METRICS_FILE)
    config = _read_config(folder / CONFIG_FILE)
    steps = _whole(read_number(manifest, "steps")) or _whole(read_number(config, "iterations"))
    reached = max(read_checkpointed_iteration(folder), logged) or None
    per_iteration = _tokens_per_iteration(manifest, config.get("flags"), steps, curve)
    return Stage(folder.name, manifest, curve, per_iteration, steps, reached)


def read_manifest_file(file: Path) -> dict[str, Any]:
    """The manifest in ``file``; InputError when it is none."""
    return read_json_object(file, "run the stage that writes it again")


def read_curve(file: Path) -> tuple[Curve, int]:
    """Training loss per iteration from a metrics.jsonl, and the last iteration in it (0: none).

    The last line for an iteration counts. Raises InputError when the file has lines, and none can be read.
    """
    losses: dict[int, float] = {}
    last = 0
    for line in read_metrics(file):
        last = max(last, line.iteration)
        if line.loss is not None:
            losses[line.iteration] = line.loss
    return tuple(sorted(losses.items())), last


def read_number(content: object, key: str) -> float | None:
    """A number that a mapping states under ``key``; None where it states none."""
    if not isinstance(content, Mapping):
        return None
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of 400 digits
        return math.inf


def _read_config(file: Path) -> dict[str, Any]:
    """A stage's config.yaml, as the run wrote it; empty without one."""
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: broken YAML ({error}); run the stage again") from error
    if not isinstance(content, dict):
        return {}
    return content


def _tokens_per_iteration(
    manifest: Manifest | None, flags: object, steps: int | None, curve: Sequence[tuple[int, float]]
) -> float | None:
    tokens = read_number(manifest, "tokens")
    if tokens and steps:
        return tokens / steps
    sequence, batch = read_number(flags, "seq-length"), read_number(flags, "global-batch-size")
    if sequence and batch:
        return sequence * batch
    if manifest is not None and tokens and curve and manifest.get("status") in (None, FINISHED):
        last = curve[-1][0]
        if last:
            return tokens / last
    return None


def _whole(value: float | None) -> int | None:
    if value is None or not 0 < value < LARGEST_COUNT:
        return None
    return int(value)
