"""Saves of a run: what happens to the checkpoints that lie where it saves, and in the background.

Megatron writes into whatever has the step's name (``training/checkpointing.py``, "TODO Handle non-empty directories"):
killed on top of an older one, old and new files would load. ``--save-retain-interval`` removes only what the tracker
named before, and its non-persistent checkpoints are removed by number, in all folders below. Here a run's line is what
it started from, those before, and its saves: what lies beside it is moved aside, and nothing is removed before a newer
checkpoint is whole.

``--async-save``: Megatron's own strategy (``core/dist_checkpointing/strategies/async_utils.py``) hands each save to one
process that stays. Four things are missing there.

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
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.checkpoint.iterations import BACKEND, BACKEND_FILE, TRACKER, list_iterations, read_tracker
from megatron_btx.common.errors import MachineError
from megatron_btx.common.log import say
from megatron_btx.distributed.abort import AGAIN, Stopping
from megatron_btx.distributed.process_cleanup import end_with_parent
from megatron_btx.engine import patch
from megatron_btx.engine.cpu import has_gpu
from megatron_btx.engine.patch import Call

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_LOOK_EVERY_SECONDS = 1.0
REPLACED = "btx_replaced"
"""The root within a root that holds the only checkpoint of a step which is being saved again."""


def make_room(root: Path, step: int, reached: int) -> list[Path]:
    """Clear the way for the checkpoint of ``step``: what lies after the run's line, which ends with ``reached``.

    A branch that somebody left by ``--ckpt-step``, or a damaged checkpoint, is moved aside, and that is said; what a
    killed save left is removed. A step that is saved again has its first checkpoint in :data:`REPLACED` until the
    second is whole.

    Returns:
        What was moved aside, where it lies now.
    """
    own = root / f"iter_{step:07d}"
    if step == reached and _is_whole(own) and not _is_whole(root / REPLACED / own.name):
        shutil.rmtree(root / REPLACED, ignore_errors=True)
        (root / REPLACED).mkdir()
        (root / REPLACED / TRACKER).write_text(str(step))
        _move(own, root / REPLACED)
    # The oldest first: stopped on the way, the tracker's still stands.
    later = [folder for at, folder in list_iterations(root) if at > reached]
    if os.path.lexists(own) and own not in later:
        later.insert(0, own)
    moved, aside = [], root / time.strftime("left.%Y%m%d-%H%M%S")
    for folder in later:
        if _is_leftover(folder) and not folder.is_symlink():
            remove_checkpoint(folder)
            continue
        others = [path for path in root.iterdir() if path.is_symlink() and path != folder]
        links = [link for link in others if link.resolve() == folder.resolve()]  # somebody's best one
        moved.append(_move(folder, aside))
        for link in links:
            link.unlink()
            link.symlink_to(moved[-1].absolute())
    if moved:
        names = ", ".join(folder.name for folder in moved)
        say(f"{root}: {names}: not of this run, which goes on from step {reached}; moved to {aside}")
    return moved


def _move(folder: Path, into: Path) -> Path:
    """Move a folder; of a link the link alone, which may be relative."""
    into.mkdir(exist_ok=True)
    moved = into / folder.name
    if folder.is_symlink():
        moved.symlink_to(folder.resolve())
        folder.unlink()
    else:
        folder.rename(moved)
    return moved


def find_removable(root: Path, keep_last: int, keep_every: int | None, needed: Collection[int] = ()) -> list[Path]:
    """The folders of iterations that may be removed from a root, the oldest first.

    Nothing at or above the tracker's step goes: its saving may be going on. What a killed save left below it goes,
    because nothing will ever finish it. Whatever cannot be read, or is of another format, stays and counts for nothing.
    Links count but stay, and so does what a link in the root points to.

    Args:
        keep_last: how many whole checkpoints stay, the tracker's among them.
        keep_every: beside them those stay whose step is a multiple of this.
        needed: steps that stay in any case.
    """
    latest = read_tracker(root)
    if not isinstance(latest, int):
        return []
    folders = {step: folder for step, folder in list_iterations(root) if step <= latest}
    whole = [step for step, folder in folders.items() if _is_whole(folder)]
    kept = {latest, *needed, *whole[-keep_last:]}
    if keep_every:
        kept.update(step for step in whole if step % keep_every == 0)
    linked = {path.resolve() for path in root.iterdir() if path.is_symlink()}
    removable = []
    for step, folder in folders.items():
        may_go = step in whole or _is_leftover(folder)
        if may_go and step not in kept and not folder.is_symlink() and folder.resolve() not in linked:
            removable.append(folder)
    return removable


def _is_whole(folder: Path) -> bool:
    """Whether a folder has the file that Megatron writes last, in its form."""
    try:
        content = json.loads((folder / BACKEND_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("sharded_backend") == BACKEND["sharded_backend"]


def _is_leftover(folder: Path) -> bool:
    """Whether a folder has data files alone: no index, no description, and nothing of another format."""
    try:
        return all(path.suffix == ".distcp" for path in folder.iterdir())
    except OSError:
        return False


def remove_checkpoint(folder: Path) -> None:
    """Remove a folder, beginning with what makes it a checkpoint: half removed it does not load.

    Raises:
        OSError: something in it could not be removed.
    """
    (folder / BACKEND_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def non_persistent_root(args: argparse.Namespace, root: str) -> Path:
    """Where Megatron keeps the checkpoints of ``--non-persistent-ckpt-type global`` of a run in ``root``."""
    return Path(args.non_persistent_global_ckpt_dir or Path(root) / "non_persistent")


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
                    if other.is_dir() and make_room(other, reached + 1, reached):
                        (other / TRACKER).unlink(missing_ok=True)  # it may name one of these
            make_room(root, step, reached)
        distributed.barrier()
        self._reached[root] = step

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
            self._thread = threading.Thread(target=self._remove, args=(folders,), name="remover")
            self._thread.start()

    def _remove(self, folders: list[Path]) -> None:
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

    def save_checkpoint(save: Call, iteration: int, *rest: object, **named: object) -> None:
        nonlocal root
        root = Path(args.save)
        if named.get("non_persistent_ckpt"):
            if args.non_persistent_ckpt_type != "global":
                save(iteration, *rest, **named)
                return
            root = non_persistent_root(args, args.save)
        saves.before(root, iteration)
        save(iteration, *rest, **named)
        if not args.async_save:
            saves.after(root)

    def schedule_async_save(schedule: Call, request: AsyncRequest) -> None:
        request.add_finalize_fn(functools.partial(saves.after, root))
        schedule(request)

    patch.around(training, "save_checkpoint", save_checkpoint, ("iteration",))
    patch.replace(checkpointing, "cleanup_old_non_persistent_checkpoint", lambda *_, **__: None)
    if args.async_save:
        patch.around(checkpointing, "schedule_async_save", schedule_async_save, ("async_request",))


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

    caller = async_utils.PersistentAsyncCaller
    patch.expect(caller, "_persistent_process")

    def save_checkpoint(save: Call, *given: object, **named: object) -> None:
        args.async_save = args.async_save and caller._persistent_process is not None  # the writer was told to end
        save(*given, **named)

    patch.around(filesystem_async.FileSystemWriterAsync, "prepare_write_data", _copy, ("self", "plan", "planner"))
    patch.around(training, "save_checkpoint", save_checkpoint, ("iteration",))
    if has_gpu():  # elsewhere it is a fork: see engine/cpu.py
        patch.wrap(initialize, "init_persistent_async_worker", lambda start: lambda rank, _: start(rank, "spawn"))
        patch.replace(caller, "async_loop", functools.partial(write, args.exit_signal))
    threading.Thread(target=_watch_writer, args=(stopping,), name="writer", daemon=True).start()


def write(exit_signal: int, *arguments: object) -> None:
    """The writing process as a new program, in which Megatron's own loop is in its place."""
    signal.signal(exit_signal, signal.SIG_IGN)
    end_with_parent()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*arguments)


def _copy(prepare: Call, writer: FileSystemWriterAsync, plan: object, planner: object) -> None:
    """Megatron's preparation of a save, after which no tensor of the host's memory is the model's own."""
    prepare(writer, plan, planner)
    for _, _, (_, tensors) in writer.write_buckets:
        for number, (item, tensor) in enumerate(tensors):
            if tensor.is_cpu:
                tensors[number] = (item, tensor.clone())


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
