"""Layouts and checkpoint formats that these programs cannot train with."""

from __future__ import annotations

import argparse

from megatron_btx.common.errors import InputError


def check_layout(args: argparse.Namespace) -> None:
    """Refuse layouts and layers that Megatron's own validation lets through and that fail later, or are not honoured.

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
    expert_ranks = (args.expert_tensor_parallel_size or tensor) * expert * pipeline
    if args.world_size % expert_ranks:
        raise InputError(
            f"{refused}world size ({args.world_size}) is not a multiple of expert tensor x expert x pipeline parallel "
            f"sizes ({expert_ranks}); start that many processes, or lower --expert-model-parallel-size ({expert})"
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
