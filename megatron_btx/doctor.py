"""``btx doctor``: whether this machine, or this container, has what training needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_btx.common.errors import BAD_INPUT_EXIT_CODE, exits_with_one_line
from megatron_btx.common.manifest import version_of
from megatron_btx.engine.cuda_check import KERNELS

_DESCRIPTION = """
Say whether this machine, or this container, has what training needs: packages, GPUs and the kernels for them, a folder
for temporary files. Nothing is changed. The status is 2 if something that is needed is missing or cannot be used, else
0; a library for GPUs that cannot be loaded on a machine without one, such as a login node, is no reason.
"""
PACKAGE = "megatron-btx"
INSTALL = "bash tools/environment.sh"
PROBE = "megatron_btx.engine.cuda_check"
PROBE_SECONDS = 180
"""A first start from a shared file system takes a minute; this is for a library that hangs."""
GOOD, ABSENT, NOTE, WRONG = "good", "absent", "note", "wrong"
"""What a finding means; absent: not there, and everything works without it. Wrong alone is a reason for status 2."""


class Finding(NamedTuple):
    """What was found, and if it is wrong, what helps."""

    name: str
    found: str
    """A version, a number, a path."""
    state: str = GOOD
    remedy: str = ""


def look_at_packages() -> Iterator[Finding]:
    """Python, this package, and everything that its own metadata asks for."""
    from packaging.requirements import Requirement

    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    if version_of(PACKAGE) is None:
        yield Finding(PACKAGE, "imported and not installed", WRONG, INSTALL)
        return
    for text in (PACKAGE, *(importlib.metadata.requires(PACKAGE) or ())):
        if "extra ==" in text:
            continue
        requirement = Requirement(text)
        name, version = requirement.name, version_of(requirement.name)
        if version is None:
            yield Finding(name, "missing", WRONG, f"{requirement}: {INSTALL}")
        # An image's own torch calls itself a pre-release: 2.13.0a0+9186a08.
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, version, WRONG, f"needs {requirement.specifier}: {INSTALL}")
        else:
            yield Finding(name, version)


def look_at_gpus() -> Iterator[Finding]:
    """The GPUs that torch sees, and what runs on them; torch answers from a process of its own."""
    facts, problem = ask_torch()
    if problem:
        yield Finding("torch", problem, WRONG, INSTALL)
        return
    gpus = facts["gpus"]
    yield Finding("torch", f"{facts['version']}, CUDA {facts['cuda']}, NCCL {facts['nccl']}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus:
        yield Finding("GPUs", f"{len(gpus)} x {gpus[0]}")
    elif not has_driver():
        yield Finding("GPUs", "none; training runs on the CPU, and only to try things", NOTE)
    elif hidden is not None:
        yield Finding("GPUs", f"none, by CUDA_VISIBLE_DEVICES={hidden}", NOTE)
    else:
        remedy = "the driver is older than this CUDA, or this torch is for CPUs; take the image that suits the driver"
        yield Finding("GPUs", "torch sees none, the driver has some", WRONG, remedy)
    for module, name in KERNELS.items():
        problem = facts["modules"][module]
        if problem is None:
            remedy = "the image of the Dockerfile has it; training works without it, more slowly"
            yield Finding(name, "absent", ABSENT, remedy)
        elif not problem:
            yield Finding(name, version_of(name) or "of unknown version")
        elif gpus:
            remedy = "it was built for another torch: take the image's own, or remove it"
            yield Finding(name, problem, WRONG, remedy)
        else:
            yield Finding(name, f"not loaded without a GPU ({problem})", NOTE)


def ask_torch() -> tuple[dict[str, Any], str]:
    """What the probe says, and why it says nothing; empty where it does."""
    command = [sys.executable, "-P", "-m", PROBE]
    environment = {**os.environ, "NVTE_DEBUG": "0"}
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {PROBE_SECONDS} s"
    lines = answer.stdout.splitlines()
    if answer.returncode or not lines:
        said = answer.stderr.strip().splitlines() or ["nothing"]
        return {}, f"ended with status {answer.returncode}, saying: {said[-1]}"
    return dict(json.loads(lines[-1])), ""


def has_driver() -> bool:
    """Whether the driver itself knows a GPU."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def look_at_folder() -> Finding:
    """Whether temporary files can be made: tried, because permissions say nothing of read-only mounts and quotas."""
    folder = os.environ.get("TMPDIR") or "/tmp"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
    except OSError:
        return Finding("temporary", f"{folder}: not writable", WRONG, "export TMPDIR=FOLDER, a writable and local one")
    return Finding("temporary", folder)


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """The command ``btx doctor``: print a table or JSON, and say by the status whether it will do."""
    parser = argparse.ArgumentParser(prog="btx doctor", description=_DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args(argv)
    findings = [*look_at_packages(), *look_at_gpus(), look_at_folder()]
    problems = [finding.name for finding in findings if finding.state == WRONG]
    if arguments.json:
        rows = [finding._asdict() for finding in findings]
        print(json.dumps({"healthy": not problems, "findings": rows}, indent=2))
    else:
        from megatron_btx.common.table import print_table  # rich, which --help does not need

        rows_shown = [(finding.state, finding.name, finding.found, finding.remedy) for finding in findings]
        print_table(("", "what", "found", "remedy"), rows_shown)
        print(f"not well: {', '.join(problems)}" if problems else "well")
    return BAD_INPUT_EXIT_CODE if problems else 0


if __name__ == "__main__":
    sys.exit(main())
