"""Parts of torch for the slots of Megatron's local layers: norms that accept sequence parallelism, and attention.

Without Transformer Engine and apex, Megatron-core's ``local`` layers (``core/models/gpt/gpt_layer_specs.py``) refuse
sequence parallelism in their norms, which tensor parallelism with experts demands, and compute attention with the whole
score matrix. Parameter names, shapes and checkpoint keys stay Megatron's.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_btx.common.errors import InputError


class TorchNorm:
    """torch's LayerNorm or RMSNorm whose weights know about sequence parallelism.

    Under sequence parallelism every tensor-parallel rank sees a part of the tokens, so the gradients of norm weights
    have to be summed over the ranks. Megatron does that for parameters marked ``sequence_parallel``
    (``core/distributed/finalize_model_grads.py``); the mark is all that the stock torch norm lacks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:  # type: ignore[misc]
        norms: dict[str, type[torch.nn.Module]] = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)  # type: ignore[call-arg]
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class TorchAttention(DotProductAttention):
    """Causal attention by ``torch.nn.functional.scaled_dot_product_attention``.

    Same arguments and results as Megatron's DotProductAttention. torch picks the kernel: flash or memory-efficient ones
    never hold the [S, S] scores. Numbers differ from the stock layer by rounding alone.
    """

    def __init__(self, config: TransformerConfig, *given: object, **named: object) -> None:
        super().__init__(config, *given, **named)
        if self.attention_type != "self":
            raise InputError(
                f"attention type {self.attention_type}: the torch-native layers have causal self-attention"
            )
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
        attn_mask_type: object = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object = None,
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
