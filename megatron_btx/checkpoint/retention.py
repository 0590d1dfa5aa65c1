"""Which checkpoints of a run may go: all but the last K, every M-th, and what somebody still needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_btx.checkpoint.iterations import BACKEND, BACKEND_FILE, list_iterations, read_tracker


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
