"""Which checkpoints of a run may go: all but the last K, every M-th, and what somebody still needs."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_btx.checkpoint.iterations import BACKEND_FILE, list_iterations, read_tracker


def find_removable(root: Path, keep_last: int, keep_every: int | None, needed: Collection[int] = ()) -> list[Path]:
    """The folders of iterations that may be removed from a root, the oldest first.

    Nothing at or above the tracker's step goes: its saving may be going on. Half-written folders below it go, because
    nothing will ever finish them. They count as none of the last K, and links count but stay.

    Args:
        keep_last: how many whole checkpoints stay, the tracker's among them.
        keep_every: beside them those stay whose step is a multiple of this.
        needed: steps that stay in any case.
    """
    latest = read_tracker(root)
    if not isinstance(latest, int):
        return []
    folders = {step: folder for step, folder in list_iterations(root) if step <= latest}
    whole = [step for step, folder in folders.items() if (folder / BACKEND_FILE).is_file()]
    kept = {latest, *needed, *whole[-keep_last:]}
    if keep_every:
        kept.update(step for step in whole if step % keep_every == 0)
    return [folder for step, folder in folders.items() if step not in kept and not folder.is_symlink()]


def remove_checkpoint(folder: Path) -> None:
    """Remove a folder, beginning with what makes it a checkpoint: half removed it does not load.

    Raises:
        OSError: something in it could not be removed.
    """
    (folder / BACKEND_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder)
