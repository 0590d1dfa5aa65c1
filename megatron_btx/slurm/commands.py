"""``btx submit`` and ``btx cancel``, behind what the command line says."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.recipe.names import PLAN_FILE
from megatron_btx.runner.lock import take_turn
from megatron_btx.runner.run_dir import read_plan
from megatron_btx.runner.scripts import as_comment
from megatron_btx.runner.slurm_queue import cancel_jobs, list_jobs
from megatron_btx.slurm.record import SLURM_FOLDER, script_path
from megatron_btx.slurm.status import FOREIGN
from megatron_btx.slurm.submission import Submission, render_scripts, submit

if TYPE_CHECKING:
    from megatron_btx.runner.api import PlannedRun


def show_scripts(planned: PlannedRun) -> str:
    """``btx submit --dry-run``: the scripts; none is written, because jobs in the queue read what lies there."""
    scripts = {script_path(planned.directory, stage): script for stage, script in render_scripts(planned).items()}
    return "\n".join(f"{as_comment(f'==== {path}')}\n{script}" for path, script in scripts.items())


def submit_run(planned: PlannedRun) -> None:
    """``btx submit``: submit what is missing and print what became of every stage."""
    ignored = [name for name in os.environ if name.startswith("SBATCH_")]
    if ignored:
        print(f"# note: {', '.join(ignored)}: not used; what jobs ask for stands in the cluster section")
    result = submit(planned)
    for stage in planned.chosen_stages():
        print(_describe(stage.name, result))
    for job in result.foreign:
        print(FOREIGN.format(job.stage, job.number, planned.directory))
    print(f"how far it is: btx status {planned.directory}")


def _describe(stage: str, result: Submission) -> str:
    if stage in result.submitted:
        replaced = "".join(f", in place of job {number}" for number in result.replaced[stage])
        return f"{stage}: submitted, job {result.submitted[stage]}{replaced}"
    if stage in result.kept:
        return f"{stage}: in the queue already, job {result.kept[stage]}"
    return f"{stage}: finished"


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
