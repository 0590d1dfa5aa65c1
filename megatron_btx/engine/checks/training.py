"""Checks of the training program alone: its evaluation interval, its seed, experts with biases, old
checkpoints."""

from __future__ import annotations

import argparse

from megatron_btx.common.errors import InputError


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
