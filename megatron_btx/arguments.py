"""The flags this project adds to Megatron's: only for what Megatron cannot say, all starting with ``--btx-``."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from megatron_btx.cpu import CPU_DEFAULTS, has_gpu
from megatron_btx.errors import InputError

TORCH_NATIVE_DEFAULTS: dict[str, Any] = {
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}
"""Defaults where neither Transformer Engine nor apex is installed: their fused kernels do not exist there."""

UNCOMPILED_DEFAULTS: dict[str, Any] = {
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
}
"""Defaults on the CPU, where Megatron's torch.compile'd functions are not compiled and only cost detours."""


def add_btx_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser, and this machine's defaults to Megatron's own flags.

    Defaults depend on what is installed; whatever they are, they are stored in the checkpoint and compared on resume
    (:mod:`megatron_btx.checkpoint.arguments`), so that a run cannot change numerics by moving to another machine.
    """
    group = parser.add_argument_group("megatron_btx", "Branch-Train-MiX on top of Megatron-core")
    group.add_argument(
        "--btx-metrics",
        metavar="FILE",
        default=None,
        help="append one JSON object per training step to FILE: every scalar that Megatron logs, in full precision "
        "(default: none)",
    )
    group.add_argument(
        "--btx-allow-change",
        metavar="ARGUMENT",
        nargs="+",
        default=[],
        help="names of stored model arguments (as norm_epsilon) that may differ from those of the checkpoint that is "
        "loaded; without it a difference that would silently change the model is refused (default: none)",
    )
    add_evaluation_arguments(parser)
    parser.set_defaults(**machine_defaults())
    return parser


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``megatron_btx.evaluate``; they stand in the same parser so that --help shows all."""
    group = parser.add_argument_group("megatron_btx evaluation", "used by python -m megatron_btx.evaluate")
    group.add_argument(
        "--btx-eval-model",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        default=[],
        help="a checkpoint to evaluate, and the name it gets in the results; repeat for several of one architecture",
    )
    group.add_argument(
        "--btx-eval-data",
        metavar="DOMAIN=PREFIX",
        nargs="+",
        action="extend",
        default=[],
        help="an indexed dataset (prefix of .bin and .idx), and the domain it stands for",
    )
    group.add_argument(
        "--btx-eval-tokens",
        metavar="TOKENS",
        type=int,
        default=65536,
        help="tokens per domain, rounded down to whole batches of sequences, from the start of each dataset "
        "(default: 65536)",
    )
    group.add_argument(
        "--btx-eval-output", metavar="FILE", default=None, help="where to write the results as JSON (required)"
    )


def machine_defaults() -> dict[str, Any]:
    """Defaults for Megatron's flags that follow from what this machine has (a GPU, Transformer Engine, apex)."""
    # Megatron 0.19 has no default for the evaluation interval and divides by it even with --eval-iters 0.
    defaults: dict[str, Any] = {"eval_interval": 1000}
    if not has_gpu():
        defaults |= CPU_DEFAULTS | TORCH_NATIVE_DEFAULTS | UNCOMPILED_DEFAULTS
    elif find_spec("transformer_engine") is None:
        defaults |= TORCH_NATIVE_DEFAULTS
    return defaults


def check_layout(args: Any) -> None:
    """Refuse layouts that Megatron's own validation lets through and that fail later, on every rank, in its depths.

    Raises:
        InputError: names both numbers and what would fit.
    """
    tensor, expert, pipeline = (
        args.tensor_model_parallel_size,
        args.expert_model_parallel_size,
        args.pipeline_model_parallel_size,
    )
    refused = "Megatron refuses these arguments: "
    if args.num_attention_heads % tensor:
        raise InputError(
            f"{refused}number of attention heads ({args.num_attention_heads}) is not a multiple of "
            f"--tensor-model-parallel-size ({tensor}); choose one that divides it"
        )
    if not args.num_experts:
        return
    if tensor > 1 and not args.sequence_parallel:
        raise InputError(
            f"{refused}experts with --tensor-model-parallel-size ({tensor}) need sequence parallelism; "
            "add --sequence-parallel"
        )
    expert_ranks = (args.expert_tensor_parallel_size or tensor) * expert * pipeline
    if args.world_size % expert_ranks:
        raise InputError(
            f"{refused}world size ({args.world_size}) is not a multiple of expert tensor x expert x pipeline parallel "
            f"sizes ({expert_ranks}); start that many processes, or lower --expert-model-parallel-size ({expert})"
        )
