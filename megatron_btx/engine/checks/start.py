"""The checkpoint that a run starts from: which one it is, and whether it fits the given arguments.

Refused are another model, routing or numerics (the tables of :mod:`megatron_btx.checkpoint.arguments`) and another
vocabulary (:mod:`megatron_btx.tokenizers.comparison`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.arguments import (
    MODEL_ARGUMENTS,
    NUMERICS_ARGUMENTS,
    ModelArgument,
    differences,
)
from megatron_btx.checkpoint.iterations import RELEASE, TRACKER, resolve_iteration, root_of
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import InputError
from megatron_btx.engine.budget import budget_of
from megatron_btx.engine.checks.resume import check_resume, step_of
from megatron_btx.model.groups import TrainedGroups
from megatron_btx.tokenizers.comparison import check_same_tokenizer
from megatron_btx.tokenizers.path import locate_tokenizer


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
    """
    if args.load and (Path(args.load) / TRACKER).is_file():
        return iteration_of(args.load, args.ckpt_step), not args.finetune
    if args.pretrained_checkpoint:
        return iteration_of(args.pretrained_checkpoint, args.ckpt_step), False
    if args.load and args.ckpt_step:
        return iteration_of(args.load, args.ckpt_step), not args.finetune
    return None


def iteration_of(root: str, step: int | None) -> str:
    """The root itself, or the folder of the step that ``--ckpt-step`` asks for; a release has no steps."""
    tracker = Path(root) / TRACKER
    if not step or (tracker.is_file() and tracker.read_bytes()[:40].strip() == RELEASE.encode()):
        return root
    return str(Path(root) / f"iter_{step:07d}")
