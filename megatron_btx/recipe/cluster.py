"""The ``cluster`` section of a recipe: what ``btx submit`` asks of Slurm, for all stages and per kind of stage.

Its values end in ``#SBATCH`` lines and on command lines of a shell, so each has a form, and whatever could begin
another line or another option is refused here. It names an interpreter, and may set PATH: it is trusted as a program.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from megatron_btx.common.refusals import RefusedKeyError
from megatron_btx.recipe.section import Section, form

FOREIGN_NAMES = re.compile(r"(SLURMD?|SBATCH|SQUEUE|SCANCEL|SCONTROL|SALLOC|SRUN|SINFO|SACCT|BTX)_")
"""Begins the variables by which Slurm's commands and our scripts know a job, or take options."""
_SECRET = re.compile(
    r"(?i)(?<!_p)key|token(?!iz)|secret|passw|passph|creden|authoriz|bearer|session|sessid|(pass|pwd|auth|creds?|jwt|cookies?|(^|_)(pat|sas|pin|pw|tok))\d*(_|$)"
)
_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s]*@")
_TIME = re.compile(r"[0-9]{1,6}|[0-9]{1,6}(:[0-9]{2}){2}|[0-9]{1,6}-[0-9]{1,6}(:[0-9]{2}){0,2}")
"""Not MM:SS, which a reader takes for hours and minutes."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def seconds_of(time: str) -> int:
    """What Slurm makes of a time limit."""
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = (*map(int, clock.split(":")), 0, 0)[:3]
    if not days and ":" not in clock:
        hours, minutes = 0, hours
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_time(text: str) -> str:
    if not _TIME.fullmatch(text) or not seconds_of(text):
        raise ValueError(f"found {text!r}, expected minutes, HH:MM:SS or DAYS-HH:MM:SS, above 0 and in quotes")
    return text


def _check_one_line(text: str) -> str:
    text = os.path.expanduser(text)  # it will stand between quotes
    if not text or text.startswith(("-", "~")) or _CONTROL.search(text) or _PASSWORD.search(text):
        raise ValueError(
            f"found {text!r}, expected one line that begins with no dash, nor ~ of nobody, and holds no password"
        )
    return text


def _check_environment(given: dict[str, str]) -> dict[str, str]:
    for name, value in given.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise RefusedKeyError(name, "not the name of a variable; expected letters, digits and underscores")
        if FOREIGN_NAMES.match(name) or name in ("python", "IFS", "SECONDS"):
            raise RefusedKeyError(name, "a variable of Slurm or of the scripts; what a job asks for has its own keys")
        if _SECRET.search(name) or _PASSWORD.search(value):
            raise RefusedKeyError(
                name, "may be a secret, and would stand in scripts; leave it out and export it before btx submit"
            )
        if _CONTROL.search(value):
            raise RefusedKeyError(name, f"found {value!r}, expected one line")
    return given


Word = Annotated[
    str, form(r"[A-Za-z0-9_][A-Za-z0-9_.+@:,-]*", "a name of letters, digits and _ . + @ : , - (not first)")
]
"""A name of Slurm's: an account, a partition, a QoS."""
Constraint = Annotated[str, form(r"[A-Za-z0-9_\[(][A-Za-z0-9_.&|!*()\[\],-]*", "features of nodes, as a100&nvlink")]
Memory = Annotated[str, form(r"[0-9]{1,9}[KMGT]|0", "memory of a node with its unit, as 64G; 0 is all of it")]
Line = Annotated[str, AfterValidator(_check_one_line)]
Count = Annotated[int, Field(ge=1, le=10_000)]


class ResourcesSection(Section):
    """What a job asks for."""

    account: Word | None = None
    partition: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    constraint: Constraint | None = None
    time: Annotated[str, AfterValidator(_check_time)] | None = None
    """Time limit (default: the partition's)."""
    nodes: Count | None = None
    """(default: as many as the stage's processes need)"""
    tasks_per_node: Count | None = None
    """Processes on a node at most (default: 8; with nodes, the stage's processes spread over them)."""
    gpus_per_task: Annotated[int, Field(ge=0, le=16)] = 1
    """Of a stage that uses GPUs (default: 1); 0 where the cluster has none."""
    cpus_per_task: Count | None = None
    """(default: the stage's threads; of a stage that uses no GPU also the data's workers)"""
    memory: Memory | None = None
    """Of each node."""
    exclusive: bool | None = None
    """Whether no other job may use its nodes."""
    container_image: Line | None = None
    """For srun --container-image, which pyxis adds to Slurm."""
    container_mounts: list[Line] | None = None
    """SOURCE:TARGET beside the run's folder, which is always there."""
    python: Line | None = None
    """The interpreter (default: the one that btx submit runs with; in a container, python)."""
    data_cache: Line | None = None
    """Folder for Megatron's indices of datasets (default: in the stage's folder)."""
    environment: Annotated[dict[str, str], AfterValidator(_check_environment)] | None = None
    """Variables of the job; everything that is exported when btx submit runs is there without it."""
    signal_seconds: Annotated[int, Field(ge=10, le=3600)] = 90
    """How long before its end a training job is told to save and leave (default: 90)."""
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    """How often in a row a job starts again that saved no further step (default: 3)."""

    def given(self) -> dict[str, Any]:
        """What is written here, by the names of the fields."""
        return self.model_dump(include=set(ResourcesSection.model_fields), exclude_unset=True, exclude_none=True)


class ClusterSection(ResourcesSection):
    """What every job asks for, and below it what those of some kinds ask for instead."""

    cpu: ResourcesSection = ResourcesSection()
    """Stages that use no GPU: data, mix, export, report."""
    gpu: ResourcesSection = ResourcesSection()
    """Stages that train or evaluate."""
    data: ResourcesSection = ResourcesSection()
    seed: ResourcesSection = ResourcesSection()
    experts: ResourcesSection = ResourcesSection()
    mix: ResourcesSection = ResourcesSection()
    """Of everything that converts checkpoints: mixes, averages, imports."""
    finetune: ResourcesSection = ResourcesSection()
    dense: ResourcesSection = ResourcesSection()
    evaluate: ResourcesSection = ResourcesSection()
    export: ResourcesSection = ResourcesSection()
    report: ResourcesSection = ResourcesSection()

    def merge(self, kinds: tuple[str, ...]) -> ResourcesSection:
        """What a stage of these kinds asks for; a later kind wins, environments are laid over each other."""
        merged = self.given()
        for kind in kinds:
            section: ResourcesSection = getattr(self, kind)
            given = section.given()
            environment = {**merged.get("environment", {}), **given.get("environment", {})}
            merged |= given
            if environment:
                merged["environment"] = environment
        return ResourcesSection().model_copy(update=merged)
