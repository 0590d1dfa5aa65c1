"""One runner at a time in a run directory, or jobs of its stages and who submits them.

A runner holds the lock alone. Who submits shares it; so do jobs, and a command.sh that is called by hand, which hold
one of their stage besides (``shell_locks`` in stage.py). Not every shared disk has locks, so the queue is asked as well
by btx run, and the manifest by a job.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.common.errors import InputError
from megatron_btx.recipe.names import LOCK_FILE


@contextlib.contextmanager
def lock_run(run: Path, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the run directory for a runner, or by LOCK_SH for those that submit. Raises InputError when others do."""
    with (run / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run}: another btx run, a job or a command.sh is at work here, or a btx submit; wait, or give "
                "another --output"
            ) from None
        except OSError:  # a disk without locks
            if kind == fcntl.LOCK_EX:
                raise
        yield


@contextlib.contextmanager
def take_turn(folder: Path) -> Iterator[None]:
    """Wait until nobody else holds ``folder``, and hold it; a disk without locks, or without room, keeps nobody."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context((folder / LOCK_FILE).open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another btx submit is at work in {folder.parent}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_locked(run: Path, name: str = LOCK_FILE) -> bool:
    """Whether a runner is at work in ``run``; writes nothing, because a run may be looked at that is not ours."""
    if not (run / name).is_file():  # opening a pipe would wait forever
        return False
    try:
        with (run / name).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)  # not on a disk without locks
    return False
