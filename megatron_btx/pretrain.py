"""The training program: seed, expert, dense baseline and mixture alike.

    torchrun --nproc-per-node 8 -m megatron_btx.pretrain [Megatron's flags] [--btx-... flags]

It is Megatron's own ``megatron.training.pretrain`` with our layers and data, after checking what Megatron does not.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

from megatron_btx.cpu import install_cpu_stand_ins, prepare_environment
from megatron_btx.errors import InputError, exits_with_one_line

prepare_environment()


@exits_with_one_line
def main() -> int:
    """Train what the command line describes; see --help."""
    install_cpu_stand_ins()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from megatron_btx.data.training import train_valid_test_datasets

    args, configuration = prepare()
    if args.train_data_path or args.data_path:
        pretrain(configuration, train_valid_test_datasets, ModelType.encoder_or_decoder, forward_step)
    else:
        raise InputError("no training data: give --data-path, or --train-data-path and --valid-data-path")
    return 0


def prepare() -> tuple[Any, Any]:
    """Parse the command line, check it against the checkpoint it starts from, and describe the model to Megatron.

    Returns:
        Megatron's arguments, and its configuration container for ``pretrain``.

    Raises:
        InputError: see :mod:`megatron_btx.checkpoint.arguments` and :mod:`megatron_btx.data.training`.
    """
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_btx import metrics, repairs
    from megatron_btx.arguments import add_btx_arguments
    from megatron_btx.checkpoint.arguments import check_against_checkpoint
    from megatron_btx.data.training import check_data_files
    from megatron_btx.model.layers import torch_native_layer_spec

    args = parse_and_validate_args(add_btx_arguments)
    check_against_checkpoint(args)
    check_data_files(args)
    repairs.install()
    metrics.install(args)
    model = gpt_config_from_args(args)
    if args.transformer_impl == "local" and args.spec is None:
        model.transformer_layer_spec = torch_native_layer_spec
    return args, pretrain_cfg_container_from_args(args, model)


def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[Any, Any]:
    """One micro-batch through this stage: the per-token losses on the last one, and how to reduce them."""
    from megatron.core.utils import get_attr_wrapped_model

    from megatron_btx.data.training import get_batch

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"], loss_mask=batch["loss_mask"]
    )
    return output, functools.partial(language_model_loss, batch["loss_mask"])


def language_model_loss(loss_mask_BS: Any, losses_BS: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Sum of the per-token cross-entropies in nats, the number of tokens, and both for reporting.

    Args:
        loss_mask_BS: [B, S], 1 where a token counts.
        losses_BS: [B, S], cross-entropy per token.
    """
    import torch

    mask = loss_mask_BS.reshape(-1).float()
    total = torch.sum(losses_BS.reshape(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status) if status else sys.exit(0)
