"""Flags that Megatron 0.19.2 takes and that do nothing here, or end in a traceback after a while: refused in one line.

The checks read the parsed arguments alone, so that a recipe's stages can be checked before the first of them runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from importlib.util import find_spec

from megatron_btx.common.errors import InputError

_OWN_DATA = "these programs train on indexed datasets alone (--train-data-path, --data-path); leave it out"
# Its loss functions and datasets are in a script of Megatron's repository, not in its wheel.
_ELSEWHERE = "belongs to a program of Megatron's repository and does nothing here; leave it out"
_NOT_IN_WHEEL = "needs a module that Megatron's wheel lacks; leave it out"
_NEEDS_ENGINE = "Megatron 0.19 looks for layers of Transformer Engine, which is not installed; leave it out"
_ENGINE_ALONE = "only Transformer Engine has it here; use --transformer-impl transformer_engine, or leave it out"
_NEEDS_OPTIMIZER = "needs an optimizer of Transformer Engine, which is not installed; leave it out"
_NEEDS_DEEP_EP = "needs the package deep_ep, which is not installed; use alltoall"

Refusal = tuple[str, bool, str]
"""A flag, whether it is given where it is of no use, and why, with what to do."""


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what is of no use, before a run costs anything.

    Raises:
        InputError: names the flag, why, and what to do.
    """
    for refusals in (_of_other_programs(args), _of_the_budget(args), _of_the_rates(args), _that_fail_late(args)):
        for flag, given, why in refusals:
            if given:
                raise InputError(f"{flag}: {why}")


def _of_other_programs(args: argparse.Namespace) -> Iterator[Refusal]:
    """What other datasets and loss functions than ours would read."""
    yield "--dataloader-type external", args.dataloader_type == "external", _OWN_DATA
    yield "--mock-data", args.mock_data, _OWN_DATA
    yield "--sft", args.sft, _OWN_DATA
    yield "--fim-data", args.fim_data, _OWN_DATA
    yield "--dataloader-inter-document-masking", args.dataloader_inter_document_masking, _ELSEWHERE
    yield "--hybrid-context-parallel", args.hybrid_context_parallel, _ELSEWHERE
    yield "--perform-rl-step", args.perform_rl_step, _ELSEWHERE
    yield (
        "--inprocess-restart",
        args.inprocess_restart,
        "is put around Megatron's own scripts and does nothing here; leave it out, torchrun --max-restarts and Slurm "
        "start a run again",
    )


def _of_the_budget(args: argparse.Namespace) -> Iterator[Refusal]:
    """What Megatron counts in samples alone, or counts no more."""
    in_steps = bool(args.train_iters)
    yield (
        "--rampup-batch-size",
        args.rampup_batch_size is not None,
        "does nothing in Megatron 0.19; use --train-samples and --step-batch-size-schedule",
    )
    yield (
        "--step-batch-size-schedule",
        args.step_batch_size_schedule is not None and in_steps,
        "with --train-iters Megatron prepares data for the first batch size alone; give --train-samples",
    )
    yield (
        "--phase-transition-iterations",
        bool(args.phase_transition_iterations) and in_steps,
        "Megatron counts phases in samples; give --train-samples in place of --train-iters",
    )


def _of_the_rates(args: argparse.Namespace) -> Iterator[Refusal]:
    """What Megatron asserts without a word when the model is there (``core/optimizer_param_scheduler.py``)."""
    if args.skip_train or args.lr is None:
        return
    unit = "iters" if args.train_iters else "samples"
    steps = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}") or math.inf
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * steps
    without = args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None
    yield f"the warmup of {warmup:g} {unit}", warmup >= steps, f"give fewer than the {steps} of the whole schedule"
    yield "--lr-warmup-init", args.lr_warmup_init > args.lr, f"is above --lr {args.lr:g}; give less"
    yield "--min-lr", args.min_lr < 0, "is below 0; give 0 or more"
    yield "--lr-decay-style WSD", without, f"needs --lr-wsd-decay-{unit}, too"


def _that_fail_late(args: argparse.Namespace) -> Iterator[Refusal]:
    """What ends in a traceback: at the first evaluation, the first save, or the next start."""
    local, has_engine = args.transformer_impl == "local", find_spec("transformer_engine") is not None
    without_engine = local and not has_engine
    yield "--context-parallel-size", local and args.context_parallel_size > 1, _ENGINE_ALONE
    yield "--window-size", local and args.window_size is not None, _ENGINE_ALONE
    yield "--softmax-type", local and args.softmax_type != "vanilla", _ENGINE_ALONE
    yield "--fp8-format", local and bool(args.fp8), _ENGINE_ALONE
    yield "--fp4-format", local and bool(args.fp4), _ENGINE_ALONE
    yield "--multi-latent-attention", local and args.multi_latent_attention, _ENGINE_ALONE
    yield "--moe-router-fusion", args.moe_router_fusion and not has_engine, _NEEDS_ENGINE
    deep = args.moe_token_dispatcher_type == "flex" and args.moe_flex_dispatcher_backend != "ncclep"
    yield "--moe-token-dispatcher-type flex", deep and find_spec("deep_ep") is None, _NEEDS_DEEP_EP
    yield "--apply-layernorm-1p", local and args.layernorm_zero_centered_gamma, _ENGINE_ALONE
    has_fused = has_engine or find_spec("apex") is not None
    yield "--use-precision-aware-optimizer", args.use_precision_aware_optimizer and not has_fused, _NEEDS_OPTIMIZER
    yield "--optimizer-cuda-graph", args.optimizer_cuda_graph and not has_fused, _NEEDS_OPTIMIZER
    yield "--logits-save-dir", args.logits_save_dir is not None, _NOT_IN_WHEEL
    yield "--logits-load-dir", args.logits_load_dir is not None, _NOT_IN_WHEEL
    yield "--save-activations-interval", args.save_activations_interval is not None and without_engine, _NEEDS_ENGINE
    yield "--save-dgrads-interval", args.save_dgrads_interval is not None and without_engine, _NEEDS_ENGINE
    yield (
        "--enable-ft-package",
        args.enable_ft_package and find_spec("nvidia_resiliency_ext") is None,
        "needs the package nvidia-resiliency-ext, which is not installed; install it, or leave it out",
    )
    yield (
        "--rerun-mode report_stats",
        args.rerun_mode == "report_stats",
        "Megatron 0.19 takes the word and does not know it; leave it out",
    )
    yield (
        "--full-validation",
        args.full_validation and not args.multiple_validation_sets,
        "fails on one validation set in Megatron 0.19; add --multiple-validation-sets, or use --btx-valid-data",
    )
    yield (
        "--multiple-validation-sets",
        args.multiple_validation_sets and not args.full_validation,
        "is not written in Megatron 0.19 without --full-validation; add that, or use --btx-valid-data",
    )
    yield (
        "--optimizer sgd",
        args.optimizer == "sgd" and bool(args.save or args.use_distributed_optimizer),
        "Megatron 0.19 cannot resume it; use adam, or leave out --save and --use-distributed-optimizer",
    )
    yield (
        f"--optimizer {args.optimizer}",
        args.optimizer not in ("adam", "sgd") and find_spec("emerging_optimizers") is None,
        "needs the package emerging-optimizers, which is not installed; install it, or use adam",
    )
