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
from typing import Any

from megatron_btx.common import manifest as manifests
from megatron_btx.common.errors import BAD_INPUT_EXIT_CODE, InputError, exits_with_one_line, printable
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import LOG_FILE
from megatron_btx.runner import processes
from megatron_btx.runner.decisions import KEEP, RERUN, SKIP, decide_start
from megatron_btx.runner.local import MANIFEST_SECONDS, find_problem
from megatron_btx.runner.run_dir import own_manifest, read_checkpointed_iteration
from megatron_btx.runner.schemas import StageManifest, read_count
from megatron_btx.runner.slurm_queue import SlurmError, list_jobs
from megatron_btx.runner.stage_run import describe_start, failure_message, killed_by, prepare_folder, read_log
from megatron_btx.slurm.record import StageRecord, read_record, read_started
from megatron_btx.slurm.script import DONE_BEFORE, GIVEN_UP, INTERRUPTED

_FAILED_TASK = "Exited with exit code "
"""What srun says of a task that ended by itself with a status."""
_CAUSE = re.compile(r"CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))? \*\*\*")
_TIME_LIMIT = "TIME LIMIT"
"""What slurmstepd says of a step that it ends: nothing, or the cause."""
_BAD_INPUT_OF_TASK = f"{_FAILED_TASK}{BAD_INPUT_EXIT_CODE}\n"
"""What srun says of a task that refused its input, whatever ended the others."""


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
    action = decide_start(stage, record.identity, directory, record.rerun, record.is_rerun)
    if action.verb == SKIP:
        _say(f"{stage.name}: {action.why}")
        return DONE_BEFORE
    if action.verb == KEEP:
        raise InputError(f"{directory}: made otherwise: {action.why}; btx submit says what to do")
    earlier = StageManifest()
    if action.verb != RERUN:
        earlier = own_manifest(directory, stage.name) or earlier
    started = _describe_start(stage, directory, earlier)
    if started["stalled"] > retries:
        manifests.write_manifest(directory, earlier.model_dump() | {"status": "failed", "slurm": started})
        raise InputError(
            f"stage {stage.name}: {started['stalled']} starts in a row saved no further step; its log: "
            f"{directory / LOG_FILE}"
        )
    device = "cpu"
    if stage.on_gpu and os.environ.get("CUDA_VISIBLE_DEVICES", "") not in ("", "-1", "NoDevFiles"):
        device = "gpu"
    manifest = describe_start(stage, record.identity, action, earlier, device) | {"slurm": started}
    prepare_folder(stage, directory, action, manifest)
    with (directory / LOG_FILE).open("ab") as log:
        line = f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {action.verb}: job {started['job']} of Slurm\n"
        log.write(line.encode())
        started["log offset"] = log.tell()
    manifests.write_manifest(directory, manifest)  # with the offset
    _say(f"{stage.name}: {action.verb} ({action.why})")
    return 0


def end(run: Path, record: StageRecord, retries: int, code: int) -> int:
    """Note how a program ended; 0, :data:`INTERRUPTED` where the job should start again, :data:`GIVEN_UP`, or 2."""
    stage = record.stage
    directory = run / stage.name
    processes.end_marked(f"slurm-{_job_number()}:")  # Slurm does not find all where it follows no cgroups
    manifest = own_manifest(directory, stage.name)
    if manifest is None:
        raise InputError(f"{directory}: the folder of the running stage is gone")
    started = read_started(manifest)
    content = manifest.model_dump() | {"exit": code}
    content["seconds"] = round((manifest.seconds or 0.0) + max(0.0, time.time() - started.get("time", time.time())), 3)
    problem = find_problem(stage, directory, code)
    if not problem:
        manifests.write_manifest(directory, content | {"status": "finished"})
        _say(f"{stage.name}: finished")
        return 0
    text = read_log(directory / LOG_FILE, read_count(started.get("log offset")) or 0)
    if _BAD_INPUT_OF_TASK in text:
        code = BAD_INPUT_EXIT_CODE
    message, status = failure_message(text, code, stage.name)
    killed = killed_by(text, code)
    if status == BAD_INPUT_EXIT_CODE:
        problem = f"failed: {message.partition('error: ')[2]}"
        message = ""
    elif _was_asked_to_end(text, code):
        problem = f"stopped: {_explain_end(text)}"
    elif killed:
        problem = f"failed: {killed}"
    stalled = _count_stalled(stage, directory, started)
    goes_on = status != BAD_INPUT_EXIT_CODE and stalled <= retries
    started["problem"] = problem
    if code and not problem.startswith("stopped"):
        status_word = "failed"
        _say(f"stage {stage.name} {problem}; its log: {directory / LOG_FILE}\n{message}")
    else:
        status_word = "stopped"
        _say(f"stage {stage.name} {problem}")
    manifests.write_manifest(directory, content | {"status": status_word, "slurm": started})
    if goes_on:
        return INTERRUPTED
    if status == BAD_INPUT_EXIT_CODE:
        return status
    _say(f"{stalled} starts in a row saved no further step; not started again")
    return GIVEN_UP


