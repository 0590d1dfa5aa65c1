"""The Megatron arguments that shape a model: one table for comparing, refusing and writing them.

A checkpoint stores all arguments of the run that wrote it. Megatron's ``--use-checkpoint-args`` restores only some of
them and ignores differences in the rest (norm epsilon, rope scaling, QK norm, router settings), which silently changes
the model. Everything that has to know which arguments matter reads :data:`MODEL_ARGUMENTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelArgument:
    """One stored argument, the flag that sets it, and how the flag is written."""

    name: str
    """Name in Megatron's namespace (0.19)."""
    flag: str
    default: Any
    """Megatron's default: the flag is left out when the stored value equals it."""
    switch: bool | None = None
    """None: the flag takes the value. True or False: the flag alone sets this value."""
    older: str | None = None
    """The name in older versions, where it differs."""
    bridge: str | None = None
    """The field in Megatron's configuration classes, which Megatron-Bridge and NeMo 2 write, where it differs."""
    moe: bool = False
    """Only meaningful for mixtures: not compared between dense models."""
    shapes: bool = False
    """Decides which tensors the model has, or their shapes: weights of another model cannot be loaded.

    Not so the padded vocabulary: Megatron loads tables of another length. The longest position decides a shape only
    where positions are learned.
    """
    usage: bool = False
    """Says how routers are used. A mixture that was never trained leaves it open: its routers know nothing of it."""

    def value(self, stored: Mapping[str, Any]) -> Any:
        """The stored value, under its present or older name; Megatron's default where neither is there."""
        if self.name in stored:
            return stored[self.name]
        if self.older:
            return stored.get(self.older, self.default)
        return self.default

    def as_flags(self, value: Any) -> list[str]:
        """The words of the command line that set ``value``; none for the default."""
        if value == self.default or value is None:
            return []
        if self.switch is not None:
            if value is self.switch:
                return [self.flag]
            return []
        # Megatron parses lists and tuples from one word: (128,0), [0,1,1,1].
        return [self.flag, str(value).replace(" ", "")]


_ON, _OFF = True, False

