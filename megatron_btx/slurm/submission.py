"""A planned run becomes jobs of Slurm: what is missing is submitted, and what stands in the queue is left there.

Submissions take turns, and no runner begins meanwhile. There is no list of jobs, because a shared disk may lose it. The
queue decides: a job's name says of which stage it is, and two of one name never run at once (``singleton``), so that on
a disk that loses locks, too, a second job only finds its stage finished.
"""

from __future__ import annotations

import argparse
import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.common.files import refuse_unusual, write_atomically
from megatron_btx.plan.fingerprint import Identity, identities
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import PLAN_FILE
from megatron_btx.runner.api import PlannedRun
from megatron_btx.runner.decisions import RERUN, SKIP, Action, decide, make_records
from megatron_btx.runner.run_dir import is_locked, lock_run, read_plan, take_turn
from megatron_btx.runner.scripts import as_comment
from megatron_btx.runner.slurm_queue import (
    COMMENT_LETTERS,
    SLURM_FOLDER,
    Job,
    SlurmError,
    cancel_jobs,
    list_jobs,
    list_settled,
    submit_script,
)
from megatron_btx.runner.stage_run import write_record
from megatron_btx.slurm.resources import find_resources
from megatron_btx.slurm.script import NOTE_SUFFIX, render_script, script_path
from megatron_btx.slurm.status import FOREIGN


@dataclass
class Submission:
    """The jobs of the stages that are not finished, by their numbers."""

    submitted: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    """Those that stood in the queue already."""


def render_scripts(planned: PlannedRun) -> dict[str, str]:
    """Stage -> its script, of those that have something to do. Raises InputError as :func:`find_resources` does."""
    known = identities(planned.stages)
    scripts = {}
    for stage in _list_due(planned):
        resources = find_resources(planned.recipe.cluster, stage, planned.recipe.data.workers)
        scripts[stage.name] = render_script(stage, resources, planned.directory, known[stage.name].fingerprint)
    return scripts


def write_scripts(planned: PlannedRun, scripts: Mapping[str, str]) -> None:
    """Write the scripts and records of the jobs into the run's folder, and what the run is planned to be."""
    run = planned.directory
    (run / SLURM_FOLDER).mkdir(parents=True, exist_ok=True)
    for name, text in planned.records().items():
        write_atomically(run / name, text)
    records = make_records(planned.stages, planned.actions, planned.rerun)
    for stage in _list_due(planned):
        write_record(run, records[stage.name])
        write_atomically(script_path(run, stage.name), scripts[stage.name])


def submit(planned: PlannedRun) -> Submission:
    """Write the scripts, submit what is missing, and print what becomes of every stage.

    Raises:
        InputError: a runner or another version of a stage is at work in the run directory, or Slurm refuses.
    """
    run = planned.directory
    list_settled(run)  # where Slurm does not answer, a run stays one that btx run may take
    (run / SLURM_FOLDER).mkdir(parents=True, exist_ok=True)
    known = identities(planned.stages)
    with lock_run(run, fcntl.LOCK_SH), take_turn(run / SLURM_FOLDER):
        jobs = list_settled(run)
        # Checks by Megatron take seconds since the plan. What ended meanwhile has no job any more, and is finished.
        planned = replace(planned, actions=decide(planned.stages, run, planned.rerun))
        _check_running(jobs, planned.actions, known)
        due = _list_due(planned)
        _check_alone(run, due, jobs)
        write_scripts(planned, render_scripts(planned))
        result = Submission()
        for stage in planned.chosen_stages():
            said = "finished"
            if stage in due:
                mine = [job for job in jobs if job.stage == stage.name]
                said = _submit_stage(run, stage, known[stage.name], mine, result)
            print(f"{stage.name}: {said}", flush=True)
        for job in jobs:
            if job.stage not in known:
                print(FOREIGN.format(job.stage, job.number, run))
    return result


