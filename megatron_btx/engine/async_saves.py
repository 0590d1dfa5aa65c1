"""``--async-save``: what its writing process may not do to a run.

Megatron's own strategy (``core/dist_checkpointing/strategies/async_utils.py``) hands each save to one process that
stays. Four things are missing there.

- Tensors in the host's memory are handed over as they are, and the next step changes them while they are written: all
  of them on the CPU, an offloaded optimizer's on a GPU. Here they are copied first.
- A training process waits for ever for a writing process that is gone.
- On a GPU a server forks that process: it outlives a killed rank, and the signal of ``--exit-signal-handler`` ends it
  before the save that was promised. Here it is a new program, and the rank's own child.
- It ends with the last step, and the save after that starts another, beside which nothing trains. Here the rank itself
  writes that one.
"""

from __future__ import annotations

import argparse
import functools
import signal
import threading
import time
from typing import Any

from megatron_btx.common.errors import MachineError
from megatron_btx.distributed.abort import Stopping
from megatron_btx.distributed.hang_detector import AGAIN
from megatron_btx.distributed.process_cleanup import end_with_parent
from megatron_btx.engine import patch
from megatron_btx.engine.cpu import has_gpu

_LOOK_EVERY_SECONDS = 1.0


def guard_async_saves(args: argparse.Namespace, stopping: Stopping) -> None:
    """Copy what a background save reads, and end the run when the process that writes it is gone.

    Args:
        stopping: ends all ranks.

    Raises:
        MegatronVersionError: the installed Megatron saves in another way.
    """
    if not args.async_save or args.async_strategy != "mcore":
        return
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
    from megatron.training import initialize, training

    patch.expect(async_utils.PersistentAsyncCaller, "_persistent_process")
    patch.wrap(filesystem_async.FileSystemWriterAsync, "prepare_write_data", _with_copies, ("self", "plan", "planner"))
    patch.wrap(training, "save_checkpoint", functools.partial(_with_the_last_in_place, args), ("iteration",))
    if has_gpu():  # elsewhere it is a fork: see engine/cpu_in_megatron.py
        patch.wrap(initialize, "init_persistent_async_worker", lambda start: lambda rank, _: start(rank, "spawn"))
        patch.replace(async_utils.PersistentAsyncCaller, "async_loop", functools.partial(write, args.exit_signal))
    threading.Thread(target=_watch_writer, args=(stopping,), name="writer", daemon=True).start()


def _with_the_last_in_place(args: argparse.Namespace, save: Any) -> Any:
    """Megatron's save, which is done in place once the writing process has been told to end."""

    @functools.wraps(save)
    def save_checkpoint(*given: Any, **named: Any) -> Any:
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        args.async_save = args.async_save and PersistentAsyncCaller._persistent_process is not None
        return save(*given, **named)

    return save_checkpoint


def write(exit_signal: int, *arguments: Any) -> None:
    """The writing process as a new program, in which Megatron's own loop is in its place."""
    signal.signal(exit_signal, signal.SIG_IGN)
    end_with_parent()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*arguments)


def _with_copies(prepare: Any) -> Any:
    """Megatron's preparation of a save, after which no tensor of the host's memory is the model's own."""

    @functools.wraps(prepare)
    def prepare_write_data(self: Any, plan: Any, planner: Any) -> None:
        prepare(self, plan, planner)
        for _, _, (_, tensors) in self.write_buckets:
            for number, (item, tensor) in enumerate(tensors):
                if tensor.is_cpu:
                    tensors[number] = (item, tensor.clone())

    return prepare_write_data


def _watch_writer(stopping: Stopping) -> None:
    """Look whether the writing process has ended otherwise than by Megatron's own word."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    while True:
        time.sleep(_LOOK_EVERY_SECONDS)
        writer = PersistentAsyncCaller._persistent_process
        if writer is None or writer.exitcode in (None, 0):
            continue
        how = f"ended with status {writer.exitcode}"
        if writer.exitcode < 0:
            how = f"was ended by signal {-writer.exitcode}"
        stopping.leave_all(
            MachineError(
                f"the process that writes checkpoints (--async-save, process {writer.pid}) {how}; the last save is not "
                f"whole. {AGAIN}"
            )
        )
