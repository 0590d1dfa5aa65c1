"""Real Megatron runs for tests: start ranks through the zygote, wait, and read their metrics."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

GRACE_SECONDS = 5.0
"""How long the other ranks live on when one has failed."""
REPOSITORY = Path(__file__).resolve().parents[2]
ZYGOTE = REPOSITORY / "tests" / "support" / "zygote.py"


def gpu_count() -> int:
    """How many GPUs torch sees."""
    import torch

    return torch.cuda.device_count()


@dataclass
class Run:
    """A run that was started: its process group and its logs."""

    group: int
    log: Path
    codes: list[int] | None = None

    def text(self) -> str:
        """What all ranks printed."""
        return "\n".join(f.read_text() for f in sorted(self.log.parent.glob(self.log.name + ".*")))


@dataclass
class Zygote:
    """The forking process, and how to talk to it."""

    gpus: int = 0
    """How many GPUs its ranks may use, over NCCL; with 0 they run on the CPU, over gloo, whatever the machine has."""
    starts_by: str = field(init=False)
    """How it starts ranks: fork, or (where a fork cannot use the GPU) spawn."""
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        # Compiling Megatron's small functions in every rank would cost more than all of a pico run.
        environment = {**os.environ, "PYTHONPATH": path, "TORCH_COMPILE_DISABLE": "1"}
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        if not self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                str(REPOSITORY / "tests" / "support" / "zygote.py"),
                "gpu" if self.gpus else "cpu",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=REPOSITORY,
        )
        self.starts_by = str(self._answer("ready"))

    def _answer(self, key: str) -> object:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the zygote process ended; see its output above")
        return json.loads(line)[key]

    def _ask(self, key: str, **request: object) -> object:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer(key)

    def start(
        self,
        world_size: int,
        arguments: list[str],
        log: Path,
        entry: str = "megatron_btx.training.program",
        environment: dict[str, str] | None = None,
        file_size_limit_bytes: int | None = None,
    ) -> Run:
        """Start all ranks of a run; skip the test where NCCL would need more GPUs than there are."""
        if 0 < self.gpus < world_size:
            pytest.skip(f"{world_size} ranks over NCCL need as many GPUs, found {self.gpus}")
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {"world_size": world_size, "arguments": arguments, "log": str(log), "entry": entry}
        request["file_size_limit_bytes"] = file_size_limit_bytes
        return Run(int(self._ask("group", do="start", environment=environment or {}, **request)), log)

    def wait(self, run: Run, expect: int | None = 0, grace_seconds: float = GRACE_SECONDS) -> Run:
        """Wait for a run to end; with ``expect``, fail with the end of its log on another exit code."""
        run.codes = list(self._ask("codes", do="wait", group=run.group, grace_seconds=grace_seconds))
        # A rank that refuses ends the run: the zygote may kill the others before they have said the same.
        tolerated = {expect} if expect == 0 else {expect, -signal.SIGKILL}
        if expect is not None and (expect not in run.codes or not set(run.codes) <= tolerated):
            raise AssertionError(f"exit codes {run.codes}, expected {expect}\n{run.text()[-6000:]}")
        return run

    def run(self, world_size: int, arguments: list[str], log: Path, **named: object) -> Run:
        """Start a run and wait for it."""
        expect = named.pop("expect", 0)
        return self.wait(self.start(world_size, arguments, log, **named), expect)

    def kill_when(self, run: Run, metrics: Path, iteration: int, timeout_seconds: float = 120) -> None:
        """SIGKILL the whole run as soon as its metrics show ``iteration``."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if metrics.is_file() and max(read_losses(metrics), default=0) >= iteration:
                os.killpg(run.group, signal.SIGKILL)
                self.wait(run, expect=None)
                return
            time.sleep(0.02)
        os.killpg(run.group, signal.SIGKILL)
        raise AssertionError(f"iteration {iteration} was never reached\n{run.text()[-4000:]}")

    def warm_python(self, folder: Path) -> Path:
        """What a test can start in place of an interpreter, made in a folder with a short name; see warm_python.py."""
        script, place = folder / "python", folder / "socket"
        self._ask("serves", do="serve", socket=str(place))
        words = shlex.join([sys.executable, "-IS", str(ZYGOTE.with_name("warm_python.py")), str(place)])
        script.write_text(f'#!/bin/sh\nexport WARM_PYTHON="$0"\nexec {words} "$@"\n')
        script.chmod(0o755)
        return script

    def close(self) -> None:
        """End the zygote by closing its input."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def read_metrics(file: Path) -> dict[int, dict[str, float]]:
    """The last line of every iteration."""
    steps = {}
    for line in file.read_text().splitlines():
        try:
            step = json.loads(line)
        except ValueError:  # a line cut short by a SIGKILL
            continue
        steps[step["iteration"]] = step
    return steps


def read_losses(file: Path) -> dict[int, float]:
    """The language-model loss of every iteration, in full precision."""
    return {iteration: step["lm loss"] for iteration, step in read_metrics(file).items()}
