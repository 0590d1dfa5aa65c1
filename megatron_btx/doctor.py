"""``btx doctor``: what this machine, or this container, has of what training needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import BAD_INPUT_EXIT_CODE, exits_with_one_line

_DESCRIPTION = """
Say what this machine, or this container, has of what training needs: versions, GPUs and the kernels for them, Slurm's
commands, folders and disk. Nothing is changed. The status is 2 if something that is needed is missing or cannot be
used, else 0; a library for GPUs that cannot be loaded on a machine without one, such as a login node, is no reason.
"""
PACKAGE = "megatron-btx"
INSTALL = "bash tools/environment.sh"
PROBE = "megatron_btx.engine.cuda_check"
PROBE_SECONDS = 180
"""A first start from a shared file system takes a minute; this is for a library that hangs."""
KERNELS = (
    ("transformer_engine.pytorch", "transformer engine", "transformer-engine"),
    ("amp_C", "apex", "apex"),
    ("flash_attn", "flash attention", "flash-attn"),
)
"""Module, what it is called, package."""
IMAGE = "the image of the Dockerfile has it; training works without it, more slowly"
_SLURM = ("sbatch", "squeue", "scancel")
_GIB = 2**30
_LITTLE_DISK_BYTES = 2 * _GIB
"""One checkpoint of a small model, with its optimizer."""


class State(StrEnum):
    """What a finding means."""

    GOOD = "good"
    ABSENT = "absent"
    """Not there, and everything works without it."""
    NOTE = "note"
    """Works; somebody may want to know."""
    WRONG = "wrong"
    """Needed, and missing or not usable: the command ends with status 2."""


_MARKS = {
    State.GOOD: ("ok", "green"),
    State.ABSENT: ("-", "dim"),
    State.NOTE: ("note", "yellow"),
    State.WRONG: ("WRONG", "bold red"),
}


@dataclass(frozen=True)
class Finding:
    """What was found, and if it is wrong, what helps."""

    name: str
    found: str
    """A version, a number, a path."""
    state: State = State.GOOD
    remedy: str = ""
    """One line; empty where nothing is to be done."""


def look_at_packages() -> Iterator[Finding]:
    """Python, this package, everything that its own metadata asks for, and Megatron's compiled helper."""
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    own = version_of(PACKAGE)
    if own is None:
        yield Finding(PACKAGE, "imported and not installed", State.WRONG, INSTALL)
    else:
        yield Finding(PACKAGE, own)
        for text in importlib.metadata.requires(PACKAGE) or []:
            if "extra ==" not in text:
                yield _needed(text)
    yield _dataset_helper()


