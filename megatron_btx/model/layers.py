"""The layers of a model: what stands in the slots that Megatron's specification of a layer leaves open.

By ``--transformer-impl``: torch's parts in Megatron's local layers, or Transformer Engine's layers as Megatron has
them. Our routers go into either. Nothing else of a layer is replaced. What Transformer Engine alone has is refused
before (``engine/checks/arguments.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_btx.model.routers import RouterSettings, with_routers
from megatron_btx.model.sampling import Step
from megatron_btx.model.torch_parts import TorchAttention, TorchNorm

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig


def layer_specs(settings: RouterSettings | None, step: Step) -> Callable[..., TransformerBlockSubmodules]:
    """The layers of a pipeline stage, as a function for ``GPTModelConfig.transformer_layer_spec``.

    Dense and mixture-of-experts models alike; ``moe_layer_freq`` is honoured by Megatron's own block specification.

    Args:
        settings: of our routers; None for Megatron's.
    """

    def specs(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        transformer = config.transformer
        is_local = transformer.transformer_impl == "local"
        block = get_gpt_decoder_block_spec(
            transformer,
            use_transformer_engine=not is_local,
            normalization=transformer.normalization,
            qk_l2_norm=transformer.qk_l2_norm,
            vp_stage=vp_stage,
        )
        if is_local:
            layers = [_with_torch_parts(spec, transformer) for spec in block.layer_specs]
            block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm)
        if settings is not None:
            block = with_routers(block, transformer, settings, step, vp_stage)
        return block

    return specs


def _with_torch_parts(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    layer = spec.submodules
    slots: dict[str, type] = {"core_attention": TorchAttention}
    if config.qk_layernorm and not config.qk_l2_norm:
        slots |= {"q_layernorm": TorchNorm, "k_layernorm": TorchNorm}
    attention = dataclasses.replace(layer.self_attention.submodules, **slots)
    layer = dataclasses.replace(
        layer,
        input_layernorm=TorchNorm,
        pre_mlp_layernorm=TorchNorm,
        self_attention=dataclasses.replace(layer.self_attention, submodules=attention),
    )
    return dataclasses.replace(spec, submodules=layer)
