"""Slurm's queue: the jobs of a run are known by their names, and asked for, submitted and cancelled here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.common.errors import InputError, printable
from megatron_btx.distributed.launcher import without_launcher
from megatron_btx.recipe.cluster import FOREIGN_NAMES
from megatron_btx.runner.processes import mark_of

SLURM_FOLDER = "slurm"
"""Of a run: scripts, records and logs of its jobs."""
COMMENT_LETTERS = 16
"""Of a stage's fingerprint, in the comment of its job."""
_MARK_LETTERS = 12
_FORMAT = "%A|%T|%L|%S|%r|%k|%j"
_LINE = re.compile(r"(\d+)\|([A-Z_]+)\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)\|(.*)")
_NUMBER = re.compile(r"^(?:Submitted batch job )?([0-9]+)(?:;\S*| on cluster \S+)?\s*$", re.MULTILINE)
_ENDING = "COMPLETING"
_TIMEOUT_SECONDS = 120


class SlurmError(InputError):
    """Slurm is not there, does not answer, or refuses."""


@dataclass(frozen=True)
class Job:
    """A job of a run in Slurm's queue."""

    number: int
    stage: str
    state: str
    """Slurm's word, as PENDING or RUNNING."""
    time_left: str
    begins: str
    """When it is to begin, or N/A."""
    reason: str
    """Slurm's word for why it waits."""
    fingerprint: str
    """The first letters of its stage's."""

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs; not while Slurm clears up after it, which it does before it starts one again."""
        return self.state != _ENDING

    @property
    def is_running(self) -> bool:
        """Whether it has nodes."""
        return self.state not in ("PENDING", _ENDING)

    @property
    def never_starts(self) -> bool:
        """Whether it waits for a job that failed."""
        return self.reason == "DependencyNeverSatisfied"


def job_name(run: Path, stage: str) -> str:
    """What the job of a stage is called: the stage, and a mark of the run's path, of which there is one."""
    return f"{stage}.btx-{mark_of(run)[:_MARK_LETTERS]}"


def list_jobs(run: Path) -> list[Job]:
    """The jobs of a run that wait, run or are about to be gone, in the order of their submission. Raises SlurmError."""
    suffix = job_name(run, "")
    said = _call("squeue", "--noheader", f"--user={os.getuid()}", f"--format={_FORMAT}")
    jobs = []
    for line in said.splitlines():
        match = _LINE.fullmatch(line)
        if match is None or not match[7].endswith(suffix):
            continue
        number, state, left, begins, reason, comment, name = match.groups()
        jobs.append(Job(int(number), name.removesuffix(suffix), state, left, begins, reason, comment))
    return sorted(jobs, key=lambda job: job.number)


def list_settled(run: Path) -> list[Job]:
    """As :func:`list_jobs`; what is ending is waited for, because it may start again afterwards."""
    for turn in range(_TIMEOUT_SECONDS // 2):
        jobs = list_jobs(run)
        ending = ", ".join(f"{job.stage} (job {job.number})" for job in jobs if not job.is_active)
        if not ending:
            return jobs
        if not turn:
            print(f"waiting until Slurm has cleared up after {ending}", file=sys.stderr, flush=True)
        time.sleep(2)
    raise SlurmError(f"{run}: Slurm still clears up after {ending}, which may start again; try again later")


def submit_script(script: Path, after: Iterable[int]) -> int:
    """Submit a script whose job starts when those of ``after`` have done their work; its number. Raises SlurmError."""
    waits = "".join(f":{number}" for number in sorted(after))
    dependency = f"afterok{waits},singleton" if waits else "singleton"
    said = _call("sbatch", "--parsable", f"--dependency={dependency}", str(script))
    numbers = _NUMBER.findall(said)  # a site's own sbatch may greet before
    if not numbers:
        raise SlurmError(f"sbatch {script}: answered {said!r}, expected the number of a job; btx submit finds the job")
    return int(numbers[-1])


def cancel_jobs(jobs: Sequence[Job]) -> None:
    """Cancel jobs; one that is gone already is none."""
    if jobs:
        _call("scancel", *[str(job.number) for job in jobs])


def check_no_jobs(run: Path) -> None:
    """Refuse a run directory in which jobs of Slurm are at work, or may be and cannot be asked for."""
    if not (run / SLURM_FOLDER).is_dir():
        return
    if shutil.which("squeue") is None:
        raise SlurmError(
            f"{run}: was submitted to Slurm, which cannot be asked here (no squeue), so its jobs may be at work; go on "
            f"where it can, or, when none is left, remove {run / SLURM_FOLDER}"
        )
    active = [f"{job.stage} (job {job.number})" for job in list_settled(run)]
    if active:
        raise InputError(f"{run}: jobs of Slurm are at work here: {', '.join(active)}; wait, or btx cancel {run}")


def _call(*words: str) -> str:
    if shutil.which(words[0]) is None:
        raise SlurmError(
            f"{words[0]}: not found; Slurm's commands are needed here: load its module, or go to a login node"
        )
    # Slurm's commands and jobs inherit nothing of a job around this process, and no options, which beat a recipe.
    inherited = without_launcher(os.environ)
    environment = {name: value for name, value in inherited.items() if not FOREIGN_NAMES.match(name)}
    for name in ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "BTX_PYTHON"):
        if name in os.environ:
            environment[name] = os.environ[name]
    try:
        answer = subprocess.run(
            words, capture_output=True, check=False, timeout=_TIMEOUT_SECONDS, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]}: Slurm did not answer in {_TIMEOUT_SECONDS} s; try again") from None
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"status {answer.returncode}"]
        said = [line.removeprefix(f"{words[0]}: ").removeprefix("error: ") for line in lines]
        raise SlurmError(f"{words[0]}: {printable('; '.join(said))}")
    return answer.stdout
