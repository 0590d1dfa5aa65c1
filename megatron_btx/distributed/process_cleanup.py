"""No process outlives its run: a rank ends with the torchrun that started it, and its helpers end with the rank.

A killed torchrun leaves its ranks training on. Started again, two runs save over each other. A killed rank leaves the
processes that write its checkpoints and read its data, some 500 MB each.

Helpers do not end by the signal of ``--exit-signal-handler``: a scheduler sends it to all, and the rank still saves. So
the SIGTERM does nothing by which Python ends them and then waits without limit; :func:`end_helpers` comes before.
"""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import sys
import threading
import time
from typing import Any

_LOOK_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 120.0
"""How long a rank that was asked to end (Megatron's handler then saves) may take."""


def leave_no_orphans() -> None:
    """Tie this process to the torchrun that started it, and those that it will start by multiprocessing to itself."""
    multiprocessing.util.register_after_fork(end_with_parent, end_with_parent)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()


def end_with_parent(*_: Any) -> None:
    """In a process that multiprocessing has started: end when the one that started it has ended."""
    threading.Thread(target=_watch_parent, name="parent", daemon=True).start()


def _watch_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]  # it has one
    os.kill(os.getpid(), signal.SIGKILL)


def end_helpers() -> None:
    """End the processes that read data and write checkpoints."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise that a reader is lost
    for helper in multiprocessing.active_children():
        if helper.daemon:
            helper.kill()


def _watch_launcher(launcher: int) -> None:
    """End this process when torchrun is gone: another process has then become its parent."""
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY_SECONDS)
    print("torchrun is gone; this process ends", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
