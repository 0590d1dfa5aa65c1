"""What a command line may not be: its layout, its format of checkpoints, and what training asks of it."""

from __future__ import annotations

import argparse

from megatron_btx.common.errors import InputError
from megatron_btx.cost.layouts import ParallelSizes, check_heads


def check_layout(args: argparse.Namespace) -> None:
    """Refuse layouts and layers that Megatron's own validation lets through and that fail later, or are not honoured.

    Raises:
        InputError: names both numbers and what would fit.
    """
    sizes = ParallelSizes.of(vars(args))
    tensor, pipeline = sizes.tensor, sizes.pipeline
    refused = "Megatron refuses these arguments: "
    if check_heads(sizes, args.num_attention_heads):
        raise InputError(
            f"{refused}number of attention heads ({args.num_attention_heads}) is not a multiple of "
            f"--tensor-model-parallel-size ({tensor}); choose one that divides it"
        )
    rows = args.padded_vocab_size
    if rows and rows % tensor:
        raise InputError(
            f"the vocabulary's {rows} rows (--padded-vocab-size) are not a multiple of --tensor-model-parallel-size "
            f"({tensor}), whose ranks hold equal parts of them; convert the models with --pad-vocab-to-multiple-of "
            f"128, which adds rows, or choose a size that divides {rows}"
        )
    if args.transformer_impl == "local" and args.reset_attention_mask:
        raise InputError(
            "--reset-attention-mask: the attention of the torch-native layers is causal over the whole sequence, its "
            "documents together; use --transformer-impl transformer_engine, or leave it out"
        )
    if args.mtp_num_layers and pipeline > 1:
        raise InputError(
            f"--mtp-num-layers {args.mtp_num_layers} with --pipeline-model-parallel-size {pipeline}: batches reach the "
            "first and last stage alone; use 1, or leave multi-token prediction out"
        )
    if not args.num_experts:
        return
    if tensor > 1 and not args.sequence_parallel:
        raise InputError(
            f"{refused}experts with --tensor-model-parallel-size ({tensor}) need sequence parallelism; "
            "add --sequence-parallel"
        )
    if args.world_size % sizes.expert_ranks:
        raise InputError(
            f"{refused}world size ({args.world_size}) is not a multiple of expert tensor x expert x pipeline parallel "
            f"sizes ({sizes.expert_ranks}); start that many processes, or lower --expert-model-parallel-size "
            f"({sizes.expert})"
        )


def check_checkpoint_format(args: argparse.Namespace) -> None:
    """Refuse to write or read checkpoints that these programs could not read again.

    Megatron's other formats are pickled whole, or belong to wrappers of the model that are not used here.

    Raises:
        InputError: names the format.
    """
    touches = args.save or args.load or args.pretrained_checkpoint
    if touches and args.ckpt_format != "torch_dist":
        raise InputError(
            f"--ckpt-format {args.ckpt_format}: these programs read and write torch_dist alone, so that a run can be "
            "resumed, mixed and checked; leave the flag out"
        )


def check_budget(args: argparse.Namespace) -> None:
    """Refuse a budget of no step, and one whose last step cannot be: it would end within a batch, or is skipped.

    Raises:
        InputError: names the flag, the budget and one that fits.
    """
    if args.skip_train:
        return
    if not args.train_iters and not args.train_samples:
        raise InputError(f"--train-iters {args.train_iters}: nothing to train; give a budget of at least one step")
    steps, samples = budget_of(args)
    if not steps:
        raise InputError(
            f"--train-samples {args.train_samples}: fewer than one batch of {args.global_batch_size} "
            "(--global-batch-size); give a budget of at least one step"
        )
    if steps in args.iterations_to_skip:
        raise InputError(
            f"--iterations-to-skip {steps}: it is the last step, after which Megatron 0.19 saves nothing when it is "
            "skipped; lower the budget by a step"
        )
    if args.step_batch_size_schedule is not None and samples > args.train_samples:
        raise InputError(
            f"--train-samples {args.train_samples}: ends within a batch of --step-batch-size-schedule "
            f"{args.step_batch_size_schedule!r}, whose step {steps} ends at {samples}; give that"
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


def check_evaluation_interval(args: argparse.Namespace) -> None:
    """Refuse an interval that Megatron would divide by. Raises InputError."""
    if args.eval_interval < 1:
        raise InputError(
            f"--eval-interval {args.eval_interval}: expected 1 or more; to evaluate nothing: --eval-iters 0"
        )


def check_seed(args: argparse.Namespace) -> None:
    """Refuse a seed that Megatron does not take. Raises InputError."""
    if args.seed <= 0:
        raise InputError(f"--seed {args.seed}: Megatron takes positive seeds only; give another")


def check_bias(args: argparse.Namespace) -> None:
    """Refuse experts whose gradients Megatron cannot take. Raises InputError."""
    if args.num_experts and args.add_bias_linear and args.transformer_impl == "local":
        raise InputError(
            "experts with biases: Megatron 0.19's local layers cannot train them (core/transformer/mlp.py adds in "
            "place to a view); use --transformer-impl transformer_engine, or --disable-bias-linear without biases"
        )


def check_retention(args: argparse.Namespace) -> None:
    """Refuse to remove checkpoints where it is not clear which. Raises InputError."""
    for name in ("btx_keep_last", "btx_keep_every"):
        count = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if count is None:
            continue
        if count < 1:
            raise InputError(f"{flag} {count}: expected 1 or more; leave it out to keep all checkpoints")
        if not args.save:
            raise InputError(f"{flag} {count}: nothing is saved without --save; give --save, or leave it out")
        if args.save_retain_interval is not None:
            raise InputError(f"{flag} {count}: --save-retain-interval removes checkpoints too; leave one of them out")
    if args.btx_keep_every is not None and args.btx_keep_last is None:
        raise InputError(
            f"--btx-keep-every {args.btx_keep_every}: nothing is removed without --btx-keep-last; give that too"
        )
