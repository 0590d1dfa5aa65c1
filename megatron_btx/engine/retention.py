"""``--btx-keep-last`` and ``--btx-keep-every``: old checkpoints are removed when a newer one is whole.

Megatron's ``--save-retain-interval`` removes only what the tracker named before (``training/checkpointing.py``,
iter_finalize_fn): what earlier starts, kills or another interval left stays for ever.
"""

from __future__ import annotations

import argparse
import functools
import threading
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.retention import find_removable, remove_checkpoint
from megatron_btx.engine import patch
from megatron_btx.ground.log import say


class Remover:
    """Removes what may go, in a thread of the first rank: a large checkpoint takes a shared disk minutes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._root = Path(args.save)
        self._last, self._every = args.btx_keep_last, args.btx_keep_every
        self._needed = {args.ckpt_step} if args.ckpt_step else set()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begin to remove, after the last removal; call when a checkpoint and its tracker are written.

        The thread is no daemon: Python waits for it at the end of the run.
        """
        import torch.distributed as distributed

        if distributed.get_rank() != 0:
            return
        if self._thread is not None:
            self._thread.join()
        folders = find_removable(self._root, self._last, self._every, self._needed)
        if folders:
            self._thread = threading.Thread(target=_remove, args=(folders,), name="remover")
            self._thread.start()


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        try:
            remove_checkpoint(folder)
        except OSError as failure:
            say(f"{folder}: could not be removed ({failure}); the run goes on")


def remove_old_checkpoints(args: argparse.Namespace) -> None:
    """Have old checkpoints removed after every save.

    Raises:
        MegatronVersionError: the installed Megatron saves in another way.
    """
    if args.btx_keep_last is None:
        return
    from megatron.training import checkpointing, training

    remover = Remover(args)

    def then_remove(save: Any) -> Any:
        @functools.wraps(save)
        def save_checkpoint(iteration: int, *rest: Any, **named: Any) -> Any:
            result = save(iteration, *rest, **named)
            if not args.async_save and not named.get("non_persistent_ckpt"):
                remover.begin()
            return result

        return save_checkpoint

    def then_remove_at_its_end(schedule: Any) -> Any:
        @functools.wraps(schedule)
        def schedule_async_save(async_request: Any) -> Any:
            async_request.add_finalize_fn(remover.begin)
            return schedule(async_request)

        return schedule_async_save

    patch.wrap(training, "save_checkpoint", then_remove, ("iteration",))
    if args.async_save:
        patch.wrap(checkpointing, "schedule_async_save", then_remove_at_its_end, ("async_request",))
