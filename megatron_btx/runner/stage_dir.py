"""A stage's folder, prepared for its start. Nothing in it is ever removed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.common import manifest as manifests
from megatron_btx.common.files import refuse_unusual, write_atomically
from megatron_btx.plan.fingerprint import Identity, manifest_of
from megatron_btx.plan.stage import Stage, command_script
from megatron_btx.recipe.names import CONFIG_FILE, LOG_FILE, SCRIPT_FILE, STAGE_RECORDS
from megatron_btx.runner.decisions import RERUN, Action
from megatron_btx.runner.run_dir import find_free_name
from megatron_btx.runner.schemas import StageManifest


def describe_start(
    stage: Stage, identity: Identity, action: Action, earlier: StageManifest, device: str
) -> dict[str, Any]:
    """The manifest of a stage that starts now. Starts and seconds go on from those of earlier starts."""
    return manifest_of(stage, identity, "running", action.rerun) | {
        "versions": manifests.versions(),
        "device": device,
        "starts": (earlier.starts or 0) + 1,
        "started": time.time(),
        "seconds": earlier.seconds or 0.0,
    }


def prepare_folder(stage: Stage, directory: Path, action: Action, manifest: Mapping[str, Any]) -> None:
    """Bring a stage's folder into the form from which its command can start.

    The manifest is written first, so that a kill leaves a folder that is empty or known to be ours. What an earlier
    start left is renamed and stays.
    """
    if action.verb == RERUN:
        directory.rename(find_free_name(directory))
    directory.mkdir(parents=True, exist_ok=True)
    refuse_unusual(directory / LOG_FILE)
    manifests.write_manifest(directory, manifest)
    if not stage.resumable and not stage.only_shows:
        _set_leftovers_aside(directory)
    write_atomically(directory / CONFIG_FILE, config_text(stage))
    write_atomically(directory / SCRIPT_FILE, command_script(stage))


def config_text(stage: Stage) -> str:
    """The config.yaml of a stage."""
    said = {
        "stage": stage.name,
        "parents": list(stage.parents),
        "processes": stage.processes,
        "threads": stage.threads,
        "iterations": stage.iterations,
        "tokens": stage.tokens,
        **stage.config,
        "command": list(stage.command),
    }
    return yaml.safe_dump(said, sort_keys=False)


def _set_leftovers_aside(directory: Path) -> None:
    """Move what a stopped start left out of the way. Hidden files stay: a conversion goes on from its own."""
    leftovers = []
    for path in directory.iterdir():
        if path.name not in STAGE_RECORDS and not path.name.startswith("."):
            leftovers.append(path)
    if not leftovers:
        return
    beside = find_free_name(directory)
    beside.mkdir()
    for path in leftovers:
        path.rename(beside / path.name)
