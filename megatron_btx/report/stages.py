"""The stages of a run as its report sees them: how far each one went, at what cost, with what training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.ground.errors import InputError
from megatron_btx.ground.manifest import read_manifest
from megatron_btx.pipeline.directory import (
    CONFIG_FILE,
    MANIFEST_FILE,
    METRICS_FILE,
    read_checkpointed_iteration,
    read_metrics,
)
from megatron_btx.pipeline.records import LARGEST_COUNT, StageManifest

_ENDED_EARLY = {"running": "not finished", "stopped": "stopped", "failed": "failed"}
"""Status -> how a report says it. A killed run leaves "running" behind."""

Curve = tuple[tuple[int, float], ...]
"""(iteration, training loss in nats per token), ascending."""


@dataclass(frozen=True)
class Stage:
    """One directory of the run that holds a manifest or a loss curve."""

    name: str
    manifest: StageManifest | None
    curve: Curve
    """Empty for a stage that does not train."""
    tokens_per_iteration: float | None
    steps: int | None = None
    """How many it was to train."""
    reached: int | None = None
    """The last one that left metrics or a checkpoint."""
    written: Mapping[str, Any] | None = None
    """The manifest as it stands in its file, for programs."""

    @property
    def parents(self) -> tuple[str, ...]:
        """The stages it is made from."""
        if self.manifest is None:
            return ()
        return tuple(self.manifest.parents)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that decided its result; empty where nothing states them."""
        if self.manifest is None:
            return {}
        return self.manifest.settings or {}

    @property
    def unfinished(self) -> str:
        """How far an unfinished stage went, in words; empty for a finished one."""
        if self.manifest is None or self.manifest.is_finished:
            return ""
        status = self.manifest.status or ""
        reached = self.reached or 0
        is_short = self.steps is not None and self.reached is not None and reached < self.steps
        if status not in _ENDED_EARLY and not is_short:
            return ""
        ending = _ENDED_EARLY.get(status, "not finished")
        if not self.steps:
            return ending
        comma = "," * (ending == "not finished")
        return f"{ending}{comma} at step {reached:,} of {self.steps:,}"

    @property
    def tokens(self) -> float | None:
        """What it trained on, up to where an unfinished stage went; None where nothing states it."""
        if self.manifest is None:
            return None
        return self._so_far(self.manifest.tokens)

    @property
    def flops(self) -> float | None:
        """What it computed, up to where an unfinished stage went; None where nothing states it."""
        if self.manifest is None:
            return None
        return self._so_far(self.manifest.flops)

    @property
    def seconds(self) -> float | None:
        """What all its starts took; None where nothing states it."""
        if self.manifest is None:
            return None
        return self.manifest.seconds

    def count_broken_losses(self) -> int:
        """Iterations whose training loss is not a finite number."""
        broken = 0
        for _, loss in self.curve:
            if not math.isfinite(loss):
                broken += 1
        return broken

    def _so_far(self, stated: float | None) -> float | None:
        """The part of a cost of the whole stage that it has come to."""
        if stated is None or not self.unfinished:
            return stated
        if not self.steps:
            return None
        return float(stated) * (self.reached or 0) / self.steps


def read_stage(folder: Path) -> Stage | None:
    """The stage in ``folder``; None when neither a manifest nor a curve is there."""
    curve: Curve = ()
    logged = 0
    if not (folder / MANIFEST_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        return None
    written = None
    if (folder / MANIFEST_FILE).is_file():
        written = read_manifest(folder)
    manifest = None
    if written is not None:
        manifest = StageManifest.model_validate(written)
    if (folder / METRICS_FILE).is_file():
        curve, logged = read_curve(folder / METRICS_FILE)
    config = _read_config(folder / CONFIG_FILE)
    steps = _stated_steps(manifest) or _whole(read_number(config, "iterations"))
    reached = max(read_checkpointed_iteration(folder), logged) or None
    per_iteration = _tokens_per_iteration(manifest, config.get("flags"), steps, curve)
    return Stage(folder.name, manifest, curve, per_iteration, steps, reached, written)


def _stated_steps(manifest: StageManifest | None) -> int | None:
    if manifest is None:
        return None
    return manifest.steps


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
    manifest: StageManifest | None, flags: object, steps: int | None, curve: Sequence[tuple[int, float]]
) -> float | None:
    tokens = None
    if manifest is not None:
        tokens = manifest.tokens
    if tokens and steps:
        return tokens / steps
    sequence, batch = read_number(flags, "seq-length"), read_number(flags, "global-batch-size")
    if sequence and batch:
        return sequence * batch
    if manifest is not None and tokens and curve and manifest.status in (None, "finished"):
        last = curve[-1][0]
        if last:
            return tokens / last
    return None


def _whole(value: float | None) -> int | None:
    if value is None or not 0 < value < LARGEST_COUNT:
        return None
    return int(value)
