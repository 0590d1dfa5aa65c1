"""What a job must know of its stage, in a file beside its script: the stage, its identity, the --rerun it is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.ground.errors import InputError
from megatron_btx.ground.files import read_json_object, write_atomically
from megatron_btx.pipeline.identity import Identity
from megatron_btx.pipeline.stage import Program, Stage

SLURM_FOLDER = "slurm"
"""Of a run: scripts, records and logs of its jobs."""
NOTE_SUFFIX = ".job"
"""Of the file beside a script that holds the number of the job last submitted; for btx status alone."""
_REMEDY = "btx submit writes it again"
_COUNTS = ("processes", "threads", "iterations", "tokens", "flops")
_FLAGS = ("on_gpu", "resumable", "only_shows")


@dataclass(frozen=True)
class StageRecord:
    """A stage as its job sees it."""

    stage: Stage
    identity: Identity
    parents: Mapping[str, str | None]
    """Stages that must be finished -> the fingerprint that they must have; None for what only shows others."""
    rerun: Mapping[str, Any] | None
    """The --rerun that the job is for; see :class:`megatron_btx.pipeline.decisions.Action`."""
    is_rerun: bool
    """Whether the stage is one of those that it names."""


def script_path(run: Path, stage: str) -> Path:
    """The script of a stage's job."""
    return run / SLURM_FOLDER / f"{stage}.sh"


def log_path(run: Path, stage: str) -> Path:
    """What a job's script itself said; what its program says is in the stage's log."""
    return run / SLURM_FOLDER / f"{stage}.log"


def record_path(run: Path, stage: str) -> Path:
    """The record of a stage's job."""
    return run / SLURM_FOLDER / f"{stage}.json"


def write_record(run: Path, record: StageRecord) -> None:
    """Write a stage's record."""
    stage = record.stage
    program = stage.program
    content: dict[str, Any] = {"stage": stage.name}
    if isinstance(program, Program):
        content["program"] = [program.module, list(program.words), program.is_distributed]
    else:
        content["command"] = list(program)
    for name in (*_COUNTS, *_FLAGS, "product"):
        content[name] = getattr(stage, name)
    content |= {
        "made from": list(stage.parents),
        "after": list(stage.after),
        "inputs": [str(path) for path in stage.inputs],
        "config": dict(stage.config),
        "settings": dict(record.identity.settings),
        "identities": dict(record.identity.parents),
        "fingerprint": record.identity.fingerprint,
        "parents": dict(record.parents),
        "rerun": record.rerun,
        "is rerun": record.is_rerun,
    }
    write_atomically(record_path(run, stage.name), json.dumps(content, indent=1) + "\n")


def read_record(run: Path, name: str) -> StageRecord:
    """The record of a stage. Raises InputError where there is none, or one of another form."""
    path = record_path(run, name)
    content = read_json_object(path, _REMEDY)
    try:
        program: Program | tuple[str, ...]
        if "program" in content:
            module, words, is_distributed = content["program"]
            program = Program(module, tuple(words), is_distributed)
        else:
            program = tuple(content["command"])
        stage = Stage(
            content["stage"],
            program,
            parents=tuple(content["made from"]),
            after=tuple(content["after"]),
            inputs=tuple(Path(text) for text in content["inputs"]),
            product=content["product"],
            config=content["config"],
            **{key: content[key] for key in (*_COUNTS, *_FLAGS)},
        )
        identity = Identity(content["settings"], content["identities"], content["fingerprint"])
        return StageRecord(stage, identity, content["parents"], content["rerun"], content["is rerun"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the record of a stage ({error}); {_REMEDY}") from None


def read_waited_for(run: Path, name: str) -> tuple[str, ...]:
    """The stages that must be finished before this one; empty where its record cannot be read."""
    try:
        return tuple(read_record(run, name).parents)
    except (InputError, OSError):
        return ()
