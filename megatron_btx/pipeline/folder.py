"""A stage's folder: whose it is, what would happen to it now, and how it is prepared. Nothing in it is ever removed."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.ground import manifest as manifests
from megatron_btx.ground.errors import InputError
from megatron_btx.ground.files import write_atomically
from megatron_btx.pipeline.identity import Identity, differences, identities
from megatron_btx.pipeline.stage import Stage, command_script

RECORDS = ("config.yaml", "command.sh", "log.txt", manifests.FILE_NAME)
PLAN_FILE, RECIPE_FILE = "plan.json", "recipe.yaml"
"""Of a run: the stages with their steps and tokens, in order; the recipe with all that was changed in it."""
KEEP = "keep"
_SET_ASIDE = re.compile(r".+\.\d{8}-\d{6}(-\d+)?")


@dataclass(frozen=True)
class Action:
    """What a run does with a stage."""

    verb: str
    """skip, run (in an empty folder), resume (from what is there), rerun (set the old folder aside, then run), or
    keep (what is there is of other settings and is worth something: the run stops)."""
    why: str
    rerun: Mapping[str, Any] | None = None
    """The --rerun that began the stage or begins it now, for its manifest; None for none."""


def is_set_aside(name: str) -> bool:
    """Whether ``name`` is that of an earlier stage's folder, kept beside the one that took its place."""
    return _SET_ASIDE.fullmatch(name) is not None


def decide(stages: Sequence[Stage], run: Path, rerun: Sequence[str] = ()) -> dict[str, Action]:
    """What would happen to each stage now; ``rerun`` are those that are to run again whatever is there.

    When the same stages are named after a stop, that --rerun goes on: what it had begun resumes, what it had finished
    is skipped, and what it had not reached runs again.

    Raises:
        InputError: a folder is in the way that no stage of this name made, or ``rerun`` names no stage.
    """
    _known("--rerun", rerun, stages)
    known = identities(stages)
    found = {stage.name: owned_manifest(run / stage.name, stage.name) for stage in stages}
    asked = _rerun_now(rerun, found, known)
    actions: dict[str, Action] = {}
    for stage in stages:
        manifest = found[stage.name]
        began = (manifest or {}).get("rerun")
        action = _decide(stage, known[stage.name], run / stage.name, manifest)
        if stage.name in rerun:
            ready = all(actions[parent].verb == "skip" for parent in stage.parents)
            if manifest is not None:
                action = _decide_rerun(action, goes_on=began == asked and ready)
            began = asked
        if stage.only_shows and any(actions[parent].verb != "skip" for parent in stage.parents):
            action = Action("run", "shows what runs before it")
        actions[stage.name] = replace(action, rerun=began)
    return actions


def _rerun_now(
    rerun: Sequence[str], found: Mapping[str, Mapping[str, Any] | None], known: Mapping[str, Identity]
) -> dict[str, Any]:
    """This --rerun as manifests remember it: the last one of the same stages where that is not done, else a new one."""
    names = sorted(set(rerun))
    latest = {"stages": names, "number": max((_rerun_number(found[name]) for name in names), default=0)}
    begun: dict[str, Mapping[str, Any]] = {}
    for name in names:
        manifest = found[name]
        if manifest is not None and manifest.get("rerun") == latest:
            begun[name] = manifest
    unchanged = all(manifest.get("fingerprint") == known[name].fingerprint for name, manifest in begun.items())
    done = len(begun) == len(names) and all(manifest["status"] == "finished" for manifest in begun.values())
    if begun and unchanged and not done:
        return latest
    return latest | {"number": 1 + max((_rerun_number(manifest) for manifest in found.values()), default=0)}


def _rerun_number(manifest: Mapping[str, Any] | None) -> int:
    """Which of the run's reruns began the stage, from 1; 0 when none did."""
    began = (manifest or {}).get("rerun")
    number = began.get("number") if isinstance(began, dict) else None
    return number if type(number) is int else 0


def _decide_rerun(action: Action, goes_on: bool) -> Action:
    """What happens to a stage of --rerun that would see ``action`` without it; ``goes_on``: this rerun began it.

    What is made from a stage that runs now was not begun after that one, and does not go on.
    """
    if goes_on and action.verb == "skip":
        return Action("skip", "finished since this --rerun began")
    if goes_on and action.verb in ("resume", "run"):
        return action
    return Action("rerun", "as --rerun asks")


def check_run(run: Path) -> None:
    """Refuse a run directory in which files of a run's names lie that no run wrote, because they would be replaced.

    Raises:
        InputError: the file.
    """
    plan, recipe = run / PLAN_FILE, run / RECIPE_FILE
    if os.path.lexists(run) and not run.is_dir():
        raise InputError(f"{run}: is no folder; give another --output")
    ours = (run / ".lock").exists() or read_plan(plan) is not None
    for path in (plan, recipe) if not ours else ():
        if os.path.lexists(path):
            raise InputError(f"{path}: not written by btx run, which would replace it; give another --output")


def plan_of(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What a run's plan says of each stage. The fingerprint tells its report what is of the recipe, and what is not."""
    known = identities(stages)
    return [
        {
            "stage": stage.name,
            "steps": stage.iterations,
            "tokens": stage.tokens,
            "fingerprint": None if stage.only_shows else known[stage.name].fingerprint,
        }
        for stage in stages
    ]


def read_plan(path: Path) -> list[dict[str, Any]] | None:
    """The plan that a run wrote; None when what lies there is none."""
    if not path.is_file():  # reading a pipe would wait forever
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, list) and all(map(_is_planned, content)) else None


