"""One rank that must stop stops all: the others wait for it inside a collective and cannot be told by another.

Only the ranks that read data see that a batch is unusable. So every rank has a thread that looks into the store by
which the ranks met, once a second. The rank that must stop leaves its reason there; each other one says it, too, and
ends at once, from wherever it waits. Nothing is saved on the way.

The same thread finds a run that stands still. A rank that hangs (a dead disk, a stopped process, a machine that is
gone) lets all others wait in a collective, until the backend ends each with a traceback of where it waited. So a rank
whose main thread has stood at the same instruction for ``--distributed-timeout-minutes`` leaves its place in the store.
Who left none is named first, then who stands anywhere else than in a collective.
"""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import re
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from megatron_btx.common.errors import (
    BAD_INPUT_EXIT_CODE,
    MACHINE_EXIT_CODE,
    BTXError,
    MachineError,
    is_of_the_machine,
    print_error,
)

AGAIN = "Start the same command again; it goes on from its last checkpoint"

_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
_WAITS = re.compile(r"\b(wait|synchronize|item|tolist|barrier|all_reduce|all_gather|recv|send)\w*\(")
"""What a line of source has in it that waits for other ranks, or for a GPU that does."""


class Place(NamedTuple):
    """Where a rank's main thread stands."""

    rank: int
    host: str
    process: int
    where: str
    """The innermost function, with its file and line."""
    waits: bool
    """Whether it is in a collective, or waits for a GPU."""


class Standstill:
    """Looks at a thread: how long it has been at one instruction, and where."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._stack: tuple[tuple[int, int], ...] = ()
        self._since = time.monotonic()

    def moved(self) -> None:
        """The thread says itself that it got on: a step that is nearly all one collective looks alike every time."""
        self._since = time.monotonic()

    def seconds(self) -> float:
        """How long every look has found the thread at the same instruction of the same calls, without a word of it."""
        stack = []
        frame: FrameType | None = self._frame()
        while frame is not None:
            stack.append((id(frame), frame.f_lasti))
            frame = frame.f_back
        if tuple(stack) != self._stack:
            self._stack = tuple(stack)
            self._since = time.monotonic()
        return time.monotonic() - self._since

    def place(self, rank: int) -> Place:
        """Where the thread is now."""
        frame = self._frame()
        file, line = frame.f_code.co_filename, frame.f_lineno
        waits = _COLLECTIVES in file or bool(_WAITS.search(linecache.getline(file, line)))
        return _place(rank, frame.f_code.co_qualname, file, line, waits)

    def _frame(self) -> FrameType:
        return sys._current_frames()[self._thread.ident or 0]


def _place(rank: int, function: str, file: str, line: int, waits: bool) -> Place:
    where = f"{function} ({'/'.join(Path(file).parts[-3:])}:{line})"
    return Place(rank, socket.gethostname(), os.getpid(), where, waits)


def describe(places: list[Place], world: int, seconds: float) -> str | None:
    """One line that names who hangs; None where nobody waits for anybody, so that nothing is wrong.

    Args:
        places: of the ranks that have left one.
        world: how many ranks there are.
    """
    waiting = [place for place in places if place.waits]
    if not waiting:
        return None
    known = {place.rank for place in places}
    silent = [rank for rank in range(world) if rank not in known]
    named = []
    if silent:
        named.append(f"{_ranks(silent)}: no word, its process or its machine is stopped or gone")
    for place in places:
        if not place.waits:
            named.append(f"rank {place.rank} ({place.host}, process {place.process}): hangs in {place.where}")
    named.append(f"{_ranks([place.rank for place in waiting])}: waiting in {waiting[0].where}")
    return f"the run has stood still for {seconds:.0f} s (--distributed-timeout-minutes): {'; '.join(named)}. {AGAIN}"


def _ranks(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 8:
        return f"{len(numbers)} ranks ({', '.join(map(str, numbers[:8]))}, ...)"
    return f"ranks {', '.join(map(str, numbers))}"


_KEY, _SEEN, _PLACE = "megatron_btx/stop", "megatron_btx/stopped", "megatron_btx/place"
_LOOK_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 20.0
"""How long a rank waits for the others to have seen the reason before it goes."""
_KEEP_STORE_SECONDS = 1.0
"""How much longer rank 0 stays, which can keep the store: a rank that finds it gone spends seconds on a report."""
_REASON_SECONDS = 3.0
"""How long after a lost connection another rank's reason may come to be seen."""
_LATE_SECONDS = 5.0
"""How much later than the first another rank may find that it stands still."""

_TIMED_OUT, _LOST = "Timed out waiting", "by peer"
"""What gloo says when a rank did not come, and when its connection is closed or reset (``transport/tcp``)."""


