"""A checkpoint is written into an empty folder: what an earlier save left under its name is removed first.

Megatron writes into whatever is there (``training/checkpointing.py``, "TODO Handle non-empty directories"). A save that
is killed on top of an older one would leave old and new files under the old ``metadata.json``: it would load.
"""

from __future__ import annotations

import argparse
import functools
import shutil
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.iterations import BACKEND_FILE
from megatron_btx.engine import patch


def save_into_empty_folders(args: argparse.Namespace) -> None:
    """Have Megatron's training loop remove a stale folder of the same step before each save.

    Raises:
        MegatronVersionError: the installed Megatron saves in another way.
    """
    if not args.save:
        return
    from megatron.training import training

    def with_removal(save: Any) -> Any:
        @functools.wraps(save)
        def save_checkpoint(iteration: int, *rest: Any, **named: Any) -> Any:
            if not named.get("non_persistent_ckpt"):  # they lie elsewhere
                _remove_stale(Path(args.save) / f"iter_{iteration:07d}")
            return save(iteration, *rest, **named)

        return save_checkpoint

    patch.wrap(training, "save_checkpoint", with_removal, ("iteration",))


def _remove_stale(folder: Path) -> None:
    """Remove a folder on the first rank; the others wait, so that none writes before."""
    import torch.distributed as distributed

    if distributed.get_rank() == 0 and folder.is_dir() and not folder.is_symlink():
        # First what makes it a checkpoint: nothing that loads is left when this is interrupted.
        (folder / BACKEND_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    distributed.barrier()
