"""The checkpoint that a run starts from: which one it is, and whether it fits the given arguments.

Refused are another model, routing or numerics (the tables of :mod:`megatron_btx.checkpoint.arguments`), another
vocabulary (:mod:`megatron_btx.tokenizers.comparison`), and a resume to what Megatron 0.19 cannot bring the stored
optimizer state to: it would end in a traceback out of every rank, or train on with state of other parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS, NUMERICS_ARGUMENTS, ModelArgument, differences
from megatron_btx.checkpoint.iterations import RELEASE, TRACKER, resolve_iteration, root_of
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import InputError
from megatron_btx.cost.layouts import ParallelSizes
from megatron_btx.engine.checks.arguments import budget_of
from megatron_btx.model.groups import resolve_groups
from megatron_btx.tokenizers.comparison import check_same_tokenizer
from megatron_btx.tokenizers.vocabulary import locate_tokenizer


def finished(args: argparse.Namespace) -> str | None:
    """What to say of a resumed run that has taken all its steps; None of any other.

    Megatron would stop with "no samples left to consume".
    """
    path, resumes = checkpoint_to_load(args) or ("", False)
    if args.skip_train or not resumes:
        return None
    latest, (steps, _) = step_of(path, args.override_ckpt_iteration), budget_of(args)
    return f"{args.load} has step {latest} of {steps}: nothing left to train" if latest >= steps else None


def check_against_checkpoint(args: argparse.Namespace) -> None:
    """Refuse to load a checkpoint into a model it was not made for.

    Compares the stored arguments of the checkpoint that Megatron is about to load (the run's own to resume, else
    ``--pretrained-checkpoint``) with the given ones.

    Raises:
        InputError: names every argument that differs, with both values and the flag that mends it.
    """
    args.btx_taken_steps = None
    loaded = checkpoint_to_load(args)
    if loaded is None:
        return
    path, resuming = loaded
    stored = compare_with_stored(path, vars(args), MODEL_ARGUMENTS + (NUMERICS_ARGUMENTS if resuming else ()))
    # The experts' names travel from checkpoint to checkpoint, for figures and for mixing again.
    args.btx_experts = stored.get("btx_experts")
    if resuming:
        check_resume(path, stored, vars(args), done=finished(args) is not None)
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


_MODEL_LAYOUT = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
}
_SCHEDULE = {
    "train_iters": "--train-iters",
    "global_batch_size": "--global-batch-size",
    "train_samples": "--train-samples",
    "lr_warmup_iters": "--lr-warmup-iters",
    "lr_warmup_samples": "--lr-warmup-samples",
    "lr_warmup_fraction": "--lr-warmup-fraction",
    "lr_decay_iters": "--lr-decay-iters",
    "lr_decay_samples": "--lr-decay-samples",
    "lr_decay_style": "--lr-decay-style",
    "start_weight_decay": "--weight-decay (--start-weight-decay)",
    "end_weight_decay": "--end-weight-decay",
    "weight_decay_incr_style": "--weight-decay-incr-style",
}
"""What ``core/optimizer_param_scheduler.py`` asserts to be unchanged, as steps and samples that follow from it."""
_OF_STEPS = ("train_iters", "global_batch_size", "lr_warmup_iters", "lr_decay_iters")


def check_resume(path: str, stored: Mapping[str, Any], given: Mapping[str, Any], done: bool = False) -> None:
    """Refuse to resume with what the stored optimizer state cannot be brought to.

    - The frozen groups and the groups with learning rates of their own decide which state there is; Megatron finds the
      state of a group by its rates (``core/optimizer/optimizer.py``, param_group_identifier_keys).
    - The schedule, unless one of Megatron's flags decides between the stored one and the given one.
    - Experts that are spread over ranks otherwise than the rest belong to an optimizer of their own; Megatron cannot
      turn one optimizer into two.
    - The distributed optimizer and the plain one store different things; the distributed one's default format is bound
      to the model's layout (``core/optimizer/distrib_optimizer.py``, dp_reshardable).
    - There must be state, and data for the steps that are left.

    Args:
        done: the run has no step left: it needs no state.

    Raises:
        InputError: names the flag, both values and the remedy.
    """
    anew = (
        f"or start a new stage from its weights: --pretrained-checkpoint {path}, another folder for --save and --load"
    )
    if given.get("skip_train"):
        return
    _check_samples(path, stored, given, anew)
    if given.get("no_load_optim") or (Path(path).is_dir() and resolve_iteration(path).name == RELEASE):
        return  # Megatron loads no optimizer of a release
    if stored.get("no_save_optim"):
        if done:
            return
        raise InputError(
            f"{path}: was saved without its optimizer (--no-save-optim); go on with a new one (--no-load-optim), {anew}"
        )
    # Megatron's own checkpoints have no flags of ours.
    none_of_ours: dict[str, list[str]] = {"btx_freeze": [], "btx_lr_multiplier": []}
    was_trained, trains = _describe_trained({**given, **none_of_ours, **stored}), _describe_trained(given)
    for flag, values in was_trained.items():
        if values != trains[flag]:
            raise InputError(
                f"{path}: was trained with {flag} {_listed(values)}, given {_listed(trains[flag])}, and its optimizer "
                f"state fits the former alone; resume it with that, {anew}"
            )
    _check_schedule(path, stored, given)
    experts_train = given.get("num_experts") and "experts" not in trains["--btx-freeze"]
    before, after = ParallelSizes.of(stored), ParallelSizes.of(given)
    if experts_train and before.spreads_experts != after.spreads_experts:
        counts = ("one optimizer", "two optimizers")
        raise InputError(
            f"{path}: was saved with {_spread(before)} and has {counts[before.spreads_experts]}; {_spread(after)} "
            f"needs {counts[after.spreads_experts]}; resume it with the former, {anew}"
        )
    was, now = bool(stored.get("use_distributed_optimizer")), bool(given["use_distributed_optimizer"])
    if was != now:
        raise InputError(
            f"{path}: was saved {'with' if was else 'without'} --use-distributed-optimizer; resume it the same way, "
            f"{anew}"
        )
    if was and not stored.get("dist_ckpt_optim_fully_reshardable"):
        for name, flag in _MODEL_LAYOUT.items():
            if stored.get(name) != given[name]:
                raise InputError(
                    f"{path}: its distributed optimizer was saved with {flag} {stored.get(name)} in a format bound to "
                    f"that layout, given {given[name]}; resume with {stored.get(name)} (save with "
                    f"--dist-ckpt-optim-fully-reshardable to be free), {anew}"
                )


def _describe_trained(arguments: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Flag -> what it comes to, however it is spelled, of all that decides what there is of an optimizer's state."""
    groups = resolve_groups(arguments)
    return {
        "--btx-freeze": list(groups.frozen),
        "--btx-lr-multiplier": [f"{group}={factor!r}" for group, factor in sorted(groups.multipliers.items())],
        "--lr": [arguments["lr"]],
        "--min-lr": [arguments["min_lr"]],
    }


