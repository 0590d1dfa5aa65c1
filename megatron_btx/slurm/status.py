"""Where the jobs of a run stand, in words: what btx status shows of Slurm's queue."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.common.errors import InputError, printable
from megatron_btx.recipe.names import MANIFEST_FILE
from megatron_btx.runner.schemas import StageManifest
from megatron_btx.runner.slurm_queue import Job, SlurmError, list_jobs
from megatron_btx.runner.stage_run import read_record
from megatron_btx.slurm.script import NOTE_SUFFIX, script_path

HEADERS = ("job", "why")
FOREIGN = "{0}: job {1} is in the queue, and the recipe has no such stage; btx cancel {2} --only {0}"
_FAILED = ("failed", "stopped", "interrupted")


@dataclass(frozen=True)
class JobView:
    """What is shown of a stage's job."""

    state: str | None = None
    """In place of the state that the manifest says; None for that one."""
    number: str = ""
    why: str = ""
    """What it waits for, or how long it may still run."""
    seconds: float = 0.0
    """Of the start that runs now, which the manifest does not count yet."""
    log: Path | None = None
    """What the script of a job said that ended without a word in the manifest."""


def view_jobs(run: Path, manifests: Mapping[str, StageManifest]) -> tuple[dict[str, JobView], str]:
    """Stage -> its job as it is shown, and why the queue could not be asked; empty when it could.

    Args:
        manifests: of all stages of the run. Another stage is in the answer if it has a job.
    """
    try:
        jobs = list_jobs(run)
    except SlurmError as error:
        return {name: JobView(number=manifest.slurm.job or "") for name, manifest in manifests.items()}, str(error)
    live: dict[str, Job] = {}
    for job in jobs:
        live.setdefault(job.stage, job)
    views = {name: JobView(number=str(job.number)) for name, job in live.items()}
    for name, manifest in manifests.items():
        if name not in live:
            views[name] = _view_ended(run, name, manifest)
            continue
        job, number = live[name], str(live[name].number)
        if not job.is_active:
            views[name] = JobView(None if manifest.is_finished else "ending", number)
        elif job.is_running:
            seconds = 0.0
            if manifest.status == "running" and manifest.started is not None:
                seconds = max(0.0, time.time() - manifest.started)
            views[name] = JobView(job.state.lower(), number, f"may run {job.time_left} more", seconds)
        else:
            views[name] = JobView("queued", number, _explain(run, job, manifests, live))
    return views, ""


def _view_ended(run: Path, stage: str, manifest: StageManifest) -> JobView:
    """A stage without a job."""
    number = manifest.slurm.job or ""
    if manifest.is_finished:
        return JobView(number=number)
    log = script_path(run, stage).with_suffix(".log")
    submitted = _read_unbegun(run, stage)
    if submitted not in ("", number) or (manifest.status is None and log.is_file()):
        return JobView("ended", submitted, "failed, or cancelled, before its stage began; btx submit goes on", log=log)
    if manifest.status is None:
        return JobView("waiting", number, "not submitted")
    problem = ""
    if manifest.slurm.job and manifest.status in _FAILED:
        problem = f"{manifest.slurm.problem or ''}; "
    elif manifest.slurm.job:
        return JobView(number=number, why="gone without a word; btx submit goes on", log=log)
    return JobView(number=number, why=f"{printable(problem)}btx submit goes on")


def _read_unbegun(run: Path, stage: str) -> str:
    """The job that was submitted for a stage after all that is written of it; empty for none."""
    note, manifest = script_path(run, stage).with_suffix(NOTE_SUFFIX), run / stage / MANIFEST_FILE
    if not note.is_file() or (manifest.is_file() and manifest.stat().st_mtime > note.stat().st_mtime):
        return ""
    return printable(note.read_text(encoding="utf-8", errors="replace"))


def _explain(run: Path, job: Job, manifests: Mapping[str, StageManifest], live: Mapping[str, Job]) -> str:
    """Why a job waits: for stages, near or far, that have no job (most likely they failed), or as Slurm says it."""
    missing: list[str] = []
    seen = [job.stage]
    for stage in seen:  # which grows meanwhile
        for parent in _list_unfinished(run, stage, manifests):
            if parent not in live and parent not in missing:
                missing.append(parent)
            elif parent in live and parent not in seen:
                seen.append(parent)
    if missing:
        return f"cannot start without {', '.join(missing)}; btx submit goes on"
    if job.reason == "Dependency" or job.never_starts:
        waited_for = ", ".join(_list_unfinished(run, job.stage, manifests))
        return f"waits for {waited_for or 'an earlier job of its own'}"
    if job.reason == "BeginTime" and job.begins != "N/A":
        return f"starts again at {job.begins.replace('T', ' ')}"
    return job.reason


def _list_unfinished(run: Path, stage: str, manifests: Mapping[str, StageManifest]) -> list[str]:
    """The stages that one waits for itself."""
    try:
        parents = read_record(run, stage).parents
    except (InputError, OSError):
        return []
    return [parent for parent in parents if not manifests.get(parent, StageManifest()).is_finished]
