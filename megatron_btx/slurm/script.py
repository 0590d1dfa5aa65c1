"""The batch script of a stage: what Slurm is asked for, and the commands, to be read, edited and submitted by hand.

Nothing of a recipe stands in it unquoted. Values of ``#SBATCH`` lines have a form that cannot hold a blank or a line
break (:mod:`megatron_btx.recipe.cluster`), and sbatch reads such lines only before the first command.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from megatron_btx.common.errors import InputError, printable
from megatron_btx.plan.stage import PYTHON, Program, Stage
from megatron_btx.runner.scripts import flag_per_line, shell_locks, shell_preparation
from megatron_btx.runner.slurm_queue import COMMENT_LETTERS, SLURM_FOLDER, job_name
from megatron_btx.slurm.resources import Resources

DONE_BEFORE, INTERRUPTED, GIVEN_UP = 10, 75, 76
"""What the first step of a job says when there is nothing to do, and the last one when the job should start again, or
did so too often; what fails in another way says the second, too."""
NOTE_SUFFIX = ".job"
"""Of the file beside a script that holds the number of the job last submitted; for btx status alone."""
_PASSED_ON = ("account", "partition", "qos", "reservation", "constraint", "time", "memory")
_SAFE_PATH = re.compile(r"[\w./+=@:,~-]+")

_IN_CONTAINER = '"${in_container[@]}"'

_START = """
# What a caller exported for Slurm's commands would change what they do and answer here.
unset "${{!SQUEUE_@}}" "${{!SBATCH_@}}" "${{!SCONTROL_@}}" "${{!SRUN_@}}" SLURM_CLUSTERS SLURM_STD{{IN,OUT,ERR}}MODE
unset SLURM_LABELIO SLURM_TIMELIMIT SLURM_WORKING_DIR SLURM_REMOTE_CWD
[ -n "${{SLURM_JOB_ID:-}}" ] || {{ echo "error: this is no job of Slurm; submit it with sbatch" >&2; exit 2; }}
cd -- {run} || exit 2
{preparation}
export OMP_NUM_THREADS={threads}
{exports}{container}
{locks}

# At the end of its time, or before other jobs take its nodes, Slurm tells the steps of this job: the program saves and
# leaves. This shell goes on, so that the job starts again.
trap : TERM

stage() {{ # stage begin|end [STATUS]: what is written before and after the program
    {stage}"$python" -m megatron_btx.slurm.job \\
        "$1" {name} \\
        --fingerprint {fingerprint} --retries {retries} "${{@:2}}"
}}

# Nothing else asks for it: one request per job. Dependent jobs go on waiting for this one. The controller may be away
# for minutes. A task of an array is named as squeue names it: its number can be that of the whole array.
start_again() {{
    local job state said="squeue or scontrol does not answer, or is missing"
    while type -P squeue scontrol >/dev/null && [ "$SECONDS" -lt "$1" ]; do
        read -r _ job state <<<"$(timeout 20 squeue --noheader --array --jobs="$SLURM_JOB_ID" --format="%A %i %T" |
            grep "^$SLURM_JOB_ID ")"
        case "$state" in
            RUNNING)
                said=$(timeout 20 scontrol requeue "$job" 2>&1) && return
                [[ "$said" != *disabled* ]] || break # for good: it was submitted with --no-requeue
                ;;
            "" | SIGNALING | STOPPED | SUSPENDED) ;;
            *) return ;; # cancelled, or taken back by Slurm itself
        esac
        sleep 5
    done
    echo "Slurm starts it not again ($said); btx submit goes on from its last step" >&2
}}

# A begin or an end that was killed had no bad input. A begin counts the starts before it, and Slurm those without one.
leave() {{ # leave STATUS STARTS
    case "$1" in
        {done_before}) exit 0 ;;
        {given_up}) exit 1 ;;
        0 | 2 | 126 | 127) exit "$1" ;;
    esac
    if [ "$2" -ge {retries} ]; then echo "not started again after $2 starts; btx submit goes on" >&2
    else start_again "$((SECONDS + 600))"; fi
    exit {interrupted}
}}

status=0
stage begin || status=$?
if [ "$status" -ne 0 ]; then leave "$status" "${{SLURM_RESTART_COUNT:-0}}"; fi

BTX_STAGE="slurm-$SLURM_JOB_ID:" {srun} \\
    {command} \\
    >>{log} 2>&1 </dev/null || status=$?

