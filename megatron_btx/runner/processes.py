"""The processes of a run, found by a mark in their environment, and ended.

torchrun starts its workers in sessions of their own, and a worker that is killed leaves its checkpoint writers behind,
so neither a parent nor a process group leads to all of them. Their environment does: it is inherited by everything.

Run as a program (``processes.py MARK``), it is a run's guard: it waits until its standard input closes, which happens
however the runner ends, SIGKILL included, and then ends what is left of the marked processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK_VARIABLE = "BTX_STAGE"
GRACE_SECONDS = 5.0
"""Between asking processes to end and killing them; torchrun hands the request on to its workers."""
_POLL_SECONDS = 0.05


def mark_of(run: Path) -> str:
    """What the marks of all processes of a run begin with. A hash, because one path may begin with another."""
    return f"{hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:32]}:"


def marked(prefix: str) -> list[psutil.Process]:
    """The processes of this user whose mark starts with ``prefix``, this one excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK_VARIABLE, "").startswith(prefix):
                found.append(process)
    return found


def end_marked(prefix: str, grace_seconds: float = GRACE_SECONDS) -> int:
    """End every process whose mark starts with ``prefix`` and return how many there were at first.

    SIGTERM, and after the grace period SIGKILL, until none is left: one that ends may have started another. None is
    waited for, because that would take the exit status of our own children away from whoever started them.
    """
    processes = marked(prefix)
    count = len(processes)
    deadline = time.monotonic() + grace_seconds
    _signal(processes, signal.SIGTERM)
    while processes and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        processes = marked(prefix)
    while processes:
        _signal(processes, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
        processes = marked(prefix)
    return count


@contextlib.contextmanager
def guard(prefix: str) -> Iterator[None]:
    """While it lasts, another process waits to end every process whose mark starts with ``prefix`` after this one."""
    command = [sys.executable, "-P", __file__, prefix]
    waiting = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        waiting.communicate()


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_marked(sys.argv[1])
