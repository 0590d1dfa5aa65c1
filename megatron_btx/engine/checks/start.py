"""The checkpoint that a run starts from: which one it is, and whether it fits the given arguments.

Refused are another model, routing or numerics (the tables of :mod:`megatron_btx.checkpoint.arguments`) and another
vocabulary (:mod:`megatron_btx.checkpoint.tokenizers.comparison`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.arguments import (
    MODEL_ARGUMENTS,
    NUMERICS_ARGUMENTS,
    ModelArgument,
    differences,
)
from megatron_btx.checkpoint.iterations import (
    BACKEND_FILE,
    RELEASE,
    TRACKER,
    list_iterations,
    read_tracker,
    resolve_iteration,
    root_of,
)
from megatron_btx.checkpoint.retention import REPLACED
from megatron_btx.checkpoint.tokenizer_path import locate_tokenizer
from megatron_btx.checkpoint.tokenizers.comparison import check_same_tokenizer
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.engine.budget import budget_of
from megatron_btx.engine.checks.resume import check_resume, step_of
from megatron_btx.ground.errors import InputError
from megatron_btx.model.groups import TrainedGroups


def finished(args: argparse.Namespace) -> str | None:
    """What to say of a resumed run that has taken all its steps; None of any other.

    Megatron would stop with "no samples left to consume".
    """
    path, resumes = checkpoint_to_load(args) or ("", False)
    if args.skip_train or not resumes:
        return None
    latest, (steps, _) = step_of(path, args.override_ckpt_iteration), budget_of(args)
    return f"{args.load} has step {latest} of {steps}: nothing left to train" if latest >= steps else None


def check_against_checkpoint(args: argparse.Namespace, groups: TrainedGroups) -> None:
    """Refuse to load a checkpoint into a model it was not made for.

    Compares the stored arguments of the checkpoint that Megatron is about to load (the run's own to resume, else
    ``--pretrained-checkpoint``) with the given ones.

    Args:
        groups: what trains.

    Raises:
        InputError: names every argument that differs, with both values and the flag that mends it.
    """
    loaded = checkpoint_to_load(args)
    args.btx_taken_steps = None
    _check_save_folder(args)
    if loaded is not None:
        path, resuming = loaded
        table = MODEL_ARGUMENTS + (NUMERICS_ARGUMENTS if resuming else ())
        stored = compare_with_stored(path, vars(args), table)
        if resuming:
            check_resume(path, stored, vars(args), groups, done=finished(args) is not None)
        # The experts' names travel from checkpoint to checkpoint, for figures and for mixing again.
        args.btx_experts = stored.get("btx_experts")
        if resuming:
            args.btx_taken_steps = stored.get("btx_taken_steps")


def compare_with_stored(path: str, given: Mapping[str, Any], table: Iterable[ModelArgument] = MODEL_ARGUMENTS) -> Any:
    """Refuse a checkpoint that could run code, or whose stored arguments differ from the given ones.

    Every rank does it for itself, before any meets the others, and finds the same.

    Returns:
        The stored arguments.

    Raises:
        CheckpointError: something in it is not on the allow-list, or cannot be read.
        InputError: names every argument that differs, with both values and the flag that mends it.
    """
    checkpoint = TorchDistReader(resolve_iteration(path))
    checkpoint.check_objects()
    stored = locate_tokenizer(checkpoint.arguments(), root_of(checkpoint.folder))
    allowed = set(given["btx_allow_change"])
    if stored.get("btx_untrained_routers"):
        allowed.update(argument.name for argument in MODEL_ARGUMENTS if argument.usage)
    wrong = [d for d in differences(stored, given, table) if d[0].name not in allowed]
    if wrong:
        listed = "; ".join(f"{a.flag}: stored {a_stored!r}, given {a_given!r}" for a, a_stored, a_given in wrong)
        remedy = _remedy([argument for argument, _, _ in wrong], stored, given)
        raise InputError(f"{path} was made with other model arguments than given: {listed}. {remedy}")
    if "tokenizer_model" not in allowed:
        check_same_tokenizer({str(path): stored, "the command line": given}, "--btx-allow-change tokenizer_model")
    return stored


def _remedy(wrong: list[ModelArgument], stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What to do about arguments that differ; a change is offered only where the weights can be loaded after it."""
    names = {argument.name for argument in wrong}
    if "num_experts" in names and stored.get("num_experts") is None:
        return "It is a dense model: give it a run of its own, without the mixture's flags (--num-experts, --moe-...)"
    if "num_experts" in names and given.get("num_experts") is None:
        return "It is a mixture: give it a run of its own, with the mixture's flags (--num-experts, --moe-...)"
    unfit = {argument.name for argument in MODEL_ARGUMENTS if argument.shapes}
    if given.get("position_embedding_type") == "learned_absolute":
        unfit.add("max_position_embeddings")
    fixed = [argument.flag for argument in wrong if argument.name in unfit]
    free = [argument.name for argument in wrong if argument.name not in unfit]
    allow = f"allow the change with --btx-allow-change {' '.join(free)}"
    if not fixed:
        return f"Give the stored values, or {allow}"
    must = f"Give the stored values: the weights do not fit another {', '.join(fixed)}"
    return f"{must}; for the rest you can {allow}" if free else must