stage end --status "$status" && status=0 || status=$?
leave "$status" -1
"""


def script_path(run: Path, stage: str) -> Path:
    """The script of a stage's job; its record, its log and its note lie beside it."""
    return run / SLURM_FOLDER / f"{stage}.sh"


def render_script(stage: Stage, resources: Resources, run: Path, fingerprint: str) -> str:
    """The script of the job of ``stage``. Raises InputError for a run whose path Slurm's own lines could not hold."""
    if not _SAFE_PATH.fullmatch(str(run)):
        raise InputError(
            f"{str(run)!r}: btx submit needs a path of letters, digits and . _ + = @ : , ~ - /, which Slurm reads as "
            "it is; give another --output"
        )
    asked = resources.asked
    python = asked.python or (PYTHON if asked.container_image else sys.executable)
    name = shlex.quote(stage.name)
    srun = ["srun", f"--nodes={resources.nodes}", f"--ntasks={resources.nodes * resources.tasks_per_node}"]
    srun += [f"--ntasks-per-node={resources.tasks_per_node}", f"--cpus-per-task={resources.cpus_per_task}"]
    srun += ["--export=ALL", "--kill-on-bad-exit=1"]  # some sites export nothing to a job, nor then to its steps
    container = start = ""
    if asked.container_image is not None:
        if re.search("[:,]", str(run)):
            raise InputError(f"{run}: a container's mounts are told apart by : and ,; give another --output")
        mounts = ",".join((f"{run}:{run}", *(asked.container_mounts or ())))
        container = "in_container=(\n"
        for option in (f"image={asked.container_image}", f"mounts={mounts}", f"workdir={run}"):
            container += f"    {shlex.quote(f'--container-{option}')}\n"
        container += ")\n"
        start = f"srun --nodes=1 --ntasks=1 --export=ALL {_IN_CONTAINER} "  # what is short runs where the program does
        srun.append(f"\\\n    {_IN_CONTAINER}")
    command = list(stage.command)
    if isinstance(stage.program, Program):  # one task of srun is one process of it
        command = [PYTHON, "-m", stage.program.module, *stage.program.words]
    if stage.resumable:
        command.append("--exit-signal-handler")
        if asked.data_cache is not None:
            command += ["--data-cache-path", asked.data_cache]
    body = _START.format(
        run=shlex.quote(str(run)),
        threads=stage.threads,
        exports="".join(f"export {key}={shlex.quote(value)}\n" for key, value in (asked.environment or {}).items()),
        container=container,
        stage=start,
        preparation=shell_preparation(python),
        locks=shell_locks(stage.name),
        name=name,
        fingerprint=shlex.quote(fingerprint),
        done_before=DONE_BEFORE,
        given_up=GIVEN_UP,
        interrupted=INTERRUPTED,
        srun=" ".join(srun),
        command=flag_per_line(command),
        log=f"{name}/log.txt",
        retries=asked.retries,
    )
    return "\n".join([*_header(stage, resources, run, fingerprint), body])


def _header(stage: Stage, resources: Resources, run: Path, fingerprint: str) -> list[str]:
    """The lines that Slurm reads."""
    asked = resources.asked
    options: dict[str, str | int | None] = {
        "job-name": job_name(run, stage.name),
        "chdir": str(run),
        "output": f"{SLURM_FOLDER}/{stage.name}.log",
        "open-mode": "append",
    }
    for name in _PASSED_ON:
        value = getattr(asked, name)
        if value is not None:
            options["mem" if name == "memory" else name] = value
    if asked.exclusive:
        options["exclusive"] = None
    options["nodes"] = resources.nodes
    options["ntasks-per-node"] = resources.tasks_per_node
    options["cpus-per-task"] = resources.cpus_per_task
    if resources.gpus_per_node:
        options["gpus-per-node"] = resources.gpus_per_node
    if stage.resumable:
        options["signal"] = f"TERM@{asked.signal_seconds}"
    options["comment"] = fingerprint[:COMMENT_LETTERS]
    options["requeue"] = None
    options["dependency"] = "singleton"  # a second job of this name waits until this one has ended
    lines = ["#!/usr/bin/env bash"]
    for option, value in options.items():
        lines.append(f"#SBATCH --{option}" if value is None else f"#SBATCH --{option}={value}")
    waits = ", ".join(stage.waits_for()) or "nothing"
    lines.append(
        f"# Stage {printable(stage.name)}, which needs {printable(waits)}. Submit it by hand with: sbatch THIS_FILE"
    )
    lines.append("set -uo pipefail")
    return lines
