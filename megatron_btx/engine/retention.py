"""What happens to the checkpoints that lie where a run saves: before it writes one, and when that is whole.

Megatron writes into whatever has the step's name (``training/checkpointing.py``, "TODO Handle non-empty directories"):
killed on top of an older one, old and new files would load. ``--save-retain-interval`` removes only what the tracker
named before, and its non-persistent checkpoints are removed by number, in all folders below.
"""

from __future__ import annotations

import argparse
import functools
import threading
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.checkpoint.retention import REPLACED, find_removable, make_room, remove_checkpoint
from megatron_btx.common.log import say
from megatron_btx.engine import patch
from megatron_btx.engine.fallback import non_persistent_root


class _Saves:
    """Makes room for a save, and removes what may go after it: in a thread, as a shared disk may take minutes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._needed = {args.ckpt_step} if args.ckpt_step else set()
        self._reached: dict[Path, int] = {}
        self._thread: threading.Thread | None = None

    def before(self, root: Path, step: int) -> None:
        """Clear the way for a step's checkpoint; no rank writes before the first has done so."""
        import torch.distributed as distributed
        from megatron.training import training

        reached = self._reached.get(root, self._args.iteration)
        if self._args.async_save and reached == step:  # the same folder may still be written
            training.maybe_finalize_async_save(blocking=True)
        if distributed.get_rank() == 0:
            if self._thread is not None:
                self._thread.join()
            if not self._reached:  # the branch that was left has both kinds of checkpoints
                for other in {Path(self._args.save), non_persistent_root(self._args, self._args.save)} - {root}:
                    if other.is_dir() and self._make_room(other, reached + 1, reached):
                        (other / TRACKER).unlink(missing_ok=True)  # it may name one of these
            self._make_room(root, step, reached)
        distributed.barrier()
        self._reached[root] = step

    def _make_room(self, root: Path, step: int, reached: int) -> bool:
        """Whether something was moved aside, which is said."""
        moved = make_room(root, step, reached)
        if moved:
            names = ", ".join(folder.name for folder in moved)
            say(f"{root}: {names}: not of this run, which goes on from step {reached}; moved to {moved[0].parent}")
        return bool(moved)

    def after(self, root: Path) -> None:
        """Begin to remove, after the last removal; call when a checkpoint and its tracker are written.

        The thread is no daemon: Python waits for it at the end of the run.
        """
        import torch.distributed as distributed

        if distributed.get_rank() != 0:
            return
        if self._thread is not None:
            self._thread.join()
        last, every = self._args.btx_keep_last, self._args.btx_keep_every
        if root != Path(self._args.save):
            last, every = 1, None  # what Megatron keeps of non-persistent ones
        folders = [path for path in [root / REPLACED] if path.is_dir()]
        if last is not None:
            folders += find_removable(root, last, every, self._needed)
        if folders:
            self._thread = threading.Thread(target=_remove, args=(folders,), name="remover")
            self._thread.start()


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        try:
            remove_checkpoint(folder)
        except OSError as failure:
            say(f"{folder}: could not be removed ({failure}); the run goes on")


def keep_to_its_line(args: argparse.Namespace) -> None:
    """Have a run write into empty folders, and remove nothing before a newer checkpoint is whole.

    Raises:
        MegatronVersionError: the installed Megatron saves in another way.
    """
    if not args.save:
        return
    from megatron.training import checkpointing, training

    saves = _Saves(args)
    root = Path(args.save)

    def with_care(save: Any) -> Any:
        @functools.wraps(save)
        def save_checkpoint(iteration: int, *rest: Any, **named: Any) -> Any:
            nonlocal root
            root = Path(args.save)
            if named.get("non_persistent_ckpt"):
                if args.non_persistent_ckpt_type != "global":
                    return save(iteration, *rest, **named)
                root = non_persistent_root(args, args.save)
            saves.before(root, iteration)
            result = save(iteration, *rest, **named)
            if not args.async_save:
                saves.after(root)
            return result

        return save_checkpoint

    def then_remove_at_its_end(schedule: Any) -> Any:
        @functools.wraps(schedule)
        def schedule_async_save(async_request: Any) -> Any:
            async_request.add_finalize_fn(functools.partial(saves.after, root))
            return schedule(async_request)

        return schedule_async_save

    patch.wrap(training, "save_checkpoint", with_care, ("iteration",))
    patch.replace(checkpointing, "cleanup_old_non_persistent_checkpoint", lambda *_, **__: None)
    if args.async_save:
        patch.wrap(checkpointing, "schedule_async_save", then_remove_at_its_end, ("async_request",))
