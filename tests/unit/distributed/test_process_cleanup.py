"""A helper ends with the process that started it, however it was started, and not by the exit signal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest

from megatron_btx.distributed import process_cleanup as orphans
from megatron_btx.engine import saving
from tests.support.runner import REPOSITORY

AT_MOST_SECONDS = 20
async_utils = "megatron.core.dist_checkpointing.strategies.async_utils"


def sleep_long() -> None:
    """Says that it is there, and stays."""
    print(os.getpid(), flush=True)
    time.sleep(300)


def write_as_told() -> None:
    """The writer of --async-save on a GPU, with another loop in the place of Megatron's."""
    loop = types.SimpleNamespace(async_loop=sleep_long)
    sys.modules[async_utils] = types.SimpleNamespace(PersistentAsyncCaller=loop)
    saving.write(signal.SIGTERM)


def start(method: str) -> None:
    """Be a rank with ``--exit-signal-handler`` and one helper."""
    orphans.leave_no_orphans()
    signal.signal(signal.SIGTERM, lambda *_: None)
    target = {"fork": sleep_long, "spawn": write_as_told}[method]
    multiprocessing.get_context(method).Process(target=target, daemon=True).start()
    sys.stdin.readline()
    orphans.end_helpers()


def is_gone(process: psutil.Process) -> bool:
    deadline = time.monotonic() + AT_MOST_SECONDS
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("end", ["killed", "orderly"])
def test_a_helper_ends_with_its_rank(method, end):
    """Killed, it leaves nothing; at its own end it does not wait for a helper that hears no SIGTERM."""
    command = [
        sys.executable,
        "-c",
        f"from tests.unit.distributed import test_process_cleanup; test_process_cleanup.start({method!r})",
    ]
    rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        helper = psutil.Process(int(rank.stdout.readline()))
        helper.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE
        if end == "killed":
            rank.kill()
        else:
            rank.stdin.write("\n")
            rank.stdin.flush()
        assert is_gone(helper)
        rank.wait(AT_MOST_SECONDS)
    finally:
        rank.kill()
