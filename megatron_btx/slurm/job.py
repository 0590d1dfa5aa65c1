"""What a job writes before and after its program: the state of a stage, and whether the job is to start again.

    python -m megatron_btx.slurm.job begin STAGE --fingerprint F --retries N
    python -m megatron_btx.slurm.job end STAGE --fingerprint F --retries N --status S

It is called by a batch script (:mod:`megatron_btx.slurm.script`) in the run directory. What ended a program
is seen from the steps that it saved: interrupted in time it leaves with status 0, as a finished one does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

from megatron_btx.common import manifest as manifests
from megatron_btx.common.errors import BAD_INPUT_EXIT_CODE, InputError, exits_with_one_line, printable
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import LOG_FILE
from megatron_btx.runner import processes
from megatron_btx.runner.decisions import KEEP, RERUN, SKIP, decide_start
from megatron_btx.runner.local import MANIFEST_SECONDS
from megatron_btx.runner.run_dir import own_manifest, read_checkpointed_iteration
from megatron_btx.runner.schemas import JobStart, StageManifest, StageRecord
from megatron_btx.runner.slurm_queue import SlurmError, list_jobs
from megatron_btx.runner.stage_run import StageRun, read_record
from megatron_btx.slurm.script import DONE_BEFORE, GIVEN_UP, INTERRUPTED, script_path

_FAILED_TASK = "Exited with exit code "
"""What srun says of a task that ended by itself with a status; it tells the neighbours of that task to end, too."""
_CAUSE = re.compile(r"CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*")
"""What slurmstepd says of a step that it ends: nothing, or the cause."""


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the state of a stage before or after its program."""
    parser = argparse.ArgumentParser(prog="python -m megatron_btx.slurm.job", description=__doc__)
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("stage")
    parser.add_argument("--fingerprint", required=True, help="of the stage as it was submitted")
    parser.add_argument("--retries", type=int, required=True, help="starts in a row that may save no further step")
    parser.add_argument("--status", type=int, default=0, help="exit status of the program")
    arguments = parser.parse_args(argv)
    run = Path.cwd()
    record = read_record(run, arguments.stage)
    if record.identity.fingerprint != arguments.fingerprint:
        raise InputError(
            f"stage {arguments.stage}: the recipe was submitted again with other settings after this job; "
            "btx submit makes a job of the present ones"
        )
    if arguments.moment == "begin":
        return begin(run, record, arguments.retries)
    return end(run, record, arguments.retries, arguments.status)


def begin(run: Path, record: StageRecord, retries: int) -> int:
    """Prepare a stage's folder; 0, or :data:`DONE_BEFORE` where it is finished.

    Raises:
        InputError: what it is made from is not finished, somebody else makes it, its folder holds something else, or
            it started too often.
    """
    stage = record.stage
    directory = run / stage.name
    _check_parents(run, record)
    _check_alone(run, stage)
    action = decide_start(record, directory)
    if action.verb == SKIP:
        _say(f"{stage.name}: {action.why}")
        return DONE_BEFORE
    if action.verb == KEEP:
        raise InputError(f"{directory}: made otherwise: {action.why}; btx submit says what to do")
    earlier = StageManifest()
    if action.verb != RERUN:
        earlier = own_manifest(directory, stage.name)
    stalled = 0
    if earlier.slurm.job == _job_number():
        stalled = _count_stalled(stage, directory, earlier.slurm)
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    job = JobStart(job=_job_number(), nodes=nodes, step=_saved_step(stage, directory), stalled=stalled)
    if stalled > retries:
        failed = earlier.model_copy(update={"status": "failed", "slurm": job})
        manifests.write_manifest(directory, failed.content())
        raise InputError(
            f"stage {stage.name}: {stalled} starts in a row saved no further step; its log: {directory / LOG_FILE}"
        )
    device = "cpu"
    if stage.on_gpu and os.environ.get("CUDA_VISIBLE_DEVICES", "") not in ("", "-1", "NoDevFiles"):
        device = "gpu"
    script = script_path(run, stage.name).relative_to(run)
    StageRun(run, record).begin(action, device, f"{script}, job {job.job} of Slurm", job)
    _say(f"{stage.name}: {action.verb} ({action.why})")
    return 0


