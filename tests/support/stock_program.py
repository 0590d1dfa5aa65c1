"""A training program as anyone has it: Megatron's pretrain with its own layers, none of this package's checks.

Only what the wheel and a machine without a GPU need comes from the package: the stand-ins, defaults of flags for such a
machine, the dataset helper, the data and the metrics.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron_btx.engine.cpu import install_cpu_stand_ins, prepare_environment

prepare_environment()


def main() -> int:
    """Train as the command line says."""
    install_cpu_stand_ins()
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_btx.data.training import datasets_for
    from megatron_btx.distributed.abort import Stopping
    from megatron_btx.engine import repairs
    from megatron_btx.engine.flags import add_btx_arguments
    from megatron_btx.model.routers import settings_from, with_routers
    from megatron_btx.model.sampling import Step
    from megatron_btx.model.step import forward_step
    from megatron_btx.training.hooks import install_callbacks
    from megatron_btx.training.metrics import write_metrics

    args = parse_and_validate_args(add_btx_arguments)
    repairs.use_the_shipped_dataset_helper()
    install_callbacks(write_metrics(args))
    model = gpt_config_from_args(args)
    step, settings = Step(), settings_from(args)
    if settings is not None:  # the one thing of ours that may go into Megatron's own layers

        def injected(config: Any, vp_stage: int | None = None) -> Any:
            named = {"use_transformer_engine": False, "normalization": config.transformer.normalization}
            block = get_gpt_decoder_block_spec(config.transformer, vp_stage=vp_stage, **named)
            return with_routers(block, config.transformer, settings, step, vp_stage)

        model.transformer_layer_spec = injected
    config = pretrain_cfg_container_from_args(args, model)
    forward = functools.partial(forward_step, step=step)
    pretrain(config, datasets_for(Stopping()), ModelType.encoder_or_decoder, forward)
    return 0
