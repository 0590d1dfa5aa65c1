"""A Hugging Face ``config.json`` as Megatron arguments; the way back is ``config_writing``.

The arguments have the names of :data:`megatron_btx.checkpoint.arguments.MODEL_ARGUMENTS`. What both sides hold as one
number is a row of one table, read in both directions; everything else has a function per direction. A key that is
absent means what its transformers class makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.checkpoint.huggingface import shared_expert
from megatron_btx.checkpoint.huggingface.families import (
    ALWAYS,
    COUNT,
    DTYPES,
    FIRST_SLIDING,
    ROWS,
    Family,
    bad_value,
    check_number,
    family_of,
)
from megatron_btx.checkpoint.huggingface.keys import refuse_unknown_keys
from megatron_btx.checkpoint.huggingface.rope import as_int, read_rope, scaling_arguments
from megatron_btx.common.errors import InputError

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of transformers 5 and 4."""
_OTHER_NAMES = {"half": "float16", "float": "float32"}
"""torch's other names of types, which transformers takes, too, as it does torch.float32."""


def arguments_from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The Megatron arguments of a Hugging Face configuration.

    Besides model arguments: ``vocab_size``, ``seq_length`` (tokens, the longest position), ``params_dtype`` (its
    name), ``bf16``, ``fp16``, ``init_method_std``, dropouts, and, where there is a rotary scaling, ``hf_rope_scaling``:
    all of it, also what Megatron does not have (see ``refuse_for_megatron``).

    Args:
        config: the content of config.json, of transformers 4 or 5.
        where: the file, for messages.

    Raises:
        InputError: another architecture, a missing or impossible number, or a part that no Megatron argument says.
    """
    family = family_of(config, where)
    _refuse_parts(config, family, where)
    filled = _with_defaults(config, family, where)
    arguments: dict[str, Any] = dict(ALWAYS)
    for row in ROWS:
        if family.is_mixture or not row.mixture:
            arguments[row.argument] = check_number(where, row.key_of(family), filled.get(row.key_of(family)), row.kind)
    heads, groups, layers = arguments["num_attention_heads"], arguments["num_query_groups"], arguments["num_layers"]
    if heads % groups:
        expected = f"a divisor of num_attention_heads {heads}"
        raise bad_value(where, "num_key_value_heads", groups, expected, "correct one of the two")
    theta, scaling = read_rope(config, family, where)
    dtype = _dtype(config, where)
    arguments |= scaling_arguments(scaling)
    arguments |= {
        "group_query_attention": groups != heads,
        "rotary_base": as_int(theta),
        "add_qkv_bias": _qkv_bias(config, family, where),
        "qk_layernorm": family.qk_norm,
        "window_size": _window(filled, family, layers, where),
        "untie_embeddings_and_output_weights": not _switch(where, config, "tie_word_embeddings"),
        "vocab_size": arguments["padded_vocab_size"],
        "seq_length": arguments["max_position_embeddings"],
        "params_dtype": dtype,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }
    if family.is_mixture:
        arguments |= _mixture_arguments(config, family, arguments, where)
    if scaling:
        arguments["hf_rope_scaling"] = scaling
    return arguments


def _refuse_parts(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse parts of a model that the arguments of these families do not say."""
    refuse_unknown_keys(config, family, where)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function in transformers
        raise bad_value(where, "hidden_act", config["hidden_act"], "'silu'", "only gated SiLU models can be converted")
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised is not None:
        method = None
        if isinstance(quantised, Mapping):
            method = quantised.get("quant_method")
        raise InputError(
            f"{where}: quantization_config is given ({method or 'of an unnamed method'}), expected plain weights; take "
            "the unquantized model, or load it with transformers, call dequantize() on it and save it with "
            "save_pretrained"
        )
    for key in ("attention_bias", "mlp_bias"):
        if True not in family.qkv_biases and _switch(where, config, key):
            remedy = "such biases, also on the output projections, have no counterpart; take a model without them"
            raise bad_value(where, key, True, "false", remedy)
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        remedy = "only rotary embeddings over the whole head can be converted"
        raise bad_value(where, "partial_rotary_factor", config["partial_rotary_factor"], "1.0", remedy)
    shared_expert.width_of(config, where)  # whether it adds something, its tensors show


