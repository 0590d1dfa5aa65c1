"""What is around the program: a container, Slurm, folders that must be writable, free disk, cores and memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.pipeline.doctor.commands import answer_of
from megatron_btx.pipeline.doctor.finding import Finding, State, absent, wrong

_GIB = 2**30
LITTLE_DISK = 2 * _GIB
"""Bytes below which a folder gets a note: one checkpoint of a small model, with its optimizer."""
_CONTAINERS = (("/.dockerenv", "docker"), ("/run/.containerenv", "podman or buildah"))
_CONTAINER_VARIABLES = (("APPTAINER_NAME", "apptainer"), ("SINGULARITY_NAME", "singularity"), ("ENROOT_PID", "enroot"))
_JOB = ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")


def look_around() -> Iterator[Finding]:
    """The machine, the container, Slurm and the folders."""
    yield Finding("machine", "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("machine", "memory", f"{memory / _GIB:.0f} GiB")
    yield _container()
    yield from _slurm()
    yield from _folders()


def _container() -> Finding:
    kinds = [kind for path, kind in _CONTAINERS if Path(path).exists()]
    kinds += [kind for name, kind in _CONTAINER_VARIABLES if name in os.environ]
    image = os.environ.get("NVIDIA_PYTORCH_VERSION")
    if image:
        kinds.append(f"on NVIDIA's PyTorch image {image}")
    if not kinds:
        return absent("machine", "container")
    return Finding("machine", "container", ", ".join(kinds))


def _slurm() -> Iterator[Finding]:
    """Its version, the partitions, and this job. Inside a container its commands are often missing."""
    in_job = {name: os.environ[name] for name in _JOB if os.environ.get(name)}
    version = answer_of(["sinfo", "--version"])
    if version:
        yield Finding("slurm", "version", version.split()[-1])
    elif in_job:
        yield Finding("slurm", "version", "its commands are not here; btx submit needs them, jobs do not", State.NOTE)
    else:
        yield absent("slurm", "version", "btx run needs none; btx submit wants sbatch, squeue and scancel")
    for number, name in enumerate(_partitions() if version else ()):
        yield Finding("slurm", "partitions" if number == 0 else "", name)
    if in_job:
        words = [f"{name.removeprefix('SLURM_').lower()} {value}" for name, value in in_job.items()]
        yield Finding("slurm", "job", ", ".join(words))
    else:
        yield absent("slurm", "job")


def _partitions() -> list[str]:
    """One line each: name (* is the default), nodes, GPUs and such, time limit, cores."""
    listed = answer_of(["sinfo", "--noheader", "--format=%P|%D|%G|%l|%c"])
    if not listed:
        return ["none: the controller does not answer"]
    lines = []
    for line in listed.splitlines():
        name, nodes, resources, limit, cores = (line.split("|") + [""] * 4)[:5]
        what = "" if resources == "(null)" else f", {resources}"
        lines.append(f"{name}: {nodes} nodes of {cores} cores{what}, limit {limit}")
    return lines


def _folders() -> Iterator[Finding]:
    """Where is written: here, temporary files, and the caches of the libraries."""
    yield _folder("here", Path.cwd(), needed=False, remedy="change to a folder of yours before btx run")
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    yield _folder("temporary", temporary, needed=True, remedy="export TMPDIR=FOLDER, one that is writable and local")
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache else Path.home() / ".cache"
    yield _cache("cache", base, "XDG_CACHE_HOME")
    yield _cache(
        "triton cache", Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton"), "TRITON_CACHE_DIR"
    )
    yield _cache("models' cache", Path(os.environ.get("HF_HOME") or base / "huggingface"), "HF_HOME")


def _cache(name: str, folder: Path, variable: str) -> Finding:
    return _folder(name, folder, needed=False, remedy=f"export {variable}=FOLDER, one that is writable")


def _folder(name: str, folder: Path, needed: bool, remedy: str) -> Finding:
    """Whether files can be made in a folder, or in the nearest one above it that exists; and its free disk."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not _can_write(there):
        if needed:
            return wrong("disk", name, f"{folder}: not writable", remedy)
        return Finding("disk", name, f"{folder}: not writable", State.NOTE, remedy)
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / _GIB:.1f} GiB free"
    if free < LITTLE_DISK:
        return Finding("disk", name, found, State.NOTE, "little: checkpoints will not fit")
    return Finding("disk", name, found)


def _can_write(folder: Path) -> bool:
    """By writing: permissions say nothing about read-only mounts, quotas and full disks."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
    except OSError:
        return False
    return True
