"""A run that stands still: which rank hangs, and which wait for it.

A rank that hangs (a dead disk, a stopped process, a machine that is gone) lets all others wait in a collective. After
``--distributed-timeout-minutes`` the backend ends them, each with a traceback of where it waited. None names the one
that did not come. Here every rank's own thread looks once a second where its main thread is. One that has stood at the
same instruction for that time leaves its place in the store by which the ranks met. Who left none is named first, then
who stands anywhere else than in a collective.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

AGAIN = "Start the same command again; it goes on from its last checkpoint"

_COLLECTIVES = f"{os.sep}torch{os.sep}distributed{os.sep}"
_WAITS = re.compile(r"\b(wait|synchronize|item|tolist|barrier|all_reduce|all_gather|recv|send)\w*\(")
"""What a line of source has in it that waits for other ranks, or for a GPU that does."""


@dataclass(frozen=True)
class Place:
    """Where a rank's main thread stands."""

    rank: int
    host: str
    process: int
    where: str
    """The innermost function, with its file and line."""
    waits: bool
    """Whether it is in a collective, or waits for a GPU."""

    def pack(self) -> str:
        """The place as the store holds it."""
        return json.dumps(asdict(self))

    @staticmethod
    def unpack(text: bytes) -> Place:
        """The place that :meth:`pack` made ``text`` of."""
        return Place(**json.loads(text))


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
        frame = self._frame()
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
        if frame is None:
            return Place(rank, socket.gethostname(), os.getpid(), "nowhere", waits=False)
        file, line = frame.f_code.co_filename, frame.f_lineno
        waits = _COLLECTIVES in file or bool(_WAITS.search(linecache.getline(file, line)))
        return Place(rank, socket.gethostname(), os.getpid(), _where(frame.f_code.co_qualname, file, line), waits)

    def place_of(self, failure: BaseException, rank: int) -> Place:
        """Where a collective failed that has waited too long."""
        last = traceback.extract_tb(failure.__traceback__)[-1]
        where = _where(last.name, last.filename, last.lineno or 0)
        return Place(rank, socket.gethostname(), os.getpid(), where, waits=True)

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._thread.ident or 0)


def _where(function: str, file: str, line: int) -> str:
    return f"{function} ({'/'.join(Path(file).parts[-3:])}:{line})"


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
