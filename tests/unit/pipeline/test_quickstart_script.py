"""The quickstart's script: what it asks of machines with and without GPUs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.runner import REPOSITORY


@pytest.mark.parametrize(("gpus", "processes"), [(0, {"1", "2"}), (1, {"1"}), (2, {"1", "2"})])
def test_a_single_gpu_is_used_by_one_process_a_stage(gpus: int, processes: set[str], tmp_path: Path):
    """NCCL wants a GPU for each process. The machine's own answer is given by a program of its name."""
    listed = "\n".join(f"echo 'GPU {number}: a card (UUID: x)'" for number in range(gpus))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{listed}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(REPOSITORY / "examples" / "quickstart.sh"), "--dry-run", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"--nproc-per-node (\d+)", done.stdout)) == processes
    assert ("--expert-model-parallel-size 2" in done.stdout) == (gpus != 1)
