"""One runner at a time in a run directory, or jobs of its stages.

A runner holds the lock alone. Jobs, and a command.sh that is called by hand, share it and hold one of their stage
(``shell_locks`` in stage.py). Not every shared disk has locks, so the queue is asked as well by btx run, and the
manifest by a job.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.directory import LOCK_FILE


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run directory for this process. Raises InputError when another one does."""
    with (run / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run}: another btx run, a job or a command.sh is at work here; wait, or give --output"
            ) from None
        yield


def is_locked(run: Path) -> bool:
    """Whether a runner is at work in ``run``; writes nothing, because a run may be looked at that is not ours."""
    if not (run / LOCK_FILE).is_file():  # opening a pipe would wait forever
        return False
    try:
        with (run / LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
