"""What a command line may not be, in one line before any rank trains: what does nothing here, or fails late.

Rows read the parsed arguments alone, so that a recipe's stages can be checked before the first of them runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from importlib.util import find_spec

from megatron_btx.cost.layouts import ParallelSizes

_OWN_DATA = "these programs train on indexed datasets alone (--train-data-path, --data-path); leave it out"
# Its loss functions and datasets are in a script of Megatron's repository, not in its wheel.
_ELSEWHERE = "belongs to a program of Megatron's repository and does nothing here; leave it out"
_NOT_IN_WHEEL = "needs a module that Megatron's wheel lacks; leave it out"
_NEEDS_ENGINE = "Megatron 0.19 looks for layers of Transformer Engine, which is not installed; leave it out"
_ENGINE_ALONE = "only Transformer Engine has it here; use --transformer-impl transformer_engine, or leave it out"
_NEEDS_OPTIMIZER = "needs an optimizer of Transformer Engine, which is not installed; leave it out"
_NEEDS_DEEP_EP = "needs the package deep_ep, which is not installed; use alltoall"
_REFUSED = "Megatron refuses these arguments"

Refusal = tuple[str, bool, str]
"""What was given, whether it is of no use, and why, with what to do. Rows are made one by one, until one is."""


def of_formats(args: argparse.Namespace) -> Iterator[Refusal]:
    """Checkpoints that these programs could not read again: pickled whole, or of wrappers that are not used here."""
    touches = bool(args.save or args.load or args.pretrained_checkpoint)
    yield (
        f"--ckpt-format {args.ckpt_format}",
        touches and args.ckpt_format != "torch_dist",
        "these programs read and write torch_dist alone, so that a run can be resumed, mixed and checked; leave the "
        "flag out",
    )


def of_layout(args: argparse.Namespace) -> Iterator[Refusal]:
    """Layouts and layers that Megatron's own validation lets through and that fail later, or are not honoured."""
    sizes, rows = ParallelSizes.of(vars(args)), args.padded_vocab_size
    yield (
        _REFUSED,
        args.num_attention_heads % sizes.tensor != 0,
        f"number of attention heads ({args.num_attention_heads}) is not a multiple of --tensor-model-parallel-size "
        f"({sizes.tensor}); choose one that divides it",
    )
    yield (
        f"--padded-vocab-size {rows}",
        bool(rows and rows % sizes.tensor),
        f"the vocabulary's rows are no multiple of --tensor-model-parallel-size ({sizes.tensor}), whose ranks hold "
        "equal parts of them; convert the models with --pad-vocab-to-multiple-of 128, which adds rows, or choose a "
        f"size that divides {rows}",
    )
    yield (
        "--reset-attention-mask",
        args.transformer_impl == "local" and args.reset_attention_mask,
        "the attention of the torch-native layers is causal over the whole sequence, its documents together; use "
        "--transformer-impl transformer_engine, or leave it out",
    )
    yield (
        f"--mtp-num-layers {args.mtp_num_layers} with --pipeline-model-parallel-size {sizes.pipeline}",
        bool(args.mtp_num_layers and sizes.pipeline > 1),
        "batches reach the first and last stage alone; use 1, or leave multi-token prediction out",
    )
    if not args.num_experts:
        return
    yield (
        _REFUSED,
        sizes.tensor > 1 and not args.sequence_parallel,
        f"experts with --tensor-model-parallel-size ({sizes.tensor}) need sequence parallelism; add "
        "--sequence-parallel",
    )
    yield (
        _REFUSED,
        args.world_size % sizes.expert_ranks != 0,
        f"world size ({args.world_size}) is not a multiple of expert tensor x expert x pipeline parallel sizes "
        f"({sizes.expert_ranks}); start that many processes, or lower --expert-model-parallel-size ({sizes.expert})",
    )


def of_other_programs(args: argparse.Namespace) -> Iterator[Refusal]:
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


def of_the_schedule(args: argparse.Namespace) -> Iterator[Refusal]:
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


def of_rates(args: argparse.Namespace) -> Iterator[Refusal]:
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


def that_fail_late(args: argparse.Namespace) -> Iterator[Refusal]:
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


def of_budget(args: argparse.Namespace) -> Iterator[Refusal]:
    """A budget of no step, and one whose last step cannot be: it would end within a batch, or is skipped."""
    if args.skip_train:
        return
    yield (
        f"--train-iters {args.train_iters}",
        not args.train_iters and not args.train_samples,
        "nothing to train; give a budget of at least one step",
    )
    steps, samples = budget_of(args)
    yield (
        f"--train-samples {args.train_samples}",
        not steps,
        f"fewer than one batch of {args.global_batch_size} (--global-batch-size); give a budget of at least one step",
    )
    yield (
        f"--iterations-to-skip {steps}",
        steps in args.iterations_to_skip,
        "it is the last step, after which Megatron 0.19 saves nothing when it is skipped; lower the budget by a step",
    )
    yield (
        f"--train-samples {args.train_samples}",
        args.step_batch_size_schedule is not None and samples > args.train_samples,
        f"ends within a batch of --step-batch-size-schedule {args.step_batch_size_schedule!r}, whose step {steps} ends "
        f"at {samples}; give that",
    )


def budget_of(args: argparse.Namespace) -> tuple[int, int]:
    """Steps and samples of the whole run; Megatron works the steps out late where the budget is given in samples.

    Its calculator of micro-batches, which knows the schedule of batch sizes, must be there: it is once the arguments
    are parsed. Source: ``training/training.py``, update_train_iters.
    """
    if args.train_iters or args.step_batch_size_schedule is None:
        steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
        return steps, steps * args.global_batch_size
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches

    steps = samples = 0
    while samples < args.train_samples:
        update_num_microbatches(samples, consistency_check=False)
        samples += get_current_global_batch_size()
        steps += 1
    update_num_microbatches(0, consistency_check=False)
    return steps, samples


def of_training(args: argparse.Namespace) -> Iterator[Refusal]:
    """What Megatron would divide by, does not take, or cannot train."""
    yield (
        f"--eval-interval {args.eval_interval}",
        args.eval_interval < 1,
        "expected 1 or more; to evaluate nothing: --eval-iters 0",
    )
    yield f"--seed {args.seed}", args.seed <= 0, "Megatron takes positive seeds only; give another"
    yield (
        "experts with biases",
        bool(args.num_experts and args.add_bias_linear and args.transformer_impl == "local"),
        "Megatron 0.19's local layers cannot train them (core/transformer/mlp.py adds in place to a view); use "
        "--transformer-impl transformer_engine, or --disable-bias-linear without biases",
    )


def of_retention(args: argparse.Namespace) -> Iterator[Refusal]:
    """Removing checkpoints where it is not clear which."""
    for flag, count in (("--btx-keep-last", args.btx_keep_last), ("--btx-keep-every", args.btx_keep_every)):
        if count is None:
            continue
        given = f"{flag} {count}"
        yield given, count < 1, "expected 1 or more; leave it out to keep all checkpoints"
        yield given, not args.save, "nothing is saved without --save; give --save, or leave it out"
        both = args.save_retain_interval is not None
        yield given, both, "--save-retain-interval removes checkpoints too; leave one of them out"
    alone = args.btx_keep_every is not None and args.btx_keep_last is None
    yield f"--btx-keep-every {args.btx_keep_every}", alone, "nothing is removed without --btx-keep-last; give that too"
