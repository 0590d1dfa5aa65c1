"""What may go of a root, and what is moved aside: a run's line is what it started from, those before, and its saves."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from megatron_btx.checkpoint.iterations import BACKEND, BACKEND_FILE, TRACKER, list_iterations, read_tracker

REPLACED = "btx_replaced"
"""The root within a root that holds the only checkpoint of a step which is being saved again."""


def make_room(root: Path, step: int, reached: int) -> list[Path]:
    """Clear the way for the checkpoint of ``step``: what lies after the run's line, which ends with ``reached``.

    A branch that somebody left by ``--ckpt-step``, or a damaged checkpoint, is moved aside; what a killed save left is
    removed. A step that is saved again has its first checkpoint in :data:`REPLACED` until the second is whole.

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