class Stopping:
    """The connection of this rank to the others; nothing where there are none."""

    def __init__(self) -> None:
        self._store: Any = None
        self._done = threading.Event()
        self._standstill = Standstill(threading.main_thread())
        self._still_since: float | None = None
        self._leaving = False
        self._timed_out: Place | None = None
        """Where a collective of the main thread has timed out."""
        self.standstill_seconds = float("inf")
        """How long a run may stand still; the backend's own timeout."""

    def watch(self) -> None:
        """Begin to look whether another rank must stop; once the process group is there, and only the first time."""
        import torch.distributed as distributed

        if self._store is not None or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        # A connection of its own: the first one is locked while somebody waits for a value.
        self._store = distributed.distributed_c10d._get_default_store().clone()
        self._world, self._rank = distributed.get_world_size(), distributed.get_rank()
        threading.Thread(target=self._look, name="stopping", daemon=True).start()

    def end(self) -> None:
        """Look no more: the run is over, and the store may go."""
        self._done.set()

    def moved(self) -> None:
        """This rank got on: it has begun another micro-batch."""
        self._standstill.moved()

    def stop_all(self, reason: BTXError) -> None:
        """Tell the others why this rank stops, wait until they know, and end as they do.

        A rank that is alone comes back: its caller raises the reason.
        """
        self._done.set()
        if self._store is None:
            return
        self._tell_and_leave(reason, self._world)

    def leave_all(self, reason: BTXError) -> None:
        """The same from another thread, where the main one may wait for ever; a rank that is alone ends, too."""
        if self._done.is_set():  # the run is over, or ends with a reason of its own
            return
        self.stop_all(reason)
        self._leave(str(reason), is_of_the_machine(reason), ranks=1)

    def explain(self, failure: RuntimeError) -> MachineError | None:
        """What to say of a collective that failed because another rank is gone; None of any other failure.

        After a timeout the thread names the rank that hangs and ends this process. It cannot where the store answers
        no more: then the process that keeps it is the one that is gone.
        """
        if self._store is None:
            return None
        if _LOST in str(failure):
            # The lost one may have left its reason: then the thread says that, and ends this process.
            time.sleep(_REASON_SECONDS)
            while self._leaving:
                time.sleep(_LOOK_EVERY_SECONDS)
            return MachineError(
                "the connection to another rank is lost: its process has ended or was killed, and its own log or the "
                f"launcher says why. {AGAIN}"
            )
        if _TIMED_OUT not in str(failure):
            return None
        last = traceback.extract_tb(failure.__traceback__)[-1]
        self._timed_out = _place(self._rank, last.name, last.filename, last.lineno or 0, waits=True)
        time.sleep(3 * _LATE_SECONDS)
        return MachineError(
            "the run stands still, and rank 0, by which all met, gives no word: its process or its machine is stopped "
            f"or gone. {AGAIN}"
        )

    def _look(self) -> None:
        while not self._done.wait(_LOOK_EVERY_SECONDS):
            try:
                if not self._store.check([_KEY]):
                    self._look_for_standstill()
                    continue
                message = self._store.get(_KEY)
            except RuntimeError:  # the store is gone, with the rank that kept it
                return
            if self._done.is_set():  # this rank speaks for itself
                return
            if message:  # the store of --fake-process-group has every key, and nothing in it
                self._leave(**json.loads(message))
            return

    def _look_for_standstill(self) -> None:
        """Leave this rank's place when it stands still; end the run when it is known who hangs."""
        still = self._standstill.seconds() >= self.standstill_seconds
        if not still and self._timed_out is None:
            if self._still_since is not None:
                self._store.delete_key(f"{_PLACE}/{self._rank}")
            self._still_since = None
            return
        if self._still_since is None:
            self._still_since = time.monotonic()
            place = self._timed_out or self._standstill.place(self._rank)
            self._store.set(f"{_PLACE}/{self._rank}", json.dumps(place))
        if time.monotonic() - self._still_since < _LATE_SECONDS:
            return
        places = []
        for rank in range(self._world):
            if self._store.check([f"{_PLACE}/{rank}"]):
                places.append(Place(*json.loads(self._store.get(f"{_PLACE}/{rank}"))))
        reason = describe(places, self._world, self.standstill_seconds)
        if reason is not None:
            self._done.set()
            self._tell_and_leave(MachineError(reason), len(places))

    def _tell_and_leave(self, reason: BTXError, ranks: int) -> None:
        """Leave the reason for the others, and end when so many ranks have seen it."""
        message = {"reason": str(reason), "is_machine": is_of_the_machine(reason), "ranks": ranks}
        self._store.set(_KEY, json.dumps(message))
        self._leave(**message)  # type: ignore[arg-type]

    def _leave(self, reason: str, is_machine: bool, ranks: int) -> None:
        """Say the reason and end at once: an orderly end would wait for ranks that are no more."""
        self._leaving = True
        print_error(reason)
        sys.stdout.flush()
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # all have seen it, and the store has gone
                self._wait_for(ranks)
        os._exit(MACHINE_EXIT_CODE if is_machine else BAD_INPUT_EXIT_CODE)

    def _wait_for(self, ranks: int) -> None:
        """Wait until so many have seen the reason."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        seen = self._store.add(_SEEN, 1)
        while seen < ranks and time.monotonic() < deadline:
            time.sleep(0.05)
            seen = self._store.add(_SEEN, 0)
        if self._rank == 0:
            time.sleep(_KEEP_STORE_SECONDS)
