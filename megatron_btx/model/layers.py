"""Megatron's local layers with what torch has: norms that accept sequence parallelism, and flash attention.

Without Transformer Engine and apex, Megatron-core's ``local`` layers (``core/models/gpt/gpt_layer_specs.py``) refuse
sequence parallelism in their norms, which tensor parallelism with experts demands, and compute attention with the whole
score matrix. Both are replaced here, in the specification alone; parameter names, shapes and checkpoint keys stay
Megatron's. ``--transformer-impl transformer_engine`` is left untouched.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_btx.common.errors import InputError
from megatron_btx.model.routers import RouterSettings, with_routers
from megatron_btx.model.sampling import Step

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig


def torch_native_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """The layers of one pipeline stage, for ``GPTModelConfig.transformer_layer_spec``.

    Dense and mixture-of-experts models alike; ``moe_layer_freq`` is honoured by Megatron's own block specification.
    What only Transformer Engine has is refused before (``engine/checks/unsupported_flags.py``).
    """
    transformer = config.transformer
    block = get_gpt_decoder_block_spec(
        transformer,
        use_transformer_engine=False,
        normalization=transformer.normalization,
        qk_l2_norm=transformer.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return TransformerBlockSubmodules(
        layer_specs=[_with_torch_parts(spec, transformer) for spec in block.layer_specs], layer_norm=TorchNorm
    )


def layer_specs(settings: RouterSettings, step: Step) -> Any:
    """As :func:`torch_native_layer_spec`, or Transformer Engine's layers where they were asked for, with our routers.

    Returns:
        a function for ``GPTModelConfig.transformer_layer_spec``.
    """

    def with_our_routers(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
        transformer = config.transformer
        if transformer.transformer_impl == "local":
            block = torch_native_layer_spec(config, vp_stage)
        else:
            block = get_gpt_decoder_block_spec(
                transformer,
                use_transformer_engine=True,
                normalization=transformer.normalization,
                qk_l2_norm=transformer.qk_l2_norm,
                vp_stage=vp_stage,
            )
        return with_routers(block, transformer, settings, step, vp_stage)

    return with_our_routers


def _with_torch_parts(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    layer: TransformerLayerSubmodules = spec.submodules
    attention: SelfAttentionSubmodules = layer.self_attention.submodules
    norm_if_present = {
        name: TorchNorm for name in ("q_layernorm", "k_layernorm") if config.qk_layernorm and not config.qk_l2_norm
    }
    new_attention = dataclasses.replace(attention, core_attention=FlashAttention, **norm_if_present)
    self_attention = dataclasses.replace(layer.self_attention, submodules=new_attention)
    new_layer = dataclasses.replace(
        layer, input_layernorm=TorchNorm, pre_mlp_layernorm=TorchNorm, self_attention=self_attention
    )
    return dataclasses.replace(spec, submodules=new_layer)


class TorchNorm:
    """torch's LayerNorm or RMSNorm whose weights know about sequence parallelism.

    Under sequence parallelism every tensor-parallel rank sees a part of the tokens, so the gradients of norm weights
    have to be summed over the ranks. Megatron does that for parameters marked ``sequence_parallel``
    (``core/distributed/finalize_model_grads.py``); the mark is all that the stock torch norm lacks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        norms: dict[str, type[torch.nn.Module]] = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)  # type: ignore[call-arg]
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class FlashAttention(DotProductAttention):
    """Causal attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Same arguments and results as Megatron's DotProductAttention, without materialising the [S, S] scores: torch
    picks flash or memory-efficient kernels. Numbers differ from the stock layer by rounding alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            attention_dropout,
            softmax_scale,
            cp_comm_type,
            pg_collection,
        )
        if attention_type != "self":
            raise InputError(f"attention type {attention_type}: the torch-native layers have causal self-attention")
        self.dropout_p: float = self.attention_dropout.p
        if config.apply_query_key_layer_scaling:
            # The stock layer divides the scores by the layer number and multiplies them again in the softmax, to keep
            # fp16 in range; fused kernels accumulate in fp32 and need neither.
            self.softmax_scale *= self.layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend causally.

        Args:
            query: [S, B, heads on this rank, head size].
            key, value: [S, B, query groups on this rank, head size].
            attention_mask: ignored; the mask is causal.

        Returns:
            [S, B, heads on this rank x head size].

        Raises:
            InputError: packed sequences, which need Transformer Engine.
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise InputError("packed sequences and attention biases need --transformer-impl transformer_engine")
        dropout = self.dropout_p if self.training else 0.0
        # Without sequence parallelism the dropout of every tensor-parallel rank must differ: Megatron's forked state.
        forked = dropout > 0.0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if forked else torch.autograd.profiler.record_function("attention"):
            context = torch.nn.functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=key.size(2) != query.size(2),
            )
        seq_length, batch = query.shape[:2]
        return context.permute(2, 0, 1, 3).reshape(seq_length, batch, self.hidden_size_per_partition)
