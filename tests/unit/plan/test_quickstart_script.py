"""The quickstart's script: its texts, and what it asks of machines with and without GPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.quickstart_texts import FOLDER
from tests.support.runner import REPOSITORY

BTX = """#!{python}
import sys

from megatron_btx.cli import main

sys.executable = "{warm_python}"
sys.exit(main())
"""


@pytest.fixture(scope="module")
def checkout(warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script in a tree of its own, whose environment is ready: it writes there, not in this checkout.

    What btx starts there is started warm.
    """
    tree = tmp_path_factory.mktemp("checkout")
    shutil.copytree(REPOSITORY / "examples", tree / "examples")
    (tree / "tools").mkdir()
    (tree / "tools" / "environment.sh").write_text("true\n")
    programs = tree / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "btx").write_text(BTX.format(python=sys.executable, warm_python=warm_python))
    for program in programs.iterdir():
        program.chmod(0o755)
    return tree


@pytest.mark.parametrize(("gpus", "processes"), [(0, {"1", "2"}), (1, {"1"}), (2, {"1", "2"})])
def test_a_single_gpu_is_used_by_one_process_a_stage(
    gpus: int, processes: set[str], checkout: Path, tmp_path: Path
) -> None:
    """NCCL wants a GPU for each process. The machine's own answer is given by a program of its name."""
    listed = "\n".join(f"echo 'GPU {number}: a card (UUID: x)'" for number in range(gpus))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{listed}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TEXT_SCALE": "0.1"}
    command = ["bash", str(checkout / "examples" / "quickstart.sh"), "--dry-run", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"--nproc-per-node (\d+)", done.stdout)) == processes
    assert ("--expert-model-parallel-size 2" in done.stdout) == (gpus != 1)
    # Texts that are there already are taken as they are.
    assert ("nothing to do" in done.stdout) == (gpus > 0)
    assert (checkout / FOLDER / "math.train.jsonl").is_file()
