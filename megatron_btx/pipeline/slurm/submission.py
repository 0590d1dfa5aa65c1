"""A planned run becomes jobs of Slurm: what is missing is submitted, and what stands in the queue is left there.

There is no lock and no list of jobs, because a shared disk may lose either. The queue decides: a job's name says of
which stage it is, two of one name never run at once (``singleton``), and of two that were submitted at the same time
whoever sees that his is the later one takes it back and goes on with the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_btx.ground.errors import InputError
from megatron_btx.ground.files import write_atomically
from megatron_btx.pipeline.decisions import RERUN, SKIP, Action, decide
from megatron_btx.pipeline.door import PlannedRun
from megatron_btx.pipeline.identity import Identity, identities
from megatron_btx.pipeline.lock import is_locked
from megatron_btx.pipeline.recipe.cluster import ClusterSection
from megatron_btx.pipeline.slurm.queue import COMMENT_LETTERS, Job, SlurmError, cancel_jobs, list_jobs, submit_script
from megatron_btx.pipeline.slurm.record import SLURM_FOLDER, StageRecord, script_path, write_record
from megatron_btx.pipeline.slurm.resources import find_resources
from megatron_btx.pipeline.slurm.script import check_run_path, render_script
from megatron_btx.pipeline.stage import Stage


@dataclass
class Submission:
    """What became of each stage."""

    submitted: dict[str, int] = field(default_factory=dict)
    """Stage -> number of the job that was submitted for it."""
    kept: dict[str, int] = field(default_factory=dict)
    """Stage -> number of the job that stood in the queue already."""
    finished: list[str] = field(default_factory=list)

    def number_of(self, stage: str) -> int | None:
        """The job that a stage waits for; None for one that is finished."""
        return self.submitted.get(stage, self.kept.get(stage))


def render_scripts(planned: PlannedRun) -> dict[str, str]:
    """Stage -> its script, of those that have something to do.

    Raises:
        InputError: the run's path, or a stage that does not fit on its nodes.
    """
    check_run_path(planned.directory)
    known = identities(planned.stages)
    cluster: ClusterSection = planned.recipe.cluster
    scripts = {}
    for stage in _list_due(planned):
        resources = find_resources(cluster, stage, planned.recipe.data.workers)
        scripts[stage.name] = render_script(stage, resources, planned.directory, known[stage.name].fingerprint)
    return scripts


def write_scripts(planned: PlannedRun, scripts: Mapping[str, str]) -> None:
    """Write the scripts and records of the jobs into the run's folder, and what the run is planned to be."""
    run = planned.directory
    (run / SLURM_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, text in planned.records().items():
        write_atomically(run / name, text)
    known = identities(planned.stages)
    for stage in _list_due(planned):
        write_record(run, _make_record(planned, stage, known))
        write_atomically(script_path(run, stage.name), scripts[stage.name])


def submit(planned: PlannedRun) -> Submission:
    """Submit what is missing; the scripts are written before.

    Raises:
        InputError: a runner or another version of a stage is at work in the run directory, or Slurm refuses.
    """
    run = planned.directory
    if is_locked(run):
        raise InputError(f"{run}: a btx run is at work here; wait for it, or give another --output")
    known = identities(planned.stages)
    jobs = [job for job in list_jobs(run) if job.is_active]
    # Checks by Megatron take seconds since the plan. What ended meanwhile has no job any more, and is finished.
    planned = replace(planned, actions=decide(planned.stages, run, planned.rerun))
    _check_running(jobs, planned.actions, known)
    result = Submission(finished=[stage.name for stage in planned.chosen_stages() if _is_done(planned, stage)])
    scripts = render_scripts(planned)
    write_scripts(planned, scripts)
    for stage in _list_due(planned):
        mine = [job for job in jobs if job.stage == stage.name]
        _submit_stage(run, stage, known[stage.name], mine, result)
    return result


def _submit_stage(run: Path, stage: Stage, identity: Identity, jobs: Sequence[Job], result: Submission) -> None:
    """Submit a stage unless one of ``jobs``, those that stand in the queue for it, will do it."""
    is_anew = any(parent in result.submitted for parent in stage.waits_for())
    kept = None
    for job in jobs:
        if kept is None and _will_do(job, identity) and not (is_anew and not job.is_running):
            kept = job
    cancel_jobs([job for job in jobs if job is not kept])
    if kept is not None:
        result.kept[stage.name] = kept.number
        return
    after = []
    for parent in stage.waits_for():
        number = result.number_of(parent)
        if number is not None:
            after.append(number)
    try:
        number = submit_script(script_path(run, stage.name), after)
    except SlurmError as error:
        raise SlurmError(f"stage {stage.name}: {error}{_say_submitted(run, result)}") from None
    first = _take_back_later(run, stage, identity, number)
    if first == number:
        result.submitted[stage.name] = number
    else:
        result.kept[stage.name] = first


def _say_submitted(run: Path, result: Submission) -> str:
    """What stands in the queue when Slurm refuses the next stage."""
    if not result.submitted:
        return ""
    return f"; in the queue: {', '.join(result.submitted)}; btx submit goes on, btx cancel {run} takes them back"


def _take_back_later(run: Path, stage: Stage, identity: Identity, number: int) -> int:
    """Of jobs for one stage that were submitted at the same time, the first; a later one of ours is cancelled."""
    same = []
    for job in list_jobs(run):
        if job.is_active and job.stage == stage.name and _will_do(job, identity):
            same.append(job)
    if not same or same[0].number >= number:
        return number
    cancel_jobs([job for job in same if job.number == number])
    return same[0].number


def _will_do(job: Job, identity: Identity) -> bool:
    return job.fingerprint == identity.fingerprint[:COMMENT_LETTERS] and not job.never_starts


def _check_running(jobs: Sequence[Job], actions: Mapping[str, Action], known: Mapping[str, Identity]) -> None:
    """Refuse to submit while a stage runs that would have to run otherwise."""
    for job in jobs:
        if not job.is_running or job.stage not in known:
            continue
        if not _will_do(job, known[job.stage]) or actions[job.stage].verb == RERUN:
            raise InputError(
                f"stage {job.stage}: job {job.number} is running with other settings; wait, or cancel it first"
            )


def _list_due(planned: PlannedRun) -> list[Stage]:
    return [stage for stage in planned.chosen_stages() if not _is_done(planned, stage)]


def _is_done(planned: PlannedRun, stage: Stage) -> bool:
    return planned.actions[stage.name].verb == SKIP


def _make_record(planned: PlannedRun, stage: Stage, known: Mapping[str, Identity]) -> StageRecord:
    shown = {other.name for other in planned.stages if other.only_shows}
    parents: dict[str, str | None] = {}
    for parent in stage.waits_for():
        parents[parent] = None if parent in shown else known[parent].fingerprint
    rerun = planned.actions[stage.name].rerun
    return StageRecord(stage, known[stage.name], parents, rerun, stage.name in planned.rerun)
