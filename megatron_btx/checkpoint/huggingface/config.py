"""A Hugging Face ``config.json`` as Megatron arguments; the way back is ``config_writing``.

The arguments have the names of :data:`megatron_btx.checkpoint.arguments.MODEL_ARGUMENTS`. What both sides hold as one
number is a row of one table, read in both directions; everything else has a function per direction. A key that is
absent means what its transformers class makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.checkpoint.huggingface import shared_expert
from megatron_btx.checkpoint.huggingface.families import (
    ALWAYS,
    COUNT,
    DTYPES,
    ROWS,
    Family,
    bad_value,
    check_number,
    class_defaults,
    family_of,
)
from megatron_btx.checkpoint.huggingface.rope import as_int, read_rope, scaling_arguments
from megatron_btx.common.errors import InputError

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of transformers 5 and 4."""
_OTHER_NAMES = {"half": "float16", "float": "float32"}
"""torch's other names of types, which transformers takes, too, as it does torch.float32."""

_READ = frozenset(
    "rope_theta rope_scaling rope_parameters partial_rotary_factor sliding_window use_sliding_window "
    "max_window_layers layer_types decoder_sparse_step".split()
)
"""Keys that the words below would find, and that are read (or refused) by themselves."""
_SCALES = re.compile(
    r"multiplier|logits?_scal|^scale_(emb|depth)$|embedding_scale|residual_scale|routed_scaling_factor"
)
_OTHERS = re.compile(
    r"softcap|alibi|rope|rotary|window|clip_qkv|parallel_(residual|attn|block)|logn_attn|dynamic_ntk|mup|"
    r"attention_chunk_size|temperature_tuning|query_pre_attn_scalar|attention_sink|dim_model_base|scoring_func"
)
_NEUTRAL_SCALES: tuple[Any, ...] = (None, 1, False)
_NEUTRAL_OTHERS: tuple[Any, ...] = (None, 0, False, "", [], {})
"""The words of keys that change what a model computes, and the values with which they do not.

A configuration may hold anything, and most of it is harmless: who made it, defaults for generating text, caches. But
forks of a model give it scales, caps and windows by such keys; a converter that passes over them makes another model.
"""


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
    filled = {**class_defaults(family), **config}
    _refuse_parts(config, filled, family, where)
    _fill_sizes(filled, config, family, where)
    arguments: dict[str, Any] = dict(ALWAYS)
    for row in ROWS:
        if family.is_mixture or not row.mixture:
            arguments[row.argument] = check_number(where, row.key_of(family), filled.get(row.key_of(family)), row.kind)
    theta, scaling = read_rope(config, class_defaults(family)["rope_theta"], where)
    bias = family.qkv_biases[0]
    if len(family.qkv_biases) > 1:
        bias = _switch(where, filled, "qkv_bias")
    arguments |= scaling_arguments(scaling)
    arguments |= {
        "group_query_attention": arguments["num_query_groups"] != arguments["num_attention_heads"],
        "rotary_base": as_int(theta),
        "add_qkv_bias": bias,
        "qk_layernorm": family.qk_norm,
        "window_size": _window(filled, family, where),
        "untie_embeddings_and_output_weights": not _switch(where, filled, "tie_word_embeddings"),
        "vocab_size": arguments["padded_vocab_size"],
        "seq_length": arguments["max_position_embeddings"],
        **dtype_arguments(config, where),
    }
    if family.is_mixture:
        arguments |= _mixture_arguments(filled, family, arguments, where)
    if scaling:
        arguments["hf_rope_scaling"] = scaling
    return arguments


