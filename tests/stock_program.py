"""A training program as anyone has it: Megatron's pretrain with its own layers, none of this package's checks.

Only what the wheel and a machine without a GPU need comes from the package: the stand-ins, defaults of flags for such a
machine, the dataset helper, the data and the metrics.
"""

from __future__ import annotations

from megatron_btx.cpu import install_cpu_stand_ins, prepare_environment

prepare_environment()


def main() -> int:
    """Train as the command line says."""
    install_cpu_stand_ins()
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_btx import metrics, repairs
    from megatron_btx.arguments import add_btx_arguments
    from megatron_btx.data.training import train_valid_test_datasets
    from megatron_btx.pretrain import forward_step

    args = parse_and_validate_args(add_btx_arguments)
    repairs.use_the_shipped_dataset_helper()
    metrics.install(args)
    model = gpt_config_from_args(args)
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, train_valid_test_datasets, ModelType.encoder_or_decoder, forward_step)
    return 0
