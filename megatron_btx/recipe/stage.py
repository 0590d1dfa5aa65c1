"""A stage of a run: one command, its parents, its directory, and the fingerprint that says whether it is up to date."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PYTHON = "python"
"""Stands for the interpreter in a stage's command; command.sh takes this one unless $PYTHON names another."""


@dataclass(frozen=True)
class Stage:
    """One node of the graph. Paths in ``command`` are absolute, or relative to the run directory."""

    name: str
    command: tuple[str, ...]
    parents: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    """What the stage reads from outside the run: files, folders, or prefixes of .bin/.idx files."""
    product: str = ""
    """File or folder in the stage's directory that must exist when the stage is finished; empty for none."""
    processes: int = 1
    threads: int = 1
    on_gpu: bool = False
    """Whether each process takes a GPU where there are GPUs."""
    resumable: bool = False
    """Whether the command continues from what an earlier, stopped start left; else that is removed first."""
    iterations: int | None = None
    """Steps of a stage that trains."""
    tokens: int | None = None
    flops: float | None = None
    """Estimate for the whole stage; see :func:`megatron_btx.recipe.planner.training_flops`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Resolved settings, for config.yaml."""


def command_text(stage: Stage) -> str:
    """The stage's command for a shell in the run directory, a flag per line."""
    words = [shlex.quote(word) for word in stage.command]
    if stage.command[0] == PYTHON:
        words[0] = f'"${{PYTHON:-{shlex.quote(sys.executable)}}}"'
    lines: list[str] = []
    for word in words:
        if not lines or word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n    ".join(lines)


def command_script(stage: Stage) -> str:
    """The stage's command.sh: exactly what the runner executes, and what a person can call from anywhere."""
    return (
        "#!/usr/bin/env bash\n"
        f"# Stage {stage.name}. Relative paths count from the run directory, the parent of this script's.\n"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."\n'
        f"export OMP_NUM_THREADS={stage.threads}\n"
        f"exec {command_text(stage)}\n"
    )


def fingerprints(stages: Iterable[Stage]) -> dict[str, str]:
    """Fingerprint of each stage; ``stages`` in an order in which parents come first.

    It covers the command (with paths in the run directory relative, so that a moved run still counts), the threads,
    the parents' fingerprints, and of outside inputs the names, sizes and modification times, not the content.
    """
    known: dict[str, str] = {}
    for stage in stages:
        content = {
            "command": stage.command,
            "threads": stage.threads,
            "parents": {parent: known[parent] for parent in stage.parents},
            "inputs": {str(path): _outside(path) for path in stage.inputs},
        }
        known[stage.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return known


def _outside(path: Path) -> list[tuple[str, int, int]]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = [file for name in (str(path), f"{path}.bin", f"{path}.idx") if (file := Path(name)).is_file()]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """The stages with parents before their children, otherwise as given. A parent that is no stage is a defect."""
    waiting = list(stages)
    ordered: dict[str, Stage] = {}
    while waiting:
        ready = next(stage for stage in waiting if all(parent in ordered for parent in stage.parents))
        ordered[ready.name] = ready
        waiting.remove(ready)
    return list(ordered.values())
