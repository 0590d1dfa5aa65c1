"""How much a run trains altogether, in steps and samples."""

from __future__ import annotations

import argparse

from megatron_btx.common.errors import InputError


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