def end(run: Path, record: StageRecord, retries: int, code: int) -> int:
    """Note how a program ended; 0, :data:`INTERRUPTED` where the job should start again, :data:`GIVEN_UP`, or 2."""
    stage = record.stage
    directory = run / stage.name
    processes.end_marked(f"slurm-{_job_number()}:")  # Slurm does not find all where it follows no cgroups
    manifest = own_manifest(directory, stage.name)
    if not manifest.stage:
        raise InputError(f"{directory}: the folder of the running stage is gone")
    stage_run = StageRun(run, record, manifest)
    failure = stage_run.find_failure(code)
    if failure is None:
        stage_run.end(code, "finished")
        _say(f"{stage.name}: finished")
        return 0
    problem, message = failure.problem, failure.message
    status = "failed" if code else "stopped"
    if failure.status == BAD_INPUT_EXIT_CODE:
        problem = f"failed: {message.partition('error: ')[2]}"
        message = ""
    elif code in (-signal.SIGTERM, 128 + signal.SIGTERM) and _FAILED_TASK not in failure.log:
        causes = _CAUSE.findall(failure.log) or ["cancelled, preempted or out of time"]
        cause, status = causes[-1].lower() or "cancelled", "stopped"
        if cause == "time limit":
            cause = "out of time, which btx submit begins anew; give its kind of stage more in cluster"
        problem = f"stopped: {cause}"
    stage_run.end(code, status, problem)
    said = f"stage {stage.name} {problem}"
    if status == "failed":
        said += f"; its log: {directory / LOG_FILE}\n{message}"
    _say(said)
    if failure.status == BAD_INPUT_EXIT_CODE:
        return failure.status
    stalled = _count_stalled(stage, directory, manifest.slurm)
    if stalled <= retries:
        return INTERRUPTED
    _say(f"{stalled} starts in a row saved no further step; not started again")
    return GIVEN_UP


def _check_parents(run: Path, record: StageRecord) -> None:
    for parent, fingerprint in record.parents.items():
        manifest = own_manifest(run / parent, parent)
        state = manifest.status or "not there"
        if manifest.is_finished:
            if manifest.fingerprint == fingerprint:
                continue
            state = "made with other settings"
        raise InputError(
            f"stage {record.stage.name}: it needs {parent}, which is {state}; btx submit runs what is missing"
        )


def _check_alone(run: Path, stage: Stage) -> None:
    """Refuse where the manifest says that somebody else makes the stage, and he does; see run_dir.py.

    A job is asked for in the queue. A runner writes the manifest every few seconds, so it is watched for that long.
    """
    manifest = own_manifest(run / stage.name, stage.name)
    number = manifest.slurm.job
    if manifest.status != "running" or number == _job_number():
        return
    is_made = False
    if number is not None:
        with contextlib.suppress(SlurmError):  # asked from within a container, or while the controller is away
            is_made = any(job.is_running and str(job.number) == number for job in list_jobs(run))
    until = time.monotonic() + 2 * MANIFEST_SECONDS
    while number is None and not is_made and time.monotonic() < until:
        time.sleep(1)
        is_made = own_manifest(run / stage.name, stage.name) != manifest
    if is_made:
        raise InputError(f"stage {stage.name}: a btx run or another job makes it; wait for it, or end it first")


def _count_stalled(stage: Stage, directory: Path, job: JobStart) -> int:
    """How many starts in a row, that of ``job`` the last of them, saved no further step."""
    if _saved_step(stage, directory) > (job.step or 0):
        return 0
    return (job.stalled or 0) + 1


def _saved_step(stage: Stage, directory: Path) -> int:
    if not stage.resumable:
        return 0
    return read_checkpointed_iteration(directory)


def _job_number() -> str:
    return os.environ.get("SLURM_JOB_ID", "none")


def _say(text: str) -> None:
    lines = [printable(line) for line in text.splitlines()]
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} " + "\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
