"""Checks of the training program alone: its evaluation interval, its seed, experts with biases."""

from __future__ import annotations

import argparse

from megatron_btx.ground.errors import InputError


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
