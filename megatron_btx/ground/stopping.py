"""One rank that must stop stops all: the others wait for it inside a collective and cannot be told by another.

Only the ranks that read data see that a batch is unusable. If one of them ended alone, its tensor-parallel neighbours
would wait until a timeout of minutes, and then say something else. So every rank has a thread that looks into the
store by which the ranks met, every second or so. It costs a step nothing. The rank that must stop leaves its reason
there; each other one says it, too, and ends at once, from wherever it waits. Nothing is saved on the way.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from megatron_btx.ground.errors import BAD_INPUT_EXIT_CODE, InputError, exits_with_one_line

_KEY, _SEEN = "megatron_btx/stop", "megatron_btx/stopped"
_LOOK_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 20.0
"""How long a rank waits for the others to have seen the reason before it goes."""
_KEEP_STORE_SECONDS = 1.0
"""How much longer rank 0 stays, which can keep the store: a rank that finds it gone spends seconds on a report."""


class Stopping:
    """The connection of this rank to the others; nothing where there are none."""

    def __init__(self) -> None:
        self._store: Any = None
        self._done = threading.Event()

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

    def stop_all(self, reason: InputError) -> None:
        """Tell the others why this rank stops, wait until they know, and end as they do.

        A rank that is alone comes back: its caller raises the reason.
        """
        self._done.set()
        if self._store is None:
            return
        self._store.set(_KEY, str(reason))
        self._leave(str(reason))

    def _look(self) -> None:
        while not self._done.wait(_LOOK_EVERY_SECONDS):
            try:
                if not self._store.check([_KEY]):
                    continue
                reason = self._store.get(_KEY).decode()
                if self._done.is_set():  # this rank speaks for itself
                    return
                if not reason:  # the store of --fake-process-group has every key, and nothing in it
                    return
            except RuntimeError:  # the store is gone, with the rank that kept it
                return
            self._leave(reason)

    def _leave(self, reason: str) -> None:
        """Say the reason and end at once: an orderly end would wait for ranks that are no more."""
        exits_with_one_line(_raise)(reason)
        sys.stdout.flush()
        sys.stderr.flush()
        self._wait_for_all()
        os._exit(BAD_INPUT_EXIT_CODE)

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            seen = self._store.add(_SEEN, 1)
            while seen < self._world and time.monotonic() < deadline:
                time.sleep(0.05)
                seen = self._store.add(_SEEN, 0)
        except RuntimeError:  # all had seen it, and the store has gone
            return
        if self._rank == 0:
            time.sleep(_KEEP_STORE_SECONDS)


def _raise(reason: str) -> int:
    raise InputError(reason)
