"""The stages of a run as its report sees them: how far each one went, and whether it belongs to the run's recipe.

A stage is of the recipe when the run's plan has it with the same fingerprint. Where the plan has no fingerprints, an
earlier version wrote it; then the manifests are compared among themselves: a stage is made from the stages beside it
when it names their fingerprints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.folder import PLAN_FILE, read_plan

FINISHED = "finished"
_ENDED_EARLY = {"running": "not finished,", "stopped": "stopped", "failed": "failed"}
"""Status -> how a report says it. A killed run leaves "running" behind."""
_TRACKER = "checkpoint/latest_checkpointed_iteration.txt"
_LARGEST = 2**53
"""Whole numbers above it are no counts of anything; floating point does not hold them exactly either."""


@dataclass(frozen=True)
class Stage:
    """One directory of the run that holds a manifest or a loss curve."""

    name: str
    manifest: Mapping[str, Any] | None
    curve: tuple[tuple[int, float], ...]
    """(iteration, training loss in nats per token), ascending; empty for a stage that does not train."""
    tokens_per_iteration: float | None
    steps: int | None = None
    """How many it was to train."""
    reached: int | None = None
    """The last one that left metrics or a checkpoint."""

    @property
    def unfinished(self) -> str:
        """How far an unfinished stage went, in words; empty for a finished one."""
        status = str((self.manifest or {}).get("status"))
        if self.manifest is None or status == FINISHED:
            return ""
        short = self.steps is not None and self.reached is not None and self.reached < self.steps
        if status not in _ENDED_EARLY and not short:
            return ""
        where = f" at step {self.reached or 0:,} of {self.steps:,}" if self.steps else ""
        return _ENDED_EARLY.get(status, "not finished,").rstrip("," if not where else "") + where

    def cost(self, key: str) -> float | None:
        """Its tokens, FLOPs (up to where an unfinished one went) or seconds (of all its starts); None: not stated."""
        stated = number(self.manifest, key)
        if key == "seconds" or stated is None or not self.unfinished:
            return stated
        return stated * (self.reached or 0) / self.steps if self.steps else None


def read_stage(folder: Path) -> Stage | None:
    """The stage in ``folder``; None when neither a manifest nor a curve is there."""
    manifest_path, metrics_path = folder / "manifest.json", folder / "metrics.jsonl"
    if not manifest_path.is_file() and not metrics_path.is_file():
        return None
    manifest = read_json(manifest_path) if manifest_path.is_file() else None
    curve, logged = read_metrics(metrics_path) if metrics_path.is_file() else ((), 0)
    config = _read_config(folder / "config.yaml")
    steps = _whole(number(manifest, "steps")) or _whole(number(config, "iterations"))
    reached = max(_checkpointed(folder / _TRACKER), logged) or None
    return Stage(folder.name, manifest, curve, _tokens_per_iteration(manifest, config, steps, curve), steps, reached)


def left_out(run: Path, manifests: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """Folders whose stage is not of the run's recipe, and why.

    Args:
        manifests: folder -> what its manifest says; None where it has none, only a curve.
    """
    plan = read_plan(run / PLAN_FILE)
    planned = {str(entry["stage"]): entry.get("fingerprint") for entry in plan or ()}
    reasons: dict[str, str] = {}
    for name, manifest in manifests.items():
        own = (manifest or {}).get("fingerprint")
        if plan is not None and name not in planned:
            reasons[name] = "not a stage of this run's recipe"
        elif planned.get(name) and own and planned[name] != own:
            reasons[name] = "made with other settings, or from other stages, than this run's recipe has"
    trusted = {name for name in manifests if _is_planned(manifests[name], planned.get(name))}
    for name, manifest in manifests.items():
        others = [] if name in reasons or name in trusted else _other_parents(manifest, manifests)
        if others:
            reasons[name] = f"made from another {', '.join(others)}"
    for _ in manifests:  # what is made from a stage that is left out is left out, however many stages on
        for name in manifests:
            behind = [parent for parent in parents_of(manifests[name]) if parent in reasons]
            if behind and name not in reasons and name not in trusted:
                reasons[name] = f"made from {', '.join(behind)}, which is left out"
    return reasons


def parents_of(manifest: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names of the stages that a manifest says its stage is made from."""
    parents = (manifest or {}).get("parents")
    return tuple(map(str, parents)) if isinstance(parents, dict | list) else ()


def _is_planned(manifest: Mapping[str, Any] | None, fingerprint: Any) -> bool:
    return fingerprint is not None and (manifest or {}).get("fingerprint") == fingerprint


def _other_parents(manifest: Mapping[str, Any] | None, manifests: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """Parents that were another stage when this one was made, by their fingerprints."""
    parents = (manifest or {}).get("parents")
    if not isinstance(parents, dict):
        return []
    now = {parent: (manifests.get(parent) or {}).get("fingerprint") for parent in parents}
    return [parent for parent, then in parents.items() if now[parent] is not None and now[parent] != then]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; InputError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON ({error}); run the stage that writes it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found JSON of type {type(content).__name__}, expected an object")
    return content


def read_metrics(path: Path) -> tuple[tuple[tuple[int, float], ...], int]:
    """Training loss per iteration from a metrics.jsonl, and the last iteration in it (0: none).

    The last line for an iteration counts. A line torn by a kill is passed over: the resumed run wrote its iterations
    again, behind it.
    """
    losses: dict[int, float] = {}
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    readable = last = 0
    for line in lines:
        try:
            entry = json.loads(line)
            iteration, loss = int(entry["iteration"]), entry.get("lm loss")
            value = None if loss is None else float(loss)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        if not 0 <= iteration < _LARGEST:
            continue
        readable, last = readable + 1, max(last, iteration)
        if value is not None:
            losses[iteration] = value
    if lines and not readable:
        raise InputError(f"{path}: none of its {len(lines)} lines is a JSON object with an iteration; remove it, rerun")
    return tuple(sorted(losses.items())), last


def number(content: Mapping[str, Any] | None, key: str) -> float | None:
    """A number that a manifest or another file states, or None where it states none."""
    value = (content or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number of 400 digits
        return math.inf if value > 0 else -math.inf


def leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in ``node`` that is no mapping; the items of a list are one value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        yield where, ", ".join(str(item) for item in node)
    else:
        yield where, node


def _read_config(path: Path) -> dict[str, Any]:
    """A stage's settings by the last part of their names, spelled as flags."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken YAML ({error}); run the stage again") from error
    return {key.rsplit(".", 1)[-1].lstrip("-").replace("_", "-"): value for key, value in leaves(content)}


def _checkpointed(tracker: Path) -> int:
    """The iteration of the last checkpoint; 0 when there is none."""
    if not tracker.is_file():  # reading a pipe would wait forever
        return 0
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else 0


def _tokens_per_iteration(
    manifest: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    steps: int | None,
    curve: Sequence[tuple[int, float]],
) -> float | None:
    tokens = number(manifest, "tokens")
    if tokens and steps:
        return tokens / steps
    sequence, batch = number(config, "seq-length"), number(config, "global-batch-size")
    if sequence and batch:
        return sequence * batch
    if tokens and curve and curve[-1][0] and (manifest or {}).get("status") in (None, FINISHED):
        return tokens / float(curve[-1][0])
    return None


def _whole(value: float | None) -> int | None:
    return int(value) if value is not None and 0 < value < _LARGEST else None