def _was_asked_to_end(text: str, code: int) -> bool:
    """Whether Slurm told a program to end; srun tells the neighbours of a failed task the same."""
    return code in (-signal.SIGTERM, 128 + signal.SIGTERM) and _FAILED_TASK not in text


def _explain_end(text: str) -> str:
    """Why Slurm ended a program, in its words."""
    causes = _CAUSE.findall(text)
    if not causes:
        return "cancelled, preempted or out of time"
    if causes[-1] == _TIME_LIMIT:
        return "out of time, which btx submit begins anew; give its kind of stage more in cluster"
    return causes[-1].lower() or "cancelled"


def _check_parents(run: Path, record: StageRecord) -> None:
    for parent, fingerprint in record.parents.items():
        manifest = own_manifest(run / parent, parent)
        state = "not there"
        if manifest is not None:
            state = manifest.status or "unknown"
            if manifest.is_finished and fingerprint not in (None, manifest.fingerprint):
                state = "made with other settings"
            elif manifest.is_finished:
                continue
        raise InputError(
            f"stage {record.stage.name}: it needs {parent}, which is {state}; btx submit runs what is missing"
        )


def _check_alone(run: Path, stage: Stage) -> None:
    """Refuse where the manifest says that somebody else makes the stage, and he does; see lock.py.

    A job is asked for in the queue. A runner writes the manifest every few seconds, so it is watched for that long.
    """
    manifest = own_manifest(run / stage.name, stage.name)
    if manifest is None or manifest.status != "running":
        return
    number = read_started(manifest).get("job")
    is_made = False
    if number not in (None, _job_number()):
        with contextlib.suppress(SlurmError):  # asked from within a container, or while the controller is away
            is_made = any(job.is_running and str(job.number) == number for job in list_jobs(run))
    until = time.monotonic() + 2 * MANIFEST_SECONDS
    while number is None and not is_made and time.monotonic() < until:
        time.sleep(1)
        is_made = own_manifest(run / stage.name, stage.name) != manifest
    if is_made:
        raise InputError(f"stage {stage.name}: a btx run or another job makes it; wait for it, or end it first")


def _describe_start(stage: Stage, directory: Path, earlier: StageManifest) -> dict[str, Any]:
    """What the manifest says of this start: job, moment, step, and how many before it saved nothing."""
    stalled = 0
    before = read_started(earlier)
    if before.get("job") == _job_number():
        stalled = _count_stalled(stage, directory, before)
    return {
        "job": _job_number(),
        "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "time": time.time(),
        "step": _saved_step(stage, directory),
        "stalled": stalled,
    }


def _count_stalled(stage: Stage, directory: Path, started: dict[str, Any]) -> int:
    """How many starts in a row, the one that ``started`` describes the last of them, saved no further step."""
    if _saved_step(stage, directory) > (read_count(started.get("step")) or 0):
        return 0
    return (read_count(started.get("stalled")) or 0) + 1


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
