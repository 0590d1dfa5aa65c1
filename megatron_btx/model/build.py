"""The model as Megatron builds it: its configuration with our layers and routers, and its chunks on this rank."""

from __future__ import annotations

import argparse
import copy
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, refused

if TYPE_CHECKING:
    from megatron_btx.model.sampling import Step


def model_config(args: argparse.Namespace, step: Step | None = None) -> Any:
    """The model as Megatron's GPTModelConfig, with our layers and routers where they were asked for.

    Raises:
        InputError: Megatron's configuration refuses it, or two flags want different layers.
    """
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_btx.model.layers import layer_specs
    from megatron_btx.model.routers import settings_from
    from megatron_btx.model.sampling import Step

    try:
        model = gpt_config_from_args(args)
        copy.deepcopy(model).finalize()  # as the builder of the model will do, with the last of its checks
    except (AssertionError, ValueError) as refusal:
        raise refused(refusal) from refusal
    # Megatron 0.19 parses this flag and does not pass it on.
    model.rope_scaling_factor = args.rope_scaling_factor
    settings = settings_from(args)
    if settings is not None and args.spec is not None:
        raise InputError("--spec together with routers of --btx-...: they are built into Megatron's own layers")
    if args.spec is None and (settings is not None or args.transformer_impl == "local"):
        model.transformer_layer_spec = layer_specs(settings, step or Step())
    return model


def build_model(args: argparse.Namespace) -> list[Any]:
    """The model chunks of this rank, without gradients, buffers or optimizer."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    config = model_config(args)
    config.finalize()
    model = GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    for chunk in model:
        chunk.eval()
    return model