def _submit_stage(run: Path, stage: Stage, identity: Identity, jobs: Sequence[Job], result: Submission) -> str:
    """Submit a stage unless one of ``jobs``, those that stand in the queue for it, will do it; says which it was."""
    is_anew = any(parent in result.submitted for parent in stage.waits_for())
    kept = None
    for job in jobs:
        if kept is None and _will_do(job, identity) and not (is_anew and not job.is_running):
            kept = job
    cancel_jobs([job for job in jobs if job is not kept])
    if kept is not None:
        result.kept[stage.name] = kept.number
        return f"in the queue already, job {kept.number}"
    after = []
    for parent in stage.waits_for():
        number = result.submitted.get(parent, result.kept.get(parent))  # none of one that is finished
        if number is not None:
            after.append(number)
    try:
        number = submit_script(script_path(run, stage.name), after)
    except SlurmError as error:
        rest = f"btx submit goes on, btx cancel {run} takes back what was submitted"
        raise SlurmError(f"stage {stage.name}: {error}; {rest}") from None
    write_atomically(script_path(run, stage.name).with_suffix(NOTE_SUFFIX), str(number))
    result.submitted[stage.name] = number
    return f"submitted, job {number}" + "".join(f", in place of job {job.number}" for job in jobs)


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


def _check_alone(run: Path, due: Sequence[Stage], jobs: Sequence[Job]) -> None:
    """Refuse a stage that somebody makes by hand: its job would end at once, and what depends on it never start."""
    running = {job.stage for job in jobs if job.is_running}
    for stage in due:
        refuse_unusual(script_path(run, stage.name).with_suffix(".log"))  # Slurm itself would write on
        if stage.name not in running and is_locked(run, f".{stage.name}.lock"):
            raise InputError(
                f"{run}: stage {stage.name} is at work, by hand or as another's job; wait, or end it first"
            )


def _list_due(planned: PlannedRun) -> list[Stage]:
    return [stage for stage in planned.chosen_stages() if planned.actions[stage.name].verb != SKIP]


def print_scripts(planned: PlannedRun) -> int:
    """``btx submit --dry-run``. It writes none of the scripts, because jobs in the queue read what lies there."""
    table, scripts = as_comment(planned.describe()), render_scripts(planned)
    print(table)
    for stage, script in scripts.items():
        print(as_comment(f"==== {script_path(planned.directory, stage)}"), script, sep="\n")
    print(table)
    return 0


def submit_run(planned: PlannedRun) -> int:
    """``btx submit``: submit what is missing."""
    ignored = [name for name in os.environ if name.startswith("SBATCH_")]
    if ignored:
        print(f"# note: {', '.join(ignored)}: not used; what jobs ask for stands in the cluster section")
    submit(planned)
    print(f"how far it is: btx status {planned.directory}")
    return 0


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """``btx cancel``: cancel the jobs of a run, or of some of its stages."""
    parser = argparse.ArgumentParser(
        prog="btx cancel",
        description="Cancel the jobs of a run in Slurm's queue, and no others. What was saved stays; btx submit goes "
        "on from there.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument(
        "--only", metavar="STAGE", nargs="+", default=[], help="the jobs of these stages (default: all)"
    )
    arguments = parser.parse_args(argv)
    if not (arguments.run / PLAN_FILE).is_file():
        raise InputError(f"{arguments.run}: no {PLAN_FILE} in it; expected a run directory")
    known = [entry.stage for entry in read_plan(arguments.run) or ()]
    with take_turn(arguments.run / SLURM_FOLDER):  # a btx submit that is at work would go on submitting
        jobs = list_jobs(arguments.run)  # one that is ending may start again
        if arguments.only:
            jobs = [job for job in jobs if job.stage in arguments.only]
        found = [*known, *[job.stage for job in jobs]]  # a stage that the recipe no longer has may have a job
        for name in arguments.only:
            if name not in found:
                raise InputError(f"--only {name}: no such stage; expected some of: {', '.join(known)}")
        cancel_jobs(jobs)
    for job in jobs:
        print(f"{job.stage}: job {job.number} cancelled")
    if not jobs:
        print("no job of it is in the queue")
    return 0
