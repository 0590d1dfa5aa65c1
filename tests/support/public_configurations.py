"""Configurations of public models as they were published, and the same models at the size of a test.

Only fields that shape a model or its text are kept; a field that the publisher left out is left out here.
"""

from __future__ import annotations

from typing import Any

_BFLOAT16 = {"torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02, "hidden_act": "silu"}
_LLAMA = _BFLOAT16 | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_scaling": None,
}
_LLAMA2 = _LLAMA | {"torch_dtype": "float16", "max_position_embeddings": 4096, "vocab_size": 32000}
_LLAMA3 = _LLAMA | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_LLAMA31_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA31 = _LLAMA3 | {
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {"factor": 8.0, **_LLAMA31_ROPE, "rope_type": "llama3"},
}
_LLAMA32 = _LLAMA31 | {
    "tie_word_embeddings": True,
    "rope_scaling": {"factor": 32.0, **_LLAMA31_ROPE, "rope_type": "llama3"},
}
_CODE_LLAMA = _LLAMA | {"max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016}
_MISTRAL = _BFLOAT16 | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32000,
}
_QWEN2 = _BFLOAT16 | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
_QWEN2_7B = _QWEN2 | {"tie_word_embeddings": False, "vocab_size": 152064}
_MATH = {"max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096}
_QWEN3 = _BFLOAT16 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def _sizes(hidden: int, feed_forward: int, layers: int, heads: int, groups: int, head: int = 0) -> dict[str, int]:
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
    }
    return sizes | ({"head_dim": head} if head else {})


_7B, _13B, _70B = _sizes(4096, 11008, 32, 32, 32), _sizes(5120, 13824, 40, 40, 40), _sizes(8192, 28672, 80, 64, 8)
_8B = _sizes(4096, 14336, 32, 32, 8)
_Q05B, _Q15B = _sizes(896, 4864, 24, 14, 2), _sizes(1536, 8960, 28, 12, 2)
_Q7B = _sizes(3584, 18944, 28, 28, 4)

PUBLIC: dict[str, dict[str, Any]] = {
    "Llama-2-7b": _LLAMA2 | _7B,
    "Llama-2-13b": _LLAMA2 | _13B,
    "Llama-2-70b": _LLAMA2 | _70B,
    "Meta-Llama-3-8B": _LLAMA3 | _8B,
    "Meta-Llama-3-70B": _LLAMA3 | _70B,
    "Llama-3.1-8B": _LLAMA31 | _8B,
    "Llama-3.1-70B": _LLAMA31 | _70B,
    "Llama-3.2-1B": _LLAMA32 | _sizes(2048, 8192, 16, 32, 8, 64),
    "Llama-3.2-3B": _LLAMA32 | _sizes(3072, 8192, 28, 24, 8, 128),
    "CodeLlama-7b": _CODE_LLAMA | _7B,
    "CodeLlama-13b": _CODE_LLAMA | _13B,
    "CodeLlama-34b": _CODE_LLAMA | _sizes(8192, 22016, 48, 64, 8) | {"vocab_size": 32000},
    "CodeLlama-7b-Python": _CODE_LLAMA | _7B | {"vocab_size": 32000},
    "TinyLlama-1.1B": _LLAMA
    | _sizes(2048, 5632, 22, 32, 4)
    | {"max_position_embeddings": 2048, "rope_theta": 10000.0, "attention_bias": False, "vocab_size": 32000},
    "Mistral-7B-v0.1": _MISTRAL | _8B | {"rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-v0.2": _MISTRAL | _8B,
    "Mistral-7B-v0.3": _MISTRAL | _8B | {"vocab_size": 32768},
    "Qwen2-0.5B": _QWEN2 | _Q05B | {"max_window_layers": 24},
    "Qwen2-1.5B": _QWEN2 | _Q15B,
    "Qwen2-7B": _QWEN2_7B | _Q7B,
    "Qwen2.5-0.5B": _QWEN2
    | _Q05B
    | {"max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 24},
    "Qwen2.5-1.5B": _QWEN2 | _Q15B,
    "Qwen2.5-7B": _QWEN2_7B | _Q7B,
    "Qwen2.5-Math-1.5B": _QWEN2 | _Q15B | _MATH | {"max_window_layers": 21},
    "Qwen2.5-Math-7B": _QWEN2_7B | _Q7B | _MATH,
    "Qwen2.5-Coder-1.5B": _QWEN2 | _Q15B | {"max_position_embeddings": 32768},
    "Qwen2.5-Coder-7B": _QWEN2_7B | _Q7B | {"max_position_embeddings": 32768},
    "Qwen3-0.6B": _QWEN3 | _sizes(1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, 8),
    "Qwen3-4B": _QWEN3 | _sizes(2560, 9728, 36, 32, 8) | {"max_window_layers": 36},
    "Qwen3-8B": _QWEN3 | _sizes(4096, 12288, 36, 32, 8) | {"max_window_layers": 36, "tie_word_embeddings": False},
    "Mixtral-8x7B-v0.1": _MISTRAL
    | _8B
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "attention_dropout": 0.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    },
    "Qwen3-30B-A3B": _QWEN3
    | _sizes(2048, 6144, 48, 32, 4)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
}
"""Name to config.json."""

MIXTURES = ("Mixtral-8x7B-v0.1", "Qwen3-30B-A3B")
DENSE = tuple(name for name in PUBLIC if name not in MIXTURES)

_PICO_VOCABULARY = {32000: 160, 32016: 176, 32768: 192, 128256: 208, 151936: 224, 152064: 240}
_PICO_HEAD = 8


def pico(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with a few thousand parameters: only sizes differ.

    Kept: query heads per key-value head, the ratio of all heads' width to the hidden size, which vocabularies are
    equal, and every other field, the number of positions among them.
    """
    heads, groups, hidden = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    small_groups = 4 if heads == groups else 2
    small_heads = heads // groups * small_groups
    small_hidden = small_heads * _PICO_HEAD * hidden // (heads * config.get("head_dim", hidden // heads))
    layers = 2 if config["num_hidden_layers"] <= 32 else 3
    small = config | {
        "hidden_size": small_hidden,
        "intermediate_size": 8 * (config["intermediate_size"] * small_hidden // (8 * hidden)),
        "num_hidden_layers": layers,
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_groups,
        "vocab_size": _PICO_VOCABULARY[config["vocab_size"]],
    }
    if "head_dim" in config:
        small["head_dim"] = _PICO_HEAD
    if config.get("sliding_window"):
        small["sliding_window"] = 8
    if "max_window_layers" in config:
        small["max_window_layers"] = layers * config["max_window_layers"] // config["num_hidden_layers"]
    if "moe_intermediate_size" in config:
        small["moe_intermediate_size"] = 24
    for key in ("num_experts", "num_local_experts"):
        if key in config:
            small |= {key: 4, "num_experts_per_tok": 2}
    for key, value in {"bos_token_id": 1, "eos_token_id": 2}.items():
        if small[key] >= small["vocab_size"]:
            small[key] = value
    return small
