"""What tests start in place of an interpreter ends as one: its status, its signals, and nothing is left of it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support import pico
from tests.support.runner import Zygote


def programs_of(zygote: Zygote) -> int:
    """How many processes the zygote and its server have."""
    return len(psutil.Process(zygote.process.pid).children(recursive=True))


@pytest.mark.parametrize("words", ["-m megatron_btx.pretrain", "-u -P -W ignore -m megatron_btx.pretrain"])
def test_a_refusal_is_the_programs(words: str, warm_python: Path, tmp_path: Path) -> None:
    done = subprocess.run([warm_python, *words.split()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: missing: --num-layers") and not done.stdout


def test_what_is_no_program_of_ours_is_run_by_python(warm_python: Path, tmp_path: Path) -> None:
    command = [warm_python, "-c", "import os, sys; print(os.getcwd(), *sys.argv[1:])", "a b"]
    assert subprocess.check_output(command, cwd=tmp_path, text=True) == f"{tmp_path} a b\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_program_too(
    number: signal.Signals, warm_python: Path, zygote: Zygote, corpus: Path, tmp_path: Path
) -> None:
    """One that cannot be passed on as well."""
    if zygote.gpus:
        pytest.skip("with GPUs it is the interpreter")
    before = programs_of(zygote)
    metrics = tmp_path / "metrics.jsonl"
    command = [warm_python, "-m", "megatron_btx.pretrain", *pico.train(corpus, 100_000, metrics)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while not metrics.is_file():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        assert programs_of(zygote) > before
        process.send_signal(number)
        assert process.wait(30) == -number
    deadline = time.monotonic() + 10
    while programs_of(zygote) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert programs_of(zygote) == before
