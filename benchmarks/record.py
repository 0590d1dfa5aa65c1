"""Put what the steps of gpu_suite.sh left in a folder together: record.json, and record.md to read.

    python benchmarks/record.py FOLDER

Reads FOLDER/steps.tsv (a line per step: name, exit code, seconds), the JUnit files of the tests and training.json, adds
what the machine is, and removes what it has read. Whatever is missing is said to be missing; nothing is typed in.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "triton", "numpy", "transformer-engine", "apex", "nvidia-nccl-cu13")


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    gpus = output_of(
        "nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm", "--format=csv,noheader"
    )
    return {
        "gpus": gpus.splitlines() if gpus else [],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": next(
            (line.partition(": ")[2] for line in cpu_lines if line.startswith("model name")), platform.machine()
        ),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": output_of("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(output_of("git", "status", "--porcelain")),
    }


def tests(file: Path) -> list[dict[str, Any]]:
    """Every test of a JUnit file: its result, its reason where it has one, and the numbers it recorded."""
    found = []
    for case in ElementTree.parse(file).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        message = "" if outcome is None else outcome.get("message", "")
        found.append(
            {
                "name": case.get("name"),
                "result": "passed" if outcome is None else outcome.tag,
                "reason": message.splitlines()[0] if message else "",
                "seconds": float(case.get("time", "nan")),
                "numbers": {p.get("name"): p.get("value") for p in case.iter("property")},
            }
        )
    return found


def collect(folder: Path) -> dict[str, Any]:
    """The whole record."""
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    training = folder / "training.json"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "steps": [{"name": name, "exit_code": int(code), "seconds": int(s)} for name, code, s in steps],
        "tests": {file.stem: tests(file) for file in sorted(folder.glob("*.xml"))},
        "training": json.loads(training.read_text()) if training.exists() else None,
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as text and tables, rounded for reading; record.json has the full numbers."""
    at = record["machine"]
    training = record["training"]
    title = "CPU dry run, not a result" if not training or training["dry_run"] else training["device"]
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in at["versions"].items())
    lines = [f"# {title}, {record['date']}", ""]
    lines += [f"- GPU: {gpu} (name, memory, driver, highest clock)" for gpu in at["gpus"]] or ["- GPU: none"]
    lines += [f"- CPU: {at['cpu']}, {at['cores']} cores, Linux {at['kernel']}"]
    lines += [f"- Python {at['python']}, CUDA {at['cuda']}, {versions}"]
    changes = " with uncommitted changes" if at["uncommitted_changes"] else ""
    lines += [f"- commit {at['commit'] or 'unknown'}{changes}", "", "| step | exit code | seconds |", "|---|---|---|"]
    lines += [f"| {s['name']} | {s['exit_code']} | {s['seconds']} |" for s in record["steps"]]
    lines += ["", "Numbers below are rounded; record.json has them in full.", "", *training_table(training)]
    for name, cases in record["tests"].items():
        lines += ["", f"## {name}", "", "| test | result | numbers or reason |", "|---|---|---|"]
        for case in cases:
            numbers = "; ".join(f"{key}: {value}" for key, value in case["numbers"].items())
            said = "; ".join(filter(None, [numbers, case["reason"]])).replace("|", "/")
            lines.append(f"| {case['name']} | {case['result']} | {said} |")
    return "\n".join(lines) + "\n"


def training_table(training: dict[str, Any] | None) -> list[str]:
    """Speed per model, and what the columns mean."""
    if training is None:
        return ["Training speed was not measured."]
    columns = "model | layers | micro-batch | tokens/s | step s (quartiles) | TFLOP/s per GPU | MFU | peak memory GB"
    lines = ["## Training", "", f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    for run in training["runs"]:
        start = f"| {run['model']} | {run['shape']['layers']} | {run['micro_batch']} |"
        if "failure" in run:
            lines.append(f"{start} {run['failure']} | | | | |")
            continue
        step = run["step_seconds"]
        lines.append(
            f"{start} {run['tokens_per_second']:.0f} | {step['median']:.4f} ({step['lower_quartile']:.4f} to "
            f"{step['upper_quartile']:.4f}) | {run['tflops_per_gpu']:.1f} | {100 * run['mfu']:.1f} % | "
            f"{run['peak_memory_bytes'] / 1e9:.1f} |"
        )
    peak = training["peak_flops_per_gpu"] / 1e12
    lines += ["", f"{training['gpus']} GPUs. FLOPs {training['flops_formula']}. MFU is of {peak:.1f} TFLOP/s: "]
    lines[-1] += f"{training['peak_is']}. A matrix product alone ran at {training['measured_matmul_flops'] / 1e12:.1f}."
    if training["dry_run"]:
        lines += ["", "**CPU dry run, not a result**: a pico model, to test the suite itself."]
    return lines


def main() -> int:
    """Write record.json and record.md into the folder named on the command line."""
    folder = Path(sys.argv[1])
    record = collect(folder)
    (folder / "record.json").write_text(json.dumps(record, indent=1))
    (folder / "record.md").write_text(markdown(record))
    for read in (folder / "steps.tsv", folder / "training.json", *folder.glob("*.xml")):
        read.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
