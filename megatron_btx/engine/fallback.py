"""Which of its own checkpoints a run goes on from: the last one, or the one before where that is damaged.

The last may be non-persistent, and the one before the first of a step that was saved again. Both lie in a root of their
own, which Megatron gets as ``--load``: so all checks and records are of what is loaded.

Megatron writes its tracker in place (``training/checkpointing.py``, save_checkpoint): a crash of the machine can leave
it empty, and data files shorter than they were written. With such a tracker Megatron ends with status 0, and with such
files in a traceback. A run that resumes from the folder that it saves to (``--load`` is ``--save``) falls back here,
and says so. Nothing is changed on the disk: the next save writes the tracker anew.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from megatron_btx.checkpoint.iterations import TRACKER, is_checkpoint, list_iterations, read_tracker, resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.common.files import write_atomically
from megatron_btx.common.log import say
from megatron_btx.engine import patch
from megatron_btx.engine.checks.start import iteration_of, step_of
from megatron_btx.engine.saving import REPLACED, non_persistent_root

CHECKSUMS = "integrity.json"
"""Source: ``core/dist_checkpointing/validation.py``, INTEGRITY_FNAME."""


def choose_checkpoint(args: argparse.Namespace) -> None:
    """Point a run at the newest of its own checkpoints that is whole: sets ``args.load`` or ``args.ckpt_step``.

    Every rank does it for itself, before any meets the others, and finds the same.

    Raises:
        CheckpointError: none is whole.
    """
    root, own = Path(args.load or ""), _saves_where_it_loads(args) and not args.finetune
    fault, step, beside = None, -1, []
    if own and not (root / TRACKER).is_file() and not getattr(args, "btx_check", False):
        # A run would begin anew beside the newest whole one.
        newest = _newest_whole(root)
        if newest is not None:
            say(f"{root / TRACKER}: does not exist; the run goes on from the checkpoint of step {newest}")
            write_atomically(root / TRACKER, str(newest))
    if args.non_persistent_ckpt_type == "global":
        from megatron.training import checkpointing

        # Megatron would take its own choice also for the step that --ckpt-step asks for, and for a start of weights.
        patch.replace(checkpointing, "_get_non_persistent_iteration", lambda *_: -1)
        if args.load and not args.ckpt_step:
            beside = [non_persistent_root(args, args.load)]
    if args.load and (root / TRACKER).is_file():
        chosen = iteration_of(args.load, args.ckpt_step)
        fault = _fault_of(chosen)
        if fault is None:
            step = step_of(chosen)
        elif not own:
            return
        else:
            step = args.ckpt_step or _newest_whole(root) or 0
            beside.append(Path(args.save) / REPLACED)
    for place in beside:
        if not (place / TRACKER).is_file():
            continue
        if own and (its_fault := _fault_of(place)):
            fault = fault or its_fault
        elif step_of(str(place)) >= step:
            say(f"{fault or 'the newest one is not persistent'}; the run goes on from {resolve_iteration(place)}")
            args.load = str(place)
            return
    if fault and step < 1:
        raise CheckpointError(
            f"{fault}; no earlier checkpoint in {root} is whole; move {root} away to start this stage again"
        )
    if fault and not args.ckpt_step:
        say(f"{fault}; the run goes on from the checkpoint of step {step}")
        args.ckpt_step = step
        from megatron.training import checkpointing

        def read_metadata(read: Callable[[str], tuple[int, bool]], tracker_filename: str) -> tuple[int, bool]:
            """Megatron reads the tracker even where ``--ckpt-step`` is given."""
            if os.path.realpath(tracker_filename) == os.path.realpath(root / TRACKER):
                return step, False
            return read(tracker_filename)

        patch.around(checkpointing, "read_metadata", read_metadata, ("tracker_filename",))


def _saves_where_it_loads(args: argparse.Namespace) -> bool:
    """Whether ``--load`` is ``--save``, or one of the roots beside."""
    if not args.save or not args.load:
        return False
    own = (args.save, os.path.join(args.save, REPLACED), non_persistent_root(args, args.save))
    return os.path.realpath(args.load) in map(os.path.realpath, own)


def check_save_folder(args: argparse.Namespace) -> None:
    """Refuse to save among checkpoints that a run does not go on from: they would count as its. Raises InputError."""
    if not args.save or args.skip_train:
        return
    held = [folder.name for _, folder in list_iterations(Path(args.save)) if is_checkpoint(folder)]
    goes_on = _saves_where_it_loads(args) and not args.finetune
    if not goes_on and (held or is_checkpoint(Path(args.save))):
        raise InputError(
            f"{args.save}: holds checkpoints (see {(held or [TRACKER])[-1]}), and this start goes on from none "
            f"of them; go on with --load {args.save} and without --finetune, or give --save another folder"
        )

    place = args.non_persistent_global_ckpt_dir
    if place and args.non_persistent_ckpt_type == "global" and is_checkpoint(Path(place)) and _fault_of(place) is None:
        owner = TorchDistReader(resolve_iteration(place)).arguments().get("save")
        if owner and os.path.realpath(owner) != os.path.realpath(args.save):
            raise InputError(
                f"--non-persistent-global-ckpt-dir {place}: holds checkpoints of the run that saves to {owner}, not to "
                f"{args.save}; give each run a folder of its own"
            )


def _fault_of(root: str | Path) -> str | None:
    """What is wrong with the checkpoint that the tracker of ``root`` names; None of a whole one."""
    try:
        TorchDistReader(resolve_iteration(root))
    except CheckpointError as fault:
        return str(fault)
    return None


def _newest_whole(root: Path) -> int | None:
    """The step of the newest whole checkpoint before the tracker's; of all where there is none that can be read.

    Later ones do not count: their saving was not finished when the tracker was written.
    """
    last = None
    if (root / TRACKER).is_file():
        last = read_tracker(root)
    for step, folder in reversed(list_iterations(root)):
        if isinstance(last, int) and step >= last:
            continue
        if _fault_of(folder) is None:
            return step
    return None


def verify_where_checksums_are(args: argparse.Namespace, resumes: bool) -> None:
    """Have Megatron verify a checkpoint that it starts from only where that has checksums.

    With ``--verify-integrity`` it writes them, and verifies every checkpoint that it loads, also that of another stage
    or of somebody else, which may have none. A run that resumes its own is not let through without.

    Raises:
        MegatronVersionError: the installed Megatron verifies in another way.
    """
    if not args.verify_integrity or resumes:
        return
    from megatron.core.dist_checkpointing import serialization

    def verify_if_there(verify: Callable[[str], None], checkpoint_dir: str) -> None:
        if (Path(checkpoint_dir) / CHECKSUMS).is_file():
            verify(checkpoint_dir)
        else:
            say(f"{checkpoint_dir}: has no {CHECKSUMS}, so --verify-integrity cannot verify it; it is loaded as is")

    patch.around(serialization, "verify_integrity_manifest", verify_if_there, ("checkpoint_dir",))