def _refuse_parts(config: Mapping[str, Any], filled: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse parts of a model that the arguments of these families do not say."""
    _refuse_unknown_keys(config, family, where)
    if filled["hidden_act"] not in ("silu", "swish"):  # two names of one function in transformers
        raise bad_value(where, "hidden_act", filled["hidden_act"], "'silu'", "only gated SiLU models can be converted")
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
        if True not in family.qkv_biases and _switch(where, filled, key):
            remedy = "such biases, also on the output projections, have no counterpart; take a model without them"
            raise bad_value(where, key, True, "false", remedy)
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        remedy = "only rotary embeddings over the whole head can be converted"
        raise bad_value(where, "partial_rotary_factor", config["partial_rotary_factor"], "1.0", remedy)
    shared_expert.width_of(config, where)  # whether it adds something, its tensors show


def _refuse_unknown_keys(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse keys that change the function and that the family's class passes over."""
    remedy = "convert a model without it, or take the key away if the model was trained without it"
    if config.get("is_causal", True) is not True:
        raise bad_value(where, "is_causal", config["is_causal"], "true, as Megatron attends to the past alone", remedy)
    for key, value in config.items():
        neutral: tuple[Any, ...] = ()
        if key not in _READ and _SCALES.search(key):
            neutral = _NEUTRAL_SCALES
        elif key not in _READ and _OTHERS.search(key):
            neutral = _NEUTRAL_OTHERS
        if neutral and value not in neutral:
            expected = " or ".join(map(str, neutral[:2]))
            raise bad_value(where, key, value, f"{expected}, because this architecture has no such part", remedy)
    code = config.get("auto_map")
    if isinstance(code, Mapping) and any(str(name).startswith("AutoModel") for name in code):
        raise InputError(
            f"{where}: auto_map names code of the model's own, which is not run, expected a class of "
            "transformers; take auto_map away if transformers' class computes the same"
        )


def _fill_sizes(filled: dict[str, Any], config: Mapping[str, Any], family: Family, where: str) -> None:
    """What a class makes of sizes that are absent or null."""
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


def dtype_arguments(config: Mapping[str, Any], where: str, dtypes: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments that say the weights' type: what the configuration states, else what the tensors have.

    Args:
        dtypes: the names of the tensors' types, that with the most bytes first; none before they are known.

    Raises:
        InputError: an unknown type is stated, or one that no tensor has; nobody can know which of the two is meant.
    """
    stated = [key for key in _DTYPE_KEYS if config.get(key) is not None]
    if stated:
        key = stated[0]
        name = str(config[key]).removeprefix("torch.")
        name = _OTHER_NAMES.get(name, name)
        if name not in DTYPES:
            raise bad_value(where, key, name, f"one of {', '.join(DTYPES)}", "save the model in one of those types")
        if dtypes and name not in dtypes:
            remedy = f'set it to "{dtypes[0]}" if the weights are as they are meant, else save the model in {name}'
            raise bad_value(where, key, name, f"{' or '.join(dtypes)}, as its tensors are", remedy)
    else:
        name = next((name for name in dtypes if name in DTYPES), "float32")
    return {"params_dtype": name, "bf16": name == "bfloat16", "fp16": name == "float16"}


def _window(filled: Mapping[str, Any], family: Family, where: str) -> tuple[int, int] | None:
    """Megatron's (keys before, keys after) of a sliding window that all layers have; None for full attention."""
    width, types = filled.get("sliding_window"), filled.get("layer_types") or []
    if not isinstance(types, list):
        types = [types]
    all_slide = types == ["sliding_attention"] * filled["num_hidden_layers"]
    allowed = ["full_attention"]
    if family.window != "none":
        allowed.append("sliding_attention")
    for kind in types:
        if kind not in allowed:
            expected = f"{' or '.join(allowed)} in this architecture"
            raise bad_value(where, "layer_types", kind, expected, "such layers cannot be converted")
    remedy = "a window in some layers has no counterpart; take a model with one kind of layers"
    if family.window == "none":
        if width and filled.get("use_sliding_window", True):
            remedy = "say MistralForCausalLM if it was trained with one, else take the key away"
            raise bad_value(where, "sliding_window", width, "none in this architecture", remedy)
        return None
    if family.window == "own":
        if len(set(types)) > 1:
            raise bad_value(where, "layer_types", types, "the same for all layers", remedy)
        # AutoModel of transformers 4 and 5 takes a class for Mistral that goes by the kinds of layers.
        if width is None or (family.model_type == "mistral" and "full_attention" in types):
            return None
    elif not _switch(where, filled, "use_sliding_window"):
        if "sliding_attention" in types:
            raise bad_value(where, "use_sliding_window", False, "true as layer_types slides", "correct one of the two")
        return None
    elif family.model_type != "qwen3_moe":  # whose class knows of one window for all layers
        start = filled.get("max_window_layers")  # the first layer with a window, despite its name
        is_said = all_slide or (not types and start == 0)
        if family.model_type == "qwen2_moe":  # transformers 4 goes by the start and 5 by the list
            is_said = all_slide and start == 0
        if not is_said:
            raise InputError(
                f"{where}: use_sliding_window is true with max_window_layers {start!r} and layer_types {types!r}, "
                f"expected it for all layers; {remedy}, as with use_sliding_window false"
            )
    return int(check_number(where, "sliding_window", width, COUNT)) - 1, 0


def _mixture_arguments(
    filled: Mapping[str, Any], family: Family, arguments: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The router's arguments and which layers are mixtures."""
    topk, experts = arguments["moe_router_topk"], arguments["num_experts"]
    if topk > experts:
        raise bad_value(where, "num_experts_per_tok", topk, f"at most num_experts {experts}", "correct one of the two")
    frequency: int | list[int] = 1
    normalised = True
    if family.dialect == "qwen_moe":
        frequency = _layer_frequency(filled, arguments["num_layers"], where)
        normalised = _switch(where, filled, "norm_topk_prob")
    return {
        "moe_layer_freq": frequency,
        "moe_router_pre_softmax": not normalised,
        "moe_router_score_function": "softmax",
    }


def _layer_frequency(filled: Mapping[str, Any], layers: int, where: str) -> int | list[int]:
    """Megatron's pattern of mixture layers, from Qwen's two ways of saying it; 1 where every layer is one."""
    step = check_number(where, "decoder_sparse_step", filled["decoder_sparse_step"], COUNT)
    dense = filled["mlp_only_layers"] or []
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < layers for layer in dense):
        raise bad_value(where, "mlp_only_layers", dense, f"layer numbers from 0 to {layers - 1}", "correct it there")
    pattern = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)]
    if not any(pattern):
        found = f"decoder_sparse_step is {step} and mlp_only_layers {dense!r}"
        raise InputError(f"{where}: {found}, expected a mixture in some layer; take the dense model")
    if all(pattern):
        return 1
    return pattern


def _switch(where: str, filled: Mapping[str, Any], key: str) -> bool:
    """A switch; off where the class does not have it."""
    value = filled.get(key, False)
    if not isinstance(value, bool):
        raise bad_value(where, key, value, "true or false", "correct it there")
    return value
