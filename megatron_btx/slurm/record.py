"""What a job must know of its stage, in a file beside its script: the stage, its identity, the --rerun it is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import read_json_object, write_atomically
from megatron_btx.plan.fingerprint import Identity
from megatron_btx.plan.stage import Stage
from megatron_btx.runner.schemas import StageManifest

SLURM_FOLDER = "slurm"
"""Of a run: scripts, records and logs of its jobs."""
NOTE_SUFFIX = ".job"
"""Of the file beside a script that holds the number of the job last submitted; for btx status alone."""
_REMEDY = "btx submit writes it again"


@dataclass(frozen=True)
class StageRecord:
    """A stage as its job sees it."""

    stage: Stage
    identity: Identity
    parents: Mapping[str, str | None]
    """Stages that must be finished -> the fingerprint that they must have; None for what only shows others."""
    rerun: Mapping[str, Any] | None
    """The --rerun that the job is for; see :class:`megatron_btx.runner.decisions.Action`."""
    is_rerun: bool
    """Whether the stage is one of those that it names."""


def script_path(run: Path, stage: str) -> Path:
    """The script of a stage's job; its record, its log and its note lie beside it."""
    return run / SLURM_FOLDER / f"{stage}.sh"


def write_record(run: Path, record: StageRecord) -> None:
    """Write a stage's record, without the settings that its identity has already."""
    content = asdict(replace(record, stage=replace(record.stage, settings=None)))
    text = json.dumps(content, indent=1, default=str)  # paths
    write_atomically(run / SLURM_FOLDER / f"{record.stage.name}.json", text + "\n")


def read_record(run: Path, name: str) -> StageRecord:
    """The record of a stage. Raises InputError where there is none, or one of another form."""
    path = run / SLURM_FOLDER / f"{name}.json"
    try:
        return TypeAdapter(StageRecord).validate_python(read_json_object(path, _REMEDY))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: not the record of a stage ({place}: {first['msg']}); {_REMEDY}") from None


def read_waited_for(run: Path, name: str) -> tuple[str, ...]:
    """The stages that must be finished before this one; empty where its record cannot be read."""
    try:
        return tuple(read_record(run, name).parents)
    except (InputError, OSError):
        return ()


def read_started(manifest: StageManifest) -> dict[str, Any]:
    """What a job wrote of its start; empty for a stage that none began."""
    found = (manifest.model_extra or {}).get("slurm")
    return dict(found) if isinstance(found, dict) else {}
