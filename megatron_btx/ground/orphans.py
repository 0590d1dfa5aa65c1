"""No process outlives its run: a rank ends with the torchrun that started it, and its helpers end with the rank.

A killed torchrun leaves its ranks training on. Started again, two runs save over each other. A killed rank leaves the
processes that write its checkpoints and read its data, some 500 MB each. Linux alone; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import multiprocessing.util
import os
import signal
import sys
import threading
import time

_LOOK_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 120.0
"""How long a rank that was asked to end (Megatron's handler then saves) may take."""
_PR_SET_PDEATHSIG = 1


class _Forks:
    """Whether the last fork was made by the main thread: the death signal comes when the *thread* that forked ends."""

    by_main_thread = True

    def note(self) -> None:
        """Called before a fork, in the process that forks."""
        self.by_main_thread = threading.current_thread() is threading.main_thread()


_forks = _Forks()


def leave_no_orphans() -> None:
    """Tie this process to the torchrun that started it, and those that it will start by multiprocessing to itself."""
    if not sys.platform.startswith("linux"):
        return
    os.register_at_fork(before=_forks.note)
    multiprocessing.util.register_after_fork(_forks, _end_with_parent)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()


def _end_with_parent(forks: _Forks) -> None:
    """In a process that multiprocessing has forked: end when the one that forked it has ended."""
    if forks.by_main_thread:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch_launcher(launcher: int) -> None:
    """End this process when torchrun is gone: another process has then become its parent."""
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY_SECONDS)
    print("torchrun is gone; this process ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