def checkpoint_to_load(args: argparse.Namespace) -> tuple[str, bool] | None:
    """The checkpoint Megatron will load, and whether that resumes a run rather than starting one.

    A root stands for its latest iteration; with ``--ckpt-step`` the folder of that iteration is given, which Megatron
    finds without a tracker, too. Source: ``training/checkpointing.py``, load_checkpoint and _load_base_checkpoint.

    Raises:
        InputError: it would be a non-persistent one, and another is asked for.
    """
    root, resumes = args.load, not args.finetune
    if args.pretrained_checkpoint and not has_tracker(root):
        root, resumes = args.pretrained_checkpoint, False
    if not root:
        return None
    if newer := newer_non_persistent(args, root):
        if args.ckpt_step or not resumes:
            raise InputError(
                f"{newer}: Megatron would load its last step, and not the one that is asked for; move it away, or give "
                f"that folder itself: --load {newer}"
            )
        return newer, resumes
    if has_tracker(root) or args.ckpt_step or root == args.pretrained_checkpoint:
        return iteration_of(root, args.ckpt_step), resumes
    return None


def has_tracker(root: str | Path | None) -> bool:
    """Whether Megatron takes a folder for a root with a checkpoint."""
    return root is not None and (Path(root) / TRACKER).is_file()


def iteration_of(root: str, step: int | None) -> str:
    """The root itself, or the folder of the step that ``--ckpt-step`` asks for; a release has no steps."""
    tracker = Path(root) / TRACKER
    if not step or (tracker.is_file() and tracker.read_bytes()[:40].strip() == RELEASE.encode()):
        return root
    return str(Path(root) / f"iter_{step:07d}")


def saves_where_it_loads(args: argparse.Namespace) -> bool:
    """Whether a run goes on in the folder that it saves to, from its checkpoints or from what one has replaced."""
    if not args.save or not args.load or not os.path.isdir(args.load):
        return False
    own = (args.save, os.path.join(args.save, REPLACED))
    return any(os.path.isdir(folder) and os.path.samefile(folder, args.load) for folder in own)


def _check_save_folder(args: argparse.Namespace) -> None:
    """Refuse to save among checkpoints that the run does not go on from: they would be replaced, and count as its own.

    Raises:
        InputError: names them.
    """
    if not args.save or args.skip_train or (saves_where_it_loads(args) and not args.finetune):
        return
    root = Path(args.save)
    held = [folder.name for _, folder in list_iterations(root) if (folder / BACKEND_FILE).is_file()]
    if held or has_tracker(root):
        raise InputError(
            f"{root}: holds checkpoints ({', '.join(held[-3:]) or TRACKER}), and this start goes on from none of them; "
            f"go on from the last one with --load {root} and without --finetune, or give --save another folder"
        )


def non_persistent_root(args: argparse.Namespace, root: str | None) -> Path:
    """Where Megatron keeps the checkpoints of ``--non-persistent-ckpt-type global`` of a run in ``root``."""
    return Path(args.non_persistent_global_ckpt_dir or Path(root or "") / "non_persistent")


def newer_non_persistent(args: argparse.Namespace, root: str) -> str | None:
    """The root of non-persistent checkpoints where Megatron prefers its last one: it is not older than the other.

    Local ones need a library of their own, lie on this node's disk and are held to the list when they are loaded.
    """
    folder = non_persistent_root(args, root)
    if args.non_persistent_ckpt_type != "global" or not has_tracker(folder):
        return None
    last, other = read_tracker(folder), args.ckpt_step or -1
    if not args.ckpt_step and has_tracker(root):
        other = read_tracker(Path(root))
    if other == RELEASE:
        other = 0
    if isinstance(other, int) and (not isinstance(last, int) or last >= other):
        return str(folder)
    return None
