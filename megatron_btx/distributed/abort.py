"""One rank that must stop stops all: the others wait for it inside a collective and cannot be told by another.

Only the ranks that read data see that a batch is unusable. If one of them ended alone, its tensor-parallel neighbours
would wait until a timeout of minutes, and then say something else. So every rank has a thread that looks into the
store by which the ranks met, every second or so. It costs a step nothing. The rank that must stop leaves its reason
there; each other one says it, too, and ends at once, from wherever it waits. Nothing is saved on the way.

The same thread finds a run that stands still, and names the rank that hangs: see hang_detector.py.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from megatron_btx.common.errors import BTXError, InputError, MachineError, exits_with_one_line, is_of_the_machine
from megatron_btx.distributed.hang_detector import AGAIN, Place, Standstill, describe

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
        self._timed_out = self._standstill.place_of(failure, self._rank)
        time.sleep(3 * _LATE_SECONDS)
        return MachineError(
            "the run stands still, and rank 0, by which all met, gives no word: its process or its machine is stopped "
            f"or gone. {AGAIN}"
        )

    def _look(self) -> None:
        while not self._done.wait(_LOOK_EVERY_SECONDS):
            try:
                told = self._store.check([_KEY])
                if told:
                    message = self._store.get(_KEY)
                else:
                    self._look_for_standstill()
            except RuntimeError:  # the store is gone, with the rank that kept it
                return
            if not told:
                continue
            if self._done.is_set():  # this rank speaks for itself
                return
            if not message:  # the store of --fake-process-group has every key, and nothing in it
                return
            self._leave(**json.loads(message))

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
            self._store.set(f"{_PLACE}/{self._rank}", place.pack())
        if time.monotonic() - self._still_since < _LATE_SECONDS:
            return
        places = []
        for rank in range(self._world):
            if self._store.check([f"{_PLACE}/{rank}"]):
                places.append(Place.unpack(self._store.get(f"{_PLACE}/{rank}")))
        reason = describe(places, self._world, self.standstill_seconds)
        if reason is not None:
            self._done.set()
            self._tell_and_leave(MachineError(reason), len(places))

    def _tell_and_leave(self, reason: BTXError, ranks: int) -> None:
        """Leave the reason for the others, and end.

        Args:
            ranks: how many are there to read it.
        """
        message = {"reason": str(reason), "is_machine": is_of_the_machine(reason), "ranks": ranks}
        self._store.set(_KEY, json.dumps(message))
        self._leave(**message)  # type: ignore[arg-type]

    def _leave(self, reason: str, is_machine: bool, ranks: int) -> None:
        """Say the reason and end at once: an orderly end would wait for ranks that are no more."""
        self._leaving = True
        error: BTXError = InputError(reason)
        if is_machine:
            error = MachineError(reason)
        status = exits_with_one_line(_raise)(error)
        sys.stdout.flush()
        sys.stderr.flush()
        self._wait_for(ranks)
        os._exit(status)

    def _wait_for(self, ranks: int) -> None:
        if self._store is None:
            return
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            seen = self._store.add(_SEEN, 1)
            while seen < ranks and time.monotonic() < deadline:
                time.sleep(0.05)
                seen = self._store.add(_SEEN, 0)
        except RuntimeError:  # all had seen it, and the store has gone
            return
        if self._rank == 0:
            time.sleep(_KEEP_STORE_SECONDS)


def _raise(error: BTXError) -> int:
    raise error
