"""Which of its own checkpoints a run goes on from: the last one, or the one before where that is damaged.

Megatron writes its tracker in place (``training/checkpointing.py``, save_checkpoint): a crash of the machine can leave
it empty, and data files shorter than they were written. With such a tracker Megatron ends with status 0, and with such
files in a traceback. A run that resumes from the folder that it saves to (``--load`` is ``--save``) falls back here,
and says so. A step whose second save was not finished has its first one in a root of its own
(:data:`~megatron_btx.checkpoint.retention.REPLACED`). Nothing is changed on the disk: the next save writes the tracker
anew.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.iterations import TRACKER, list_iterations, read_tracker, resolve_iteration
from megatron_btx.checkpoint.retention import REPLACED
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.engine import patch
from megatron_btx.engine.checks.resume import step_of
from megatron_btx.engine.checks.start import has_tracker, iteration_of, newer_non_persistent, saves_where_it_loads
from megatron_btx.ground.errors import CheckpointError
from megatron_btx.ground.log import say


def choose_checkpoint(args: argparse.Namespace) -> None:
    """Point a run at the newest of its own checkpoints that is whole: sets ``args.ckpt_step`` where it is not the last.

    Every rank does it for itself, before any meets the others, and finds the same.

    Raises:
        CheckpointError: none is whole.
    """
    if args.finetune or not has_tracker(args.load) or not saves_where_it_loads(args):
        return
    fault = _fault_of(iteration_of(args.load, args.ckpt_step))
    if fault is None or newer_non_persistent(args, args.load):
        return
    root, replaced = Path(args.load), Path(args.save) / REPLACED
    step = args.ckpt_step or _newest_whole(root)
    if _fault_of(replaced) is None and step_of(str(replaced)) >= step:
        say(f"{fault}; the run goes on from {resolve_iteration(replaced)}")
        args.load = str(replaced)
    elif step == 0:
        raise CheckpointError(
            f"{fault}; no earlier checkpoint in {root} is whole; move {root} away to start this stage again"
        )
    elif not args.ckpt_step:
        say(f"{fault}; the run goes on from the checkpoint of step {step}")
        args.ckpt_step = step
        _answer_for_the_tracker(root / TRACKER, step)


def _fault_of(root: str | Path) -> str | None:
    """What is wrong with the checkpoint that the tracker of ``root`` names; None of a whole one."""
    try:
        TorchDistReader(resolve_iteration(root))
    except CheckpointError as fault:
        return str(fault)
    return None


def _newest_whole(root: Path) -> int:
    """The step of the newest whole checkpoint before the tracker's; of all where the tracker cannot be read; 0 of none.

    Later ones do not count: their saving was not finished when the tracker was written.
    """
    last = read_tracker(root)
    for step, folder in reversed(list_iterations(root)):
        if isinstance(last, int) and step >= last:
            continue
        if _fault_of(folder) is None:
            return step
    return 0


def _answer_for_the_tracker(tracker: Path, step: int) -> None:
    """Have Megatron take ``step`` for what the tracker holds, which it reads even where ``--ckpt-step`` is given."""
    from megatron.training import checkpointing

    def with_the_chosen(read: Any) -> Any:
        @functools.wraps(read)
        def read_metadata(tracker_filename: Any) -> tuple[int, bool]:
            if os.path.realpath(tracker_filename) == os.path.realpath(tracker):
                return step, False
            found: tuple[int, bool] = read(tracker_filename)
            return found

        return read_metadata

    patch.wrap(checkpointing, "read_metadata", with_the_chosen, ("tracker_filename",))
