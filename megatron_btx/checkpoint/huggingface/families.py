"""The Hugging Face architectures that are read and written, and the table of numbers that both sides hold."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

from megatron_btx.common.errors import InputError


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its names, and what its layers have."""

    architecture: str
    model_type: str
    is_mixture: bool
    dialect: Literal["llama", "mixtral", "qwen_moe"]
    """How its tensors are named; "llama" for all dense models."""
    window: Literal["none", "own", "switched"]
    """Sliding window: the class has none; ``sliding_window`` alone says it; or ``use_sliding_window`` turns it on."""
    qk_norm: bool = False
    qkv_biases: tuple[bool, ...] = (False,)
    """Whether the query, key and value projections have biases; two where the configuration says so."""


FAMILIES = (
    Family("LlamaForCausalLM", "llama", False, "llama", "none"),
    Family("MistralForCausalLM", "mistral", False, "llama", "own"),
    Family("Qwen2ForCausalLM", "qwen2", False, "llama", "switched", qkv_biases=(True,)),
    Family("Qwen3ForCausalLM", "qwen3", False, "llama", "switched", qk_norm=True),
    Family("MixtralForCausalLM", "mixtral", True, "mixtral", "own"),
    Family("Qwen2MoeForCausalLM", "qwen2_moe", True, "qwen_moe", "switched", qkv_biases=(True, False)),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", True, "qwen_moe", "switched", qk_norm=True),
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

_SIZES = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size num_experts num_local_experts "
    "num_experts_per_tok moe_intermediate_size".split()
)
"""Keys whose absence no default makes up for: the weights have a size of their own."""


@functools.cache
def class_defaults(family: Family) -> Mapping[str, Any]:
    """What transformers' class of a family takes for absent keys, sizes left out.

    The class is asked for its signature and never given a configuration. Its objects are no help: 4.57 and 5 normalise
    windows, rotary scalings and types of numbers in different ways, and the defaults are alike in both.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.model_type]
    found: dict[str, Any] = {"rope_theta": getattr(kind, "default_theta", None)}  # 4.57 has it among the parameters
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name not in _SIZES and parameter.default is not parameter.empty:
            found[name] = parameter.default
    return found


def bad_value(where: str, key: str, value: object, expected: str, remedy: str) -> InputError:
    """The refusal of a key's value, to be raised."""
    return InputError(f"{where}: {key} is {value!r}, expected {expected}; {remedy}")


def check_number(where: str, key: str, value: object, kind: str) -> Any:
    """The value, if it is a number of its kind; never a bool or text.

    Raises:
        InputError: it is not.
    """
    if type(value) in (int, float):
        in_range = {
            COUNT: type(value) is int and value >= 1,
            FRACTION: 0 <= value <= 1,  # type: ignore[operator]
            POSITIVE: 0 < value < math.inf,  # type: ignore[operator]
        }
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
    for family in FAMILIES:
        if family.architecture in named or (not named and family.model_type == model_type):
            if model_type not in (None, family.model_type):
                expected = f"{family.model_type!r} as of {named}"
                raise bad_value(where, "model_type", model_type, expected, "correct one of the two")
            return family
    expected = "one of " + ", ".join(family.architecture for family in FAMILIES)
    if named:
        raise bad_value(where, "architectures", named, expected, "convert one of those")
    raise bad_value(where, "model_type", model_type, expected, "convert one of those")