def _with_defaults(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The configuration with what its class makes of absent and null keys."""
    filled = {**family.defaults, **config}
    hidden = check_number(where, "hidden_size", filled.get("hidden_size"), COUNT)
    heads = check_number(where, "num_attention_heads", filled.get("num_attention_heads"), COUNT)
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = heads
    if filled.get("head_dim") is None:
        if hidden % heads:
            expected = f"a multiple of num_attention_heads {heads}"
            raise bad_value(where, "hidden_size", hidden, expected, "correct it, or give head_dim")
        filled["head_dim"] = hidden // heads
    if family.is_mixture:  # transformers 5 writes num_local_experts for Qwen3-MoE, 4 num_experts
        experts, local_experts = config.get("num_experts"), config.get("num_local_experts")
        if experts is None:
            experts = local_experts
        if local_experts not in (None, experts):
            raise bad_value(
                where, "num_local_experts", local_experts, f"num_experts {experts}", "correct one of the two"
            )
        filled["num_experts"] = filled["num_local_experts"] = experts
    return filled


def _qkv_bias(config: Mapping[str, Any], family: Family, where: str) -> bool:
    if len(family.qkv_biases) == 1:
        return family.qkv_biases[0]
    return _switch(where, config, "qkv_bias", family.qkv_biases[0])


def _dtype(config: Mapping[str, Any], where: str) -> str:
    """Name of the weights' type: ``dtype`` of transformers 5, ``torch_dtype`` of 4; float32 where there is neither."""
    key, name = _stated_dtype(config)
    name = name or "float32"
    if name not in DTYPES:
        raise bad_value(where, key, name, f"one of {', '.join(DTYPES)}", "save the model in one of those types")
    return name


def _stated_dtype(config: Mapping[str, Any]) -> tuple[str, str]:
    """The key that says the weights' type, and what it says; "" where nothing does."""
    for key in _DTYPE_KEYS:
        if config.get(key) is not None:
            name = str(config[key]).removeprefix("torch.")
            return key, _OTHER_NAMES.get(name, name)
    return _DTYPE_KEYS[0], ""


def dtype_arguments(config: Mapping[str, Any], dtypes: Sequence[str], where: str) -> dict[str, Any]:
    """The arguments that say the weights' type: what the configuration states, else what the tensors have.

    Args:
        dtypes: the names of the tensors' types, that with the most bytes first.

    Raises:
        InputError: no tensor has the type that is stated; nobody can know which of the two is meant.
    """
    key, stated = _stated_dtype(config)
    dtype = stated or next((name for name in dtypes if name in DTYPES), "float32")
    if dtypes and stated and stated not in dtypes:
        remedy = f'set it to "{dtypes[0]}" if the weights are as they are meant, else save the model in {stated}'
        raise bad_value(where, key, stated, f"{' or '.join(dtypes)}, as its tensors are", remedy)
    return {"params_dtype": dtype, "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}


def _window(filled: Mapping[str, Any], family: Family, layers: int, where: str) -> tuple[int, int] | None:
    """Megatron's (keys before, keys after) of a sliding window that all layers have; None for full attention."""
    if family.window == "none" or (family.window == "own" and filled.get("sliding_window") is None):
        return None
    if family.model_type == "mistral" and filled.get("layer_types") == ["full_attention"] * layers:
        return None  # AutoModel of transformers 4 and 5 goes by the kinds of layers
    if family.window == "switched" and not _every_layer_slides(filled, family, layers, where):
        return None
    return int(check_number(where, "sliding_window", filled.get("sliding_window"), COUNT)) - 1, 0


def _every_layer_slides(filled: Mapping[str, Any], family: Family, layers: int, where: str) -> bool:
    """Whether a window that can be switched is on: in all layers, or in none.

    Raises:
        InputError: it is on in some layers, or two ways of saying it contradict each other.
    """
    slides = _sliding_layers(filled, family, layers, where)
    if not _switch(where, filled, "use_sliding_window"):
        if filled.get("layer_types") is not None and any(slides):
            raise bad_value(where, "use_sliding_window", False, "true as layer_types slides", "correct one of the two")
        return False
    # transformers 4 and 5 agree about Qwen2-MoE only where both ways of saying it are there.
    both_said = filled.get("layer_types") is not None and filled[FIRST_SLIDING] == 0
    doubtful = family.model_type == "qwen2_moe" and not both_said
    if not any(slides) and not doubtful:
        return False
    if not all(slides) or doubtful:
        found = {FIRST_SLIDING: filled.get(FIRST_SLIDING), "layer_types": filled.get("layer_types")}
        remedy = "a window in some layers has no counterpart; take a model with use_sliding_window false"
        raise InputError(f"{where}: use_sliding_window is true with {found}, expected it for all layers; {remedy}")
    return True


def _sliding_layers(filled: Mapping[str, Any], family: Family, layers: int, where: str) -> list[bool]:
    """Which layers have the window if it is switched on."""
    if family.model_type == "qwen3_moe":
        return [True] * layers  # its class knows of no other
    start, types = filled.get(FIRST_SLIDING), filled.get("layer_types")
    if type(start) is not int or start < 0:
        raise bad_value(where, FIRST_SLIDING, start, "an integer of at least 0", "correct it there")
    if types is None:
        return [at >= start for at in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise bad_value(where, "layer_types", types, f"a list of {layers} kinds", "correct it there")
    return [kind == "sliding_attention" for kind in types]


def _mixture_arguments(
    config: Mapping[str, Any], family: Family, arguments: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The router's arguments and which layers are mixtures."""
    topk, experts = arguments["moe_router_topk"], arguments["num_experts"]
    if topk > experts:
        raise bad_value(where, "num_experts_per_tok", topk, f"at most num_experts {experts}", "correct one of the two")
    frequency: int | list[int] = 1
    normalised = True
    if family.dialect == "qwen_moe":
        frequency = _layer_frequency(config, arguments["num_layers"], where)
        normalised = _switch(where, config, "norm_topk_prob")
    return {
        "moe_layer_freq": frequency,
        "moe_router_pre_softmax": not normalised,
        "moe_router_score_function": "softmax",
    }


def _layer_frequency(config: Mapping[str, Any], layers: int, where: str) -> int | list[int]:
    """Megatron's pattern of mixture layers, from Qwen's two ways of saying it; 1 where every layer is one."""
    step = check_number(where, "decoder_sparse_step", config.get("decoder_sparse_step", 1), COUNT)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < layers for layer in dense):
        raise bad_value(where, "mlp_only_layers", dense, f"layer numbers from 0 to {layers - 1}", "correct it there")
    pattern = []
    for layer in range(layers):
        pattern.append(int(layer not in dense and (layer + 1) % step == 0))
    if not any(pattern):
        found = f"decoder_sparse_step is {step} and mlp_only_layers {dense!r}"
        raise InputError(f"{where}: {found}, expected a mixture in some layer; take the dense model")
    if all(pattern):
        return 1
    return pattern


def _switch(where: str, config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise bad_value(where, key, value, "true or false", "correct it there")
    return value
