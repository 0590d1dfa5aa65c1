"""What a run does with each stage now: skip it, run it, let it go on, run it again, or keep it and stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.plan.fingerprint import Identity, identities
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import CHECKPOINT_FOLDER
from megatron_btx.runner.run_dir import own_manifest
from megatron_btx.runner.schemas import StageManifest, StageRecord

_SHOWN_AT_MOST, _SETTINGS_SHOWN = 60, 4
_ABSENT = "not given"
"""Stands for the value of a setting, or the fingerprint of a parent, that there is none of."""
SKIP, RUN, RESUME, RERUN, KEEP = "skip", "run", "resume", "rerun", "keep"


class ChangedStagesError(InputError):
    """Stages were made with other settings than the recipe has now. They are kept, and nothing was run."""

    def __init__(self, directory: Path, changed: Mapping[str, str]) -> None:
        self.changed = dict(changed)
        """Stage -> what changed."""
        listed = "; ".join(f"{name}: {why}" for name, why in changed.items())
        super().__init__(f"{directory}: made otherwise: {listed}; name them in rerun, or give another output")


@dataclass(frozen=True)
class Action:
    """What a run does with a stage."""

    verb: str
    """skip, run (in an empty folder), resume (from what is there), rerun (set the old folder aside, then run), or
    keep (what is there is of other settings and is worth something: the run stops)."""
    why: str
    rerun: Mapping[str, Any] | None = None
    """The --rerun that began the stage or begins it now, for its manifest; None for none."""


def decide(stages: Sequence[Stage], run: Path, rerun: Sequence[str] = ()) -> dict[str, Action]:
    """What would happen to each stage now; ``rerun`` are those that are to run again whatever is there.

    When the same stages are named after a stop, that --rerun goes on: what it had begun resumes, what it had finished
    is skipped, and what it had not reached runs again.

    Raises:
        InputError: a folder is in the way that no stage of this name made, or ``rerun`` names no stage.
    """
    _check_names("--rerun", rerun, stages)
    known = identities(stages)
    found = {stage.name: own_manifest(run / stage.name, stage.name) for stage in stages}
    asked = _name_rerun(rerun, found, known)
    actions: dict[str, Action] = {}
    for stage in stages:
        manifest = found[stage.name]
        action = _decide_stage(stage, known[stage.name], run / stage.name, manifest)
        began = manifest.rerun
        parents_stay = all(actions[parent].verb == SKIP for parent in stage.parents)
        if stage.name in rerun:
            if manifest.stage:
                action = _decide_rerun(action, goes_on=began == asked and parents_stay)
            began = asked
        if stage.only_shows and not parents_stay:
            action = Action(RUN, "shows what runs before it")
        actions[stage.name] = replace(action, rerun=began)
    return actions


def decide_start(record: StageRecord, directory: Path) -> Action:
    """What happens to one stage that starts now, whose parents are finished. Raises InputError as :func:`decide`."""
    stage = record.stage
    manifest = own_manifest(directory, stage.name)
    action = _decide_stage(stage, record.identity, directory, manifest)
    if stage.only_shows:
        action = Action(RUN, "shows what ran before it")
    if record.is_rerun and manifest.stage:
        action = _decide_rerun(action, goes_on=manifest.rerun == record.rerun)
    return replace(action, rerun=record.rerun)


def make_records(
    stages: Sequence[Stage], actions: Mapping[str, Action], rerun: Sequence[str]
) -> dict[str, StageRecord]:
    """Every stage as who starts it has to know it."""
    known = identities(stages)
    records = {}
    for stage in stages:
        parents = {parent: known[parent].fingerprint for parent in stage.waits_for()}
        asked = actions[stage.name].rerun
        records[stage.name] = StageRecord(stage, known[stage.name], parents, asked, stage.name in rerun)
    return records


def _decide_stage(stage: Stage, identity: Identity, directory: Path, manifest: StageManifest) -> Action:
    """What a run does without --rerun with a stage in whose folder ``manifest`` lies."""
    if not manifest.stage:
        return Action(RUN, "not done yet")
    difference = differences(manifest, identity)
    if difference and stage.only_shows:
        return Action(RUN, "shown anew")
    if difference:
        if manifest.is_finished or has_trained(stage, directory):
            return Action(KEEP, difference)
        return Action(RERUN, difference)
    if manifest.is_finished and (directory / stage.product).exists():
        return Action(SKIP, "finished")
    if manifest.is_finished and not stage.only_shows:
        return Action(KEEP, f"finished, but its {stage.product} is gone")
    if stage.resumable:
        return Action(RESUME, "unfinished, goes on from its last checkpoint")
    return Action(RUN, "unfinished")


def has_trained(stage: Stage, directory: Path) -> bool:
    """Whether an unfinished stage left a checkpoint."""
    checkpoint = directory / CHECKPOINT_FOLDER
    if not stage.resumable or not checkpoint.exists():
        return False
    return not checkpoint.is_dir() or any(checkpoint.iterdir())


def _decide_rerun(action: Action, goes_on: bool) -> Action:
    """What happens to a stage of --rerun that would see ``action`` without it; ``goes_on``: this rerun began it.

    What is made from a stage that runs now was not begun after that one, and does not go on.
    """
    if goes_on and action.verb == SKIP:
        return Action(SKIP, "finished since this --rerun began")
    if goes_on and action.verb in (RESUME, RUN):
        return action
    return Action(RERUN, "as --rerun asks")


def _name_rerun(
    rerun: Sequence[str], found: Mapping[str, StageManifest], known: Mapping[str, Identity]
) -> dict[str, Any]:
    """This --rerun as manifests remember it: the last one of the same stages where that is not done, else a new one."""
    names = sorted(set(rerun))
    latest = {"stages": names, "number": max((found[name].rerun_number for name in names), default=0)}
    begun = [name for name in names if found[name].rerun == latest]
    finished = [name for name in begun if found[name].is_finished]
    is_unchanged = all(found[name].fingerprint == known[name].fingerprint for name in begun)
    if begun and is_unchanged and finished != names:
        return latest
    last = max((manifest.rerun_number for manifest in found.values()), default=0)
    return {"stages": names, "number": last + 1}


def check_chosen(stages: Sequence[Stage], actions: Mapping[str, Action], chosen: Sequence[str]) -> None:
    """Refuse a choice (--only) of stages that are none, or whose parents are not finished."""
    _check_names("--only", chosen, stages)
    for stage in stages:
        if stage.name not in chosen:
            continue
        for parent in stage.waits_for():
            if parent in chosen or actions[parent].verb == SKIP:
                continue
            lack = "not finished; add it to --only"
            if actions[parent].verb == KEEP:
                lack = f"made otherwise ({actions[parent].why}); add it to --only and to --rerun"
            raise InputError(f"--only {stage.name}: it needs {parent}, which is {lack}")


def check_kept(directory: Path, actions: Mapping[str, Action], chosen: Sequence[str]) -> None:
    """Raise ChangedStagesError where one of the ``chosen`` stages has to be kept."""
    kept = list_kept(actions, chosen)
    if kept:
        raise ChangedStagesError(directory, kept)


def list_kept(actions: Mapping[str, Action], chosen: Sequence[str]) -> dict[str, str]:
    """The ``chosen`` stages for whose sake a run stops, and why."""
    return {name: action.why for name, action in actions.items() if action.verb == KEEP and name in chosen}


def _check_names(flag: str, names: Sequence[str], stages: Sequence[Stage]) -> None:
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            raise InputError(f"{flag} {name}: no such stage; expected some of: {', '.join(known)}")


def differences(manifest: StageManifest, now: Identity) -> str:
    """What differs between the stage that ``manifest`` describes and the one planned now; empty for nothing."""
    if manifest.fingerprint == now.fingerprint:
        return ""
    if manifest.settings is None:
        return "its manifest states no settings (an earlier version made it), so that they cannot be compared"
    changes = []
    for name in {**manifest.settings, **now.settings}:
        old, new = manifest.settings.get(name, _ABSENT), now.settings.get(name, _ABSENT)
        if old == new:
            continue
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            position = next(number for number, value in enumerate(old) if value != new[number])
            name, old, new = f"{name}: value {position + 1} of {len(new)}", old[position], new[position]
        changes.append(f"{name}: {_shown(old)} -> {_shown(new)}")
    if len(changes) > _SETTINGS_SHOWN:
        changes[_SETTINGS_SHOWN:] = [f"and {len(changes) - _SETTINGS_SHOWN} more settings"]
    parents = []
    for name in {**now.parents, **manifest.parents}:
        if manifest.parents.get(name, _ABSENT) != now.parents.get(name, _ABSENT):
            parents.append(name)
    if parents:
        changes.append(f"made from another {', '.join(parents)}")
    return "; ".join(changes) or "the order of its parents"


def _shown(value: object) -> str:
    text = str(value)
    if isinstance(value, list):
        text = " ".join(map(str, value))
    if len(text) > _SHOWN_AT_MOST:
        return f"{text[:_SHOWN_AT_MOST]} ..."
    return text