def _listed(values: list[Any]) -> str:
    return " ".join(map(str, values)) or "(none)"


def _spread(sizes: ParallelSizes) -> str:
    return (
        f"--tensor-model-parallel-size {sizes.tensor} --expert-model-parallel-size {sizes.expert} "
        f"--expert-tensor-parallel-size {sizes.expert_tensor}"
    )


def _check_schedule(path: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Megatron stops with an assertion when the schedule changes and neither of its two flags decides."""
    if given["override_opt_param_scheduler"] or given["use_checkpoint_opt_param_scheduler"]:
        return
    for name, flag in _SCHEDULE.items():
        was, now = _scheduled(stored, name), _scheduled(given, name)
        if name in stored and was != now:
            raise InputError(
                f"{path}: its schedule was made for {flag} {was}, given {now}; take the new schedule with "
                "--override-opt-param-scheduler, or keep the stored one with --use-checkpoint-opt-param-scheduler"
            )


def _scheduled(args: Mapping[str, Any], name: str) -> Any:
    """An argument of the schedule; where Megatron fills it in late, what it will be."""
    if name in _OF_STEPS and args.get("train_samples"):
        return None  # the schedule counts samples, and what is stored of steps was worked out by Megatron
    if args.get(name) is None and name in ("lr_decay_iters", "lr_decay_samples"):
        return args.get(name.replace("lr_decay", "train"))
    return args.get(name)


def _check_samples(path: str, stored: Mapping[str, Any], given: Mapping[str, Any], anew: str) -> None:
    """Refuse batches of another size where Megatron would count on samples that its dataset does not have.

    It makes a dataset of as many samples as the whole budget has at the present size of a batch, whatever sizes there
    were before (``training/training.py``, update_train_iters and get_train_valid_test_num_samples).
    """
    if given.get("override_ckpt_iteration") is not None:  # Megatron then counts anew, and refuses another size itself
        return
    in_samples = bool(given.get("train_samples"))
    for name, flag in (
        ("global_batch_size", "--global-batch-size"),
        ("step_batch_size_schedule", "--step-batch-size-schedule"),
    ):
        was, now = stored.get(name), given.get(name)
        if in_samples and was != now:
            raise InputError(
                f"{path}: was trained with {flag} {was}, given {now}: the steps of --train-samples are counted with "
                f"one size of batches; resume it with the former, {anew}"
            )
    consumed, batch = stored.get("consumed_train_samples", 0), given["global_batch_size"]
    if consumed and not in_samples and consumed > step_of(path) * batch:
        raise InputError(
            f"{path}: has read {consumed} samples in {step_of(path)} steps; with --global-batch-size {batch} Megatron "
            f"prepares fewer than are left to read; resume it with {stored.get('global_batch_size')} or more, {anew}"
        )


def step_of(path: str, override: int | None = None) -> int:
    """The finished steps of a checkpoint, a root or one iteration; 0 for a release.

    Args:
        override: ``--override-ckpt-iteration``, which wins.
    """
    if override is not None:
        return override
    number = resolve_iteration(path).name.removeprefix("iter_")
    return int(number) if number.isdecimal() else 0
