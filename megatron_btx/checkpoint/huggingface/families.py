"""The Hugging Face architectures that are read and written, and the table of numbers that both sides hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from megatron_btx.common.errors import InputError


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its names, what its layers have, and what its class takes for an absent key."""

    architecture: str
    model_type: str
    is_mixture: bool
    dialect: Literal["llama", "mixtral", "qwen_moe"]
    """How its tensors are named; "llama" for all dense models."""
    window: Literal["none", "own", "switched"]
    """Sliding window: the class has none; ``sliding_window`` alone says it; or ``use_sliding_window`` turns it on."""
    defaults: Mapping[str, Any] = dataclasses.field(hash=False)
    qk_norm: bool = False
    qkv_biases: tuple[bool, ...] = (False,)
    """Whether the query, key and value projections have biases; two where the configuration says so."""


_COMMON = {
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "initializer_range": 0.02, "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
}  # fmt: skip
_LLAMA = _COMMON | {"max_position_embeddings": 2048}
_MISTRAL = _COMMON | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_MIXTRAL = _MISTRAL | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}
_QWEN = _COMMON | {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN3 = _QWEN | {"head_dim": 128}
_QWEN2_MOE = _QWEN | {"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632}
_QWEN3_MOE = _COMMON | {"num_key_value_heads": 4, "sliding_window": 4096}

FAMILIES = (
    Family("LlamaForCausalLM", "llama", False, "llama", "none", _LLAMA),
    Family("MistralForCausalLM", "mistral", False, "llama", "own", _MISTRAL),
    Family("Qwen2ForCausalLM", "qwen2", False, "llama", "switched", _QWEN, qkv_biases=(True,)),
    Family("Qwen3ForCausalLM", "qwen3", False, "llama", "switched", _QWEN3, qk_norm=True),
    Family("MixtralForCausalLM", "mixtral", True, "mixtral", "own", _MIXTRAL),
    Family("Qwen2MoeForCausalLM", "qwen2_moe", True, "qwen_moe", "switched", _QWEN2_MOE, qkv_biases=(True, False)),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", True, "qwen_moe", "switched", _QWEN3_MOE, qk_norm=True),
)
"""All architectures that are read and written. The first that fits a model is the one it is written as."""

COUNT, POSITIVE, FRACTION = "an integer of at least 1", "a number above 0", "a number from 0 up to 1"


@dataclasses.dataclass(frozen=True)
class Row:
    """One number that both sides hold."""

    argument: str
    key: str
    kind: str = COUNT
    mixtral_key: str = ""
    mixture: bool = False

    def key_of(self, family: Family) -> str:
        """The key in a family's configuration."""
        if self.mixtral_key and family.dialect == "mixtral":
            return self.mixtral_key
        return self.key


ROWS = (
    Row("num_layers", "num_hidden_layers"),
    Row("hidden_size", "hidden_size"),
    Row("ffn_hidden_size", "intermediate_size"),
    Row("num_attention_heads", "num_attention_heads"),
    Row("num_query_groups", "num_key_value_heads"),
    Row("kv_channels", "head_dim"),
    Row("layernorm_epsilon", "rms_norm_eps", POSITIVE),
    Row("max_position_embeddings", "max_position_embeddings"),
    Row("padded_vocab_size", "vocab_size"),
    Row("init_method_std", "initializer_range", FRACTION),
    Row("attention_dropout", "attention_dropout", FRACTION),
    Row("num_experts", "num_experts", mixtral_key="num_local_experts", mixture=True),
    Row("moe_router_topk", "num_experts_per_tok", mixture=True),
    # After ffn_hidden_size: Mixtral's one width is that of its experts.
    Row("moe_ffn_hidden_size", "moe_intermediate_size", mixtral_key="intermediate_size", mixture=True),
)
ALWAYS = {
    "normalization": "RMSNorm", "position_embedding_type": "rope", "add_position_embedding": True,
    "rotary_percent": 1.0, "swiglu": True, "add_bias_linear": False, "hidden_dropout": 0.0,
}  # fmt: skip
"""Arguments with one value in every model that Hugging Face's forms can say."""
DTYPES = ("bfloat16", "float16", "float32")
MEGATRON_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Numbers of Llama 3's rotary scaling that are fixed in Megatron 0.19."""
MEGATRON_ROPE_FACTOR = 8.0
FIRST_SLIDING = "max_window_layers"
"""The first layer with a window, despite its name."""


_BEYOND = 2**63
"""No number of a model is as large; whole numbers of JSON can be larger than any float."""


def bad_value(where: str, key: str, value: object, expected: str, remedy: str) -> InputError:
    """The refusal of a key's value, to be raised."""
    return InputError(f"{where}: {key} is {value!r}, expected {expected}; {remedy}")


def check_number(where: str, key: str, value: object, kind: str) -> Any:
    """The value, if it is a number of its kind; never a bool or text.

    Raises:
        InputError: it is not.
    """
    if type(value) in (int, float) and abs(value) < _BEYOND:  # type: ignore[arg-type]
        in_range = {COUNT: type(value) is int and value >= 1, FRACTION: 0 <= value <= 1, POSITIVE: value > 0}  # type: ignore[operator]
        if in_range[kind]:
            return value
    found = f"is {value!r}"
    if value is None:
        found = "is missing"
    raise InputError(f"{where}: {key} {found}, expected {kind}; correct it there")


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration: by ``architectures``, or by ``model_type`` where that is missing.

    Raises:
        InputError: it is none of :data:`FAMILIES`, or the two fields contradict each other.
    """
    named, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(named, list):
        named = [named]
    supported = ", ".join(family.architecture for family in FAMILIES)
    if not named:
        for family in FAMILIES:
            if family.model_type == model_type:
                return family
        raise bad_value(where, "model_type", model_type, f"one of {supported}", "convert one of those")
    for family in FAMILIES:
        if family.architecture in named:
            if model_type not in (None, family.model_type):
                expected = f"{family.model_type!r} as of {named}"
                raise bad_value(where, "model_type", model_type, expected, "correct one of the two")
            return family
    raise bad_value(where, "architectures", named, f"one of {supported}", "convert one of those")