MODEL_ARGUMENTS = (
    ModelArgument("num_layers", "--num-layers", None, shapes=True),
    ModelArgument("hidden_size", "--hidden-size", None, shapes=True),
    ModelArgument("ffn_hidden_size", "--ffn-hidden-size", None, shapes=True),
    ModelArgument("num_attention_heads", "--num-attention-heads", None, shapes=True),
    ModelArgument("group_query_attention", "--group-query-attention", False, _ON, shapes=True),
    ModelArgument("num_query_groups", "--num-query-groups", None, shapes=True),
    ModelArgument("kv_channels", "--kv-channels", None, shapes=True),
    ModelArgument("normalization", "--normalization", "LayerNorm", shapes=True),
    ModelArgument("layernorm_epsilon", "--norm-epsilon", 1e-05, older="norm_epsilon"),
    ModelArgument("layernorm_zero_centered_gamma", "--apply-layernorm-1p", False, _ON, older="apply_layernorm_1p"),
    ModelArgument("apply_residual_connection_post_layernorm", "--apply-residual-connection-post-layernorm", False, _ON),
    ModelArgument("position_embedding_type", "--position-embedding-type", "learned_absolute", shapes=True),
    ModelArgument("add_position_embedding", "--no-position-embedding", True, _OFF, shapes=True),
    ModelArgument("max_position_embeddings", "--max-position-embeddings", None),
    ModelArgument("rotary_base", "--rotary-base", 10000),
    ModelArgument("rotary_percent", "--rotary-percent", 1.0),
    ModelArgument("rotary_interleaved", "--rotary-interleaved", False, _ON),
    ModelArgument(
        "rotary_seq_len_interpolation_factor",
        "--rotary-seq-len-interpolation-factor",
        None,
        bridge="seq_len_interpolation_factor",
    ),
    ModelArgument("use_rope_scaling", "--use-rope-scaling", False, _ON, bridge="rope_scaling"),
    ModelArgument("rope_scaling_factor", "--rope-scaling-factor", 8.0),
    ModelArgument("no_rope_freq", "--no-rope-freq", None),
    ModelArgument("swiglu", "--swiglu", False, _ON, shapes=True),
    ModelArgument("squared_relu", "--squared-relu", False, _ON),
    ModelArgument("openai_gelu", "--openai-gelu", False, _ON),
    ModelArgument("quick_geglu", "--quick-geglu", False, _ON, shapes=True),
    ModelArgument("glu_linear_offset", "--glu-linear-offset", 0.0),
    ModelArgument("activation_func_clamp_value", "--activation-func-clamp-value", None),
    ModelArgument("add_bias_linear", "--disable-bias-linear", True, _OFF, shapes=True),
    ModelArgument("add_qkv_bias", "--add-qkv-bias", False, _ON, shapes=True),
    ModelArgument("qk_layernorm", "--qk-layernorm", False, _ON, shapes=True),
    ModelArgument("qk_l2_norm", "--qk-l2-norm", False, _ON),
    ModelArgument("apply_query_key_layer_scaling", "--apply-query-key-layer-scaling", False, _ON),
    ModelArgument("window_size", "--window-size", None),
    ModelArgument("window_attn_skip_freq", "--window-attn-skip-freq", None),
    ModelArgument("softmax_type", "--softmax-type", "vanilla", shapes=True),
    ModelArgument("multi_latent_attention", "--multi-latent-attention", False, _ON, shapes=True),
    ModelArgument(
        "untie_embeddings_and_output_weights", "--untie-embeddings-and-output-weights", False, _ON, shapes=True
    ),
    ModelArgument("use_mup", "--use-mup", False, _ON),
    ModelArgument("mup_base_hidden_size", "--mup-base-hidden-size", None),
    ModelArgument("mup_base_head_dim", "--mup-base-head-dim", None),
    ModelArgument("mup_embedding_mult", "--mup-embedding-mult", 1.0),
    ModelArgument("mup_output_mult", "--mup-output-mult", 1.0),
    ModelArgument("mup_attn_scale_power", "--mup-attn-scale-power", 1.0),
    ModelArgument("padded_vocab_size", "--padded-vocab-size", None),
    ModelArgument("num_experts", "--num-experts", None, bridge="num_moe_experts", shapes=True),
    ModelArgument("moe_layer_freq", "--moe-layer-freq", 1, moe=True, shapes=True),
    ModelArgument("moe_ffn_hidden_size", "--moe-ffn-hidden-size", None, moe=True, shapes=True),
    ModelArgument("moe_router_topk", "--moe-router-topk", 2, moe=True, usage=True),
    ModelArgument("moe_router_pre_softmax", "--moe-router-pre-softmax", False, _ON, moe=True, usage=True),
    ModelArgument("moe_router_score_function", "--moe-router-score-function", "softmax", moe=True),
    ModelArgument("moe_router_topk_scaling_factor", "--moe-router-topk-scaling-factor", None, moe=True),
    ModelArgument("moe_router_num_groups", "--moe-router-num-groups", None, moe=True),
    ModelArgument("moe_router_group_topk", "--moe-router-group-topk", None, moe=True),
    ModelArgument(
        "moe_router_enable_expert_bias", "--moe-router-enable-expert-bias", False, _ON, moe=True, shapes=True
    ),
    ModelArgument("moe_router_dtype", "--moe-router-dtype", None, moe=True),
    ModelArgument(
        "moe_shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size", None, moe=True, shapes=True
    ),
    ModelArgument("moe_shared_expert_gate", "--moe-shared-expert-gate", False, _ON, moe=True, shapes=True),
    ModelArgument("moe_expert_capacity_factor", "--moe-expert-capacity-factor", None, moe=True, usage=True),
    ModelArgument("moe_token_drop_policy", "--moe-token-drop-policy", "probs", moe=True, usage=True),
    ModelArgument("btx_sample_top1", "--btx-sample-top1", False, _ON, moe=True, usage=True),
    ModelArgument("moe_apply_probs_on_input", "--moe-apply-probs-on-input", False, _ON, moe=True),
)
"""What must be equal for the weights to mean the same function."""

NUMERICS_ARGUMENTS = (
    ModelArgument("transformer_impl", "--transformer-impl", "transformer_engine"),
    ModelArgument("bf16", "--bf16", False, _ON),
    ModelArgument("fp16", "--fp16", False, _ON),
)
"""What must stay the same when a run is resumed, but may differ when a new one starts from its weights."""


def differences(
    left: Mapping[str, Any], right: Mapping[str, Any], table: Iterable[ModelArgument] = MODEL_ARGUMENTS
) -> list[tuple[ModelArgument, Any, Any]]:
    """The arguments of the table that differ between two sets, each with both values."""
    dense = left.get("num_experts") is None and right.get("num_experts") is None
    found = []
    for argument in table:
        a, b = argument.value(left), argument.value(right)
        if argument.name == "moe_ffn_hidden_size":  # not given means the dense size
            a, b = a or left.get("ffn_hidden_size"), b or right.get("ffn_hidden_size")
        if argument.name == "num_query_groups":  # Megatron fills it in late where there are no groups
            a, b = _query_groups(left), _query_groups(right)
        if a != b and not (argument.moe and dense):
            found.append((argument, a, b))
    return found


def _query_groups(stored: Mapping[str, Any]) -> Any:
    if stored.get("group_query_attention"):
        return stored.get("num_query_groups")
    return stored.get("num_attention_heads")


def model_flags(stored: Mapping[str, Any]) -> list[list[str]]:
    """The command line that builds the stored model with stock Megatron: one list of words per flag."""
    dense = stored.get("num_experts") is None
    flags = []
    for argument in MODEL_ARGUMENTS:
        if argument.moe and dense:
            continue
        if argument.name == "num_query_groups" and not stored.get("group_query_attention"):
            continue
        if argument.name == "add_position_embedding" and stored.get("position_embedding_type") != "learned_absolute":
            continue
        words = argument.as_flags(argument.value(stored))
        if words:
            flags.append(words)
    return flags