def _is_planned(entry: Any) -> bool:
    """Whether it is an entry of a plan: a stage, with its steps and tokens where it trains."""
    if not isinstance(entry, dict) or not isinstance(entry.get("stage"), str):
        return False
    counts = [entry[key] for key in ("steps", "tokens") if entry.get(key) is not None]
    return all(type(count) is int and count.bit_length() < 64 for count in counts)


def owned_manifest(directory: Path, name: str) -> dict[str, Any] | None:
    """The manifest of stage ``name`` in ``directory``; None for an empty folder or none.

    Raises:
        InputError: something else lies there, which we did not make and will not touch.
    """
    if not directory.is_dir():
        if os.path.lexists(directory):
            raise InputError(f"{directory}: is no folder; a stage of this name needs one there: move it away")
        return None
    manifest = manifests.read_manifest(directory)
    if manifest is not None and manifest.get("stage") == name and "status" in manifest:
        return manifest
    if manifest is None and not any(not manifests.is_unwritten(path) for path in directory.iterdir()):
        return None
    found = "no manifest.json" if manifest is None else f"a manifest.json that is not of a stage {name}"
    raise InputError(f"{directory}: not made by btx run ({found}); move it away, or give another --output")


def _decide(stage: Stage, identity: Identity, directory: Path, manifest: Mapping[str, Any] | None) -> Action:
    if manifest is None:
        return Action("run", "not done yet")
    difference = differences(manifest, identity)
    finished = manifest["status"] == "finished"
    if difference and stage.only_shows:
        return Action("run", "shown anew")
    if difference:
        worth = finished or has_trained(stage, directory)
        return Action(KEEP if worth else "rerun", difference)
    if finished and (directory / stage.product).exists():
        return Action("skip", "finished")
    if finished and not stage.only_shows:
        return Action(KEEP, f"finished, but its {stage.product} is gone")
    if stage.resumable:
        return Action("resume", "unfinished, goes on from its last checkpoint")
    return Action("run", "unfinished")


def has_trained(stage: Stage, directory: Path) -> bool:
    """Whether an unfinished stage left a checkpoint."""
    checkpoint = directory / "checkpoint"
    if not stage.resumable or not checkpoint.exists():
        return False
    return not checkpoint.is_dir() or any(checkpoint.iterdir())


def check_chosen(stages: Sequence[Stage], actions: Mapping[str, Action], chosen: Sequence[str]) -> None:
    """Refuse a choice (--only) of stages that are none, or whose parents are not finished.

    Raises:
        InputError: the stage, and what it lacks.
    """
    _known("--only", chosen, stages)
    for stage in stages:
        for parent in stage.waits_for() if stage.name in chosen else ():
            if parent in chosen or actions[parent].verb == "skip":
                continue
            if actions[parent].verb == KEEP:
                why = f"which was made otherwise ({actions[parent].why}); add it to --only and to --rerun"
            else:
                why = "which is not finished; add it to --only"
            raise InputError(f"--only {stage.name}: it needs {parent}, {why}")


def kept(actions: Mapping[str, Action], chosen: Sequence[str] = ()) -> dict[str, str]:
    """The stages, of the ``chosen`` ones if there are any, for whose sake a run stops, and why."""
    return {
        name: action.why for name, action in actions.items() if action.verb == KEEP and (not chosen or name in chosen)
    }


def _known(flag: str, names: Sequence[str], stages: Sequence[Stage]) -> None:
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            raise InputError(f"{flag} {name}: no such stage; expected some of: {', '.join(known)}")


def prepare(stage: Stage, directory: Path, action: Action, manifest: Mapping[str, Any]) -> None:
    """Bring a stage's folder into the form from which its command can start.

    The manifest is written first, so that a kill leaves a folder that is empty or known to be ours. What an earlier
    start left is renamed and stays.
    """
    if action.verb == "rerun":
        directory.rename(dated(directory))
    directory.mkdir(parents=True, exist_ok=True)
    manifests.write_manifest(directory, manifest)
    if not stage.resumable and not stage.only_shows:
        _set_leftovers_aside(directory)
    settings = {"stage": stage.name, "parents": list(stage.parents), "processes": stage.processes}
    settings |= {"threads": stage.threads, "iterations": stage.iterations, "tokens": stage.tokens, **stage.config}
    settings["command"] = list(stage.command)
    write_atomically(directory / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_atomically(directory / "command.sh", command_script(stage))


def dated(directory: Path) -> Path:
    """A free name beside ``directory``: its own with the time."""
    stem = f"{directory.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(path for name in names if not os.path.lexists(path := directory.with_name(name)))


def _set_leftovers_aside(directory: Path) -> None:
    """Move what a stopped start left out of the way. Hidden files stay: a conversion goes on from its own."""
    leftovers = [path for path in directory.iterdir() if path.name not in RECORDS and not path.name.startswith(".")]
    if not leftovers:
        return
    beside = dated(directory)
    beside.mkdir()
    for path in leftovers:
        path.rename(beside / path.name)
