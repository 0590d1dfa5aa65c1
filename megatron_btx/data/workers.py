"""Units of work in several processes, their results in the units' order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_btx.common.errors import InputError, MachineError
from megatron_btx.data.readers import Unit

_UNITS_IN_FLIGHT_PER_WORKER = 4


class _Worker:
    """A worker process's own function, put there once by the fork instead of with every unit."""

    encode: Callable[[Unit], Any]

    @classmethod
    def start(cls, encode: Callable[[Unit], Any]) -> None:
        """Called in the new process. An interrupt is the parent's to answer, in one line."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        cls.encode = staticmethod(encode)

    @classmethod
    def run(cls, unit: Unit) -> Any:
        """Called in the process for every unit."""
        return cls.encode(unit)


def check_workers(workers: int) -> None:
    """Refuse a number of worker processes that is none; raises InputError."""
    if workers < 1:
        raise InputError(f"--workers {workers}: expected at least 1")


def in_order[Encoded](
    stack: contextlib.ExitStack, encode: Callable[[Unit], Encoded], workers: int
) -> Callable[[Iterator[Unit]], Iterator[Encoded]]:
    """A function that encodes units and gives the results in the units' order, here or in worker processes.

    The processes start now and end with the stack. What a worker raises is raised here; a worker that dies is a
    MachineError with the signal.
    """
    if workers == 1:
        return lambda units: map(encode, units)
    # Rust threads of Hugging Face tokenizers would fight over the cores that the processes use already.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    strangers = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _Worker.start, (encode,))
    stack.callback(pool.shutdown, cancel_futures=True)
    pool.submit(os.getpid).result()  # with fork, the first task starts all processes
    processes = [process for process in multiprocessing.active_children() if process not in strangers]

    def run(units: Iterator[Unit]) -> Iterator[Encoded]:
        waiting: deque[tuple[str, Future[Encoded]]] = deque()
        path = ""
        try:
            for unit in units:
                waiting.append((unit.path, pool.submit(_Worker.run, unit)))
                if len(waiting) >= workers * _UNITS_IN_FLIGHT_PER_WORKER:
                    path, future = waiting.popleft()
                    yield future.result()
            while waiting:
                path, future = waiting.popleft()
                yield future.result()
        except BrokenProcessPool as error:
            pool.shutdown()  # so that every exit status is known
            raise MachineError(f"a worker was killed ({_cause(processes)}) at {path or 'start'}{_REMEDY}") from error

    return run


_REMEDY = ", most likely for want of memory: lower --workers; if one worker dies as well, leave that file out"


def _cause(processes: Sequence[BaseProcess]) -> str:
    """How the first worker ended: the pool itself ends the others by SIGTERM."""
    codes = [process.exitcode for process in processes if process.exitcode]
    code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