def version_of(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needed(text: str) -> Finding:
    """One line of the package's requirements, such as ``torch>=2.10,<2.16``."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return Finding(text, "not compared: packaging is missing", State.WRONG, INSTALL)
    requirement = Requirement(text)
    version = version_of(requirement.name)
    if version is None:
        return Finding(requirement.name, "missing", State.WRONG, f"{requirement}: {INSTALL}")
    # An image's own torch calls itself a pre-release: 2.13.0a0+9186a08.
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, version, State.WRONG, f"needs {requirement.specifier}: {INSTALL}")
    return Finding(requirement.name, version)


def _dataset_helper() -> Finding:
    """Whether the wheel brought it. Looked for as a file: an import of it would load torch."""
    name = "megatron dataset helper"
    spec = importlib.util.find_spec("megatron")
    for folder in (spec and spec.submodule_search_locations) or ():
        if list(Path(folder).glob("core/datasets/helpers_cpp*.so")):
            return Finding(name, "compiled")
    return Finding(name, "missing", State.WRONG, f"the wheel of megatron-core for this Python has it: {INSTALL}")


def look_at_gpus() -> Iterator[Finding]:
    """The driver's GPUs, torch's, and what runs on them; torch answers from a process of its own."""
    driver = _driver_version()
    yield Finding("driver", driver) if driver else Finding("driver", "no GPU, or no nvidia-smi", State.ABSENT)
    facts, problem = ask_torch()
    if facts is None:
        yield Finding("torch", problem, State.WRONG, INSTALL)
        return
    torch = facts["torch"]
    yield Finding("torch", f"{torch['version']}, CUDA {torch['cuda']}, NCCL {torch['nccl']}")
    yield _gpus_of_torch(torch["gpus"], bool(driver))
    for module, name, package in KERNELS:
        yield _kernels(name, version_of(package), facts["modules"].get(module), bool(torch["gpus"]))


def ask_torch() -> tuple[dict[str, Any] | None, str]:
    """What the probe says, or why it says nothing."""
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-m", PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env={**os.environ, "NVTE_DEBUG": "0"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_SECONDS} s"
    lines = answer.stdout.strip().splitlines()
    try:
        facts = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = answer.stderr.strip().splitlines() or ["nothing"]
        return None, f"ended with status {answer.returncode}, saying: {said[-1]}"
    if facts["torch"] is None:
        return None, facts["torch_error"]
    return facts, ""


def _driver_version() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


def _gpus_of_torch(gpus: list[str], driver_has: bool) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus:
        return Finding("GPUs", f"{len(gpus)} x {gpus[0]}")
    if driver_has and hidden is None:
        remedy = "the driver is older than this CUDA, or this torch is for CPUs; take the image that suits the driver"
        return Finding("GPUs", "torch sees none, the driver has some", State.WRONG, remedy)
    found = "none; training runs on the CPU, and only to try things"
    if driver_has:
        found = f"none, by CUDA_VISIBLE_DEVICES={hidden}"
    return Finding("GPUs", found, State.NOTE)


def _kernels(name: str, version: str | None, problem: str | None, has_gpu: bool) -> Finding:
    """A library of kernels: its version, and whether it can be imported where there is a GPU to use it."""
    if problem == "absent":
        if version is None:
            return Finding(name, "absent", State.ABSENT, IMAGE)
        return Finding(name, f"{version}, without its kernels (another package of that name?)", State.NOTE)
    found = version or "of unknown version"
    if problem is None:
        return Finding(name, found)
    if not has_gpu:
        return Finding(name, f"{found}; not loaded without a GPU ({problem})", State.NOTE)
    remedy = "it was built for another torch: take the image's own, or remove it"
    return Finding(name, f"{found}: {problem}", State.WRONG, remedy)


def look_around() -> Iterator[Finding]:
    """Cores and memory, Slurm's commands, and the folders that are written to."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("machine", f"{len(os.sched_getaffinity(0))} cores, {memory / _GIB:.0f} GiB of memory")
    missing = [command for command in _SLURM if shutil.which(command) is None]
    if missing:
        remedy = "btx run needs none; btx submit does, jobs and containers do not"
        yield Finding("slurm", f"no {', '.join(missing)}", State.ABSENT, remedy)
    else:
        yield Finding("slurm", ", ".join(_SLURM))
    yield _folder("here", Path.cwd(), State.NOTE, "change to a folder of yours before btx run")
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    yield _folder("temporary", temporary, State.WRONG, "export TMPDIR=FOLDER, one that is writable and local")


def _folder(name: str, folder: Path, otherwise: State, remedy: str) -> Finding:
    """Whether files can be made in a folder: tried, because permissions say nothing of read-only mounts and quotas."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
    except OSError:
        return Finding(name, f"{folder}: not writable", otherwise, remedy)
    free = shutil.disk_usage(folder).free
    found = f"{folder}: {free / _GIB:.1f} GiB free"
    if free < _LITTLE_DISK_BYTES:
        return Finding(name, found, State.NOTE, "little: checkpoints will not fit")
    return Finding(name, found)


def look() -> list[Finding]:
    """Everything that is looked at, in the order of the table."""
    return [*look_at_packages(), *look_at_gpus(), *look_around()]


def summarize(findings: Sequence[Finding]) -> str:
    """One line: whether it will do, and the versions that people ask for first."""
    found = {finding.name: finding.found for finding in findings}
    names = ("python", "torch", "megatron-core", "transformer engine", "apex", "GPUs")
    parts = [f"{name} {found[name].split(',')[0].split(';')[0]}" for name in names if name in found]
    problems = [finding.name for finding in findings if finding.state is State.WRONG]
    verdict = f"not well ({', '.join(problems)})" if problems else "well"
    return f"{verdict}: {'; '.join(parts)}"


def print_table(findings: Sequence[Finding]) -> None:
    """A row per finding, the remedy below what it mends."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.state]
        table.add_row(Text(mark, style=style), finding.name, Text(finding.found))
        if finding.remedy:
            table.add_row("", "", Text(f"-> {finding.remedy}", style="italic"))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(Text(summarize(findings)), soft_wrap=True)


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """The command ``btx doctor``: print a table or JSON, and say by the status whether it will do."""
    parser = argparse.ArgumentParser(prog="btx doctor", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args(argv)
    findings = look()
    healthy = all(finding.state is not State.WRONG for finding in findings)
    if arguments.json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"healthy": healthy, "summary": summarize(findings), "findings": rows}, indent=2))
    else:
        print_table(findings)
    return 0 if healthy else BAD_INPUT_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
