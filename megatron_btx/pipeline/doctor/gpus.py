"""GPUs, torch's CUDA and NCCL, and the kernels that an image brings. torch answers from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from megatron_btx.pipeline.doctor.commands import answer_of
from megatron_btx.pipeline.doctor.finding import Finding, State, absent, wrong
from megatron_btx.pipeline.doctor.packages import INSTALL, version_of

PROBE = "megatron_btx.engine.probe"
PROBE_SECONDS = 180
"""A first start from a shared file system takes a minute; this is for a library that hangs."""
KERNELS = (
    ("transformer_engine.pytorch", "transformer engine", "transformer-engine"),
    ("amp_C", "apex", "apex"),
    ("flash_attn", "flash attention", "flash-attn"),
)
"""Module, what it is called, package."""
IMAGE = "the image of the Dockerfile has it; training works without it, more slowly"


def look_at_gpus() -> Iterator[Finding]:
    """The driver's GPUs, torch's, and what runs on them."""
    listed = _gpus_of_driver()
    yield listed
    facts, problem = ask_torch()
    if facts is None:
        yield wrong("gpu", "torch", problem, INSTALL)
        return
    torch = facts["torch"]
    yield Finding("gpu", "torch", torch["version"])
    yield Finding("gpu", "cuda", torch["cuda"]) if torch["cuda"] else absent("gpu", "cuda", "this torch is for CPUs")
    yield Finding("gpu", "nccl", torch["nccl"]) if torch["nccl"] else absent("gpu", "nccl")
    yield _gpus_of_torch(torch["gpus"], listed.state is State.GOOD)
    for module, name, package in KERNELS:
        yield _kernels(name, version_of(package), facts["modules"].get(module), bool(torch["gpus"]))


def ask_torch() -> tuple[dict[str, Any] | None, str]:
    """What the probe says, or why it says nothing."""
    try:
        answer = subprocess.run(
            [sys.executable, "-m", PROBE],
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


def _gpus_of_driver() -> Finding:
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = answer_of(asked).splitlines()
    if not lines:
        return Finding("gpu", "driver", "no GPU, or no nvidia-smi", State.ABSENT)
    return Finding("gpu", "driver", lines[0].split(",")[-1].strip())


def _gpus_of_torch(gpus: list[str], driver_has: bool) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus:
        return Finding("gpu", "GPUs", f"{len(gpus)} x {gpus[0]}")
    if driver_has and hidden is None:
        remedy = "the driver is older than this CUDA, or this torch is for CPUs; take the image that suits the driver"
        return wrong("gpu", "GPUs", "torch sees none, the driver has some", remedy)
    found = "none; training runs on the CPU, and only to try things"
    if driver_has:
        found = f"none, by CUDA_VISIBLE_DEVICES={hidden}"
    return Finding("gpu", "GPUs", found, State.NOTE)


def _kernels(name: str, version: str | None, problem: str | None, has_gpu: bool) -> Finding:
    """A library of kernels: its version, and whether it can be imported where there is a GPU to use it."""
    if problem == "absent":
        if version is None:
            return absent("gpu", name, IMAGE)
        return Finding("gpu", name, f"{version}, without its kernels (another package of that name?)", State.NOTE)
    found = version or "of unknown version"
    if problem is None:
        return Finding("gpu", name, found)
    if not has_gpu:
        return Finding("gpu", name, f"{found}; not loaded without a GPU ({problem})", State.NOTE)
    return wrong(
        "gpu", name, f"{found}: {problem}", "it was built for another torch: take the image's own, or remove it"
    )
