"""A Hugging Face ``config.json`` as Megatron arguments; the way back is ``hf_config_writing``.

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
    MEGATRON_LLAMA3,
    MEGATRON_ROPE_FACTOR,
    POSITIVE,
    ROWS,
    Family,
    family_of,
    number,
    wrong,
)
from megatron_btx.checkpoint.huggingface.keys import check_rope_fields, refuse_unknown_keys
from megatron_btx.ground.errors import InputError

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of transformers 5 and 4."""


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
            arguments[row.argument] = number(where, row.key_of(family), filled.get(row.key_of(family)), row.kind)
    heads, groups, layers = (arguments[k] for k in ("num_attention_heads", "num_query_groups", "num_layers"))
    if heads % groups:
        raise wrong(
            where, "num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}", "correct one of the two"
        )
    theta, scaling = _rope(config, family, where)
    dtype = _dtype(config, where)
    arguments |= scaling_arguments(scaling)
    arguments |= {
        "group_query_attention": groups != heads,
        "rotary_base": _whole(theta),
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
    return arguments | ({"hf_rope_scaling": scaling} if scaling else {})


def _refuse_parts(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse parts of a model that the arguments of these families do not say."""
    refuse_unknown_keys(config, family, where)
    if config.get("hidden_act", "silu") != "silu":
        raise wrong(where, "hidden_act", config["hidden_act"], "'silu'", "only gated SiLU models can be converted")
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise InputError(
            f"{where}: quantization_config is given ({method or 'of an unnamed method'}), expected plain weights; take "
            "the unquantized model, or load it with transformers, call dequantize() on it and save it with "
            "save_pretrained"
        )
    for key in ("attention_bias", "mlp_bias"):
        if True not in family.qkv_biases and _switch(where, config, key):
            remedy = "such biases, also on the output projections, have no counterpart; take a model without them"
            raise wrong(where, key, True, "false", remedy)
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        remedy = "only rotary embeddings over the whole head can be converted"
        raise wrong(where, "partial_rotary_factor", config["partial_rotary_factor"], "1.0", remedy)
    shared_expert.width_of(config, where)  # whether it adds something, its tensors show


def _with_defaults(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The configuration with what its class makes of absent and null keys."""
    filled = {**family.defaults, **config}
    hidden, heads = (number(where, key, filled.get(key), COUNT) for key in ("hidden_size", "num_attention_heads"))
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = heads
    if filled.get("head_dim") is None:
        if hidden % heads:
            raise wrong(
                where,
                "hidden_size",
                hidden,
                f"a multiple of num_attention_heads {heads}",
                "correct it, or give head_dim",
            )
        filled["head_dim"] = hidden // heads
    if family.is_mixture:  # transformers 5 writes num_local_experts for Qwen3-MoE, 4 num_experts
        counts = [config[key] for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
        if len(counts) > 1 and counts[0] != counts[1]:
            raise wrong(where, "num_local_experts", counts[-1], f"num_experts {counts[0]}", "correct one of the two")
        filled["num_experts"] = filled["num_local_experts"] = counts[0] if counts else None
    return filled


def _qkv_bias(config: Mapping[str, Any], family: Family, where: str) -> bool:
    if len(family.qkv_biases) == 1:
        return family.qkv_biases[0]
    return _switch(where, config, "qkv_bias", family.qkv_biases[0])


def _dtype(config: Mapping[str, Any], where: str) -> str:
    """Name of the weights' type: ``dtype`` of transformers 5, ``torch_dtype`` of 4; float32 where there is neither."""
    key = next((key for key in _DTYPE_KEYS if config.get(key) is not None), _DTYPE_KEYS[0])
    name = config.get(key) or "float32"
    if name not in DTYPES:
        raise wrong(where, key, name, f"one of {', '.join(DTYPES)}", "save the model in one of those types")
    return str(name)


def dtype_arguments(config: Mapping[str, Any], dtypes: Sequence[str], where: str) -> dict[str, Any]:
    """The arguments that say the weights' type: what the configuration states, else what the tensors have.

    Args:
        dtypes: the names of the tensors' types, that with the most bytes first.

    Raises:
        InputError: no tensor has the type that is stated; nobody can know which of the two is meant.
    """
    stated = next((str(config[key]) for key in _DTYPE_KEYS if config.get(key) is not None), None)
    dtype = stated or next((name for name in dtypes if name in DTYPES), "float32")
    if dtypes and stated and stated not in dtypes:
        key = next(key for key in _DTYPE_KEYS if config.get(key) is not None)
        remedy = f'set it to "{dtypes[0]}" if the weights are as they are meant, else save the model in {stated}'
        raise wrong(where, key, stated, f"{' or '.join(dtypes)}, as its tensors are", remedy)
    return {"params_dtype": dtype, "bf16": dtype == "bfloat16", "fp16": dtype == "float16"}


def _rope(config: Mapping[str, Any], family: Family, where: str) -> tuple[float, dict[str, Any] | None]:
    """The rotary base and scaling; transformers 4 has two keys for them, 5 one that holds both.

    Returns: the base, and the scaling with its kind under ``rope_type``, or None for plain rotary embeddings.
    """
    thetas: dict[str, Any] = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    scalings: list[dict[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        form = config.get(key)
        if not form:
            continue
        if not isinstance(form, Mapping) or any(isinstance(value, Mapping) for value in form.values()):
            raise wrong(where, key, form, "one set of numbers for all layers", "take a model with one")
        kinds = {form[name] for name in ("rope_type", "type") if isinstance(form.get(name), str)} or {"default"}
        if len(kinds) > 1:
            raise wrong(
                where, f"{key}.type", form["type"], f"rope_type {form['rope_type']!r}", "correct one of the two"
            )
        if form.get("partial_rotary_factor", 1.0) != 1.0:
            remedy = "only rotary embeddings over the whole head can be converted"
            raise wrong(where, f"{key}.partial_rotary_factor", form["partial_rotary_factor"], "1.0", remedy)
        if form.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = form["rope_theta"]
        kept = {k: v for k, v in form.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
        scalings.append({k: v for k, v in kept.items() if v is not None} | {"rope_type": kinds.pop()})
    theta = thetas.get("rope_theta", next(iter(thetas.values()), family.defaults["rope_theta"]))
    for key, value in {"rope_theta": theta, **thetas}.items():
        if number(where, key, value, POSITIVE) != theta:
            raise wrong(where, key, value, f"rope_theta {theta!r}", "correct one of the two")
    if scalings and scalings[0] != scalings[-1]:
        raise wrong(where, "rope_scaling", scalings[-1], f"rope_parameters {scalings[0]!r}", "correct one of the two")
    if scalings:
        check_rope_fields(scalings[0], config, where)
    scaling = scalings[0] if scalings and scalings[0]["rope_type"] != "default" else None
    for key in MEGATRON_LLAMA3 if scaling and scaling["rope_type"] == "llama3" else ():
        number(where, f"rope_scaling.{key}", scaling.get(key) if scaling else None, POSITIVE)
    return theta, scaling


def scaling_arguments(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The Megatron arguments of a rotary scaling: those of no scaling where Megatron does not have it."""
    scaling = scaling or {"rope_type": "default"}
    llama3 = scaling["rope_type"] == "llama3" and not foreign_llama3(scaling)
    return {
        "use_rope_scaling": llama3,
        "rope_scaling_factor": float(scaling["factor"]) if llama3 else MEGATRON_ROPE_FACTOR,
        "rotary_seq_len_interpolation_factor": _whole(scaling["factor"]) if scaling["rope_type"] == "linear" else None,
    }


def _whole(value: float) -> float:
    """As an int where it is one: Megatron's flags for rotary base and interpolation take nothing else."""
    return int(value) if value == int(value) else value


def foreign_llama3(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a Llama 3 scaling that differ from those fixed in Megatron."""
    return {key: scaling.get(key) for key, fixed in MEGATRON_LLAMA3.items() if scaling.get(key) != fixed}


def _window(filled: Mapping[str, Any], family: Family, layers: int, where: str) -> tuple[int, int] | None:
    """Megatron's (keys before, keys after) of a sliding window that all layers have; None for full attention."""
    if family.window == "none" or (family.window == "own" and filled.get("sliding_window") is None):
        return None
    if family.window == "switched":
        slides = _sliding_layers(filled, family, layers, where)
        if not _switch(where, filled, "use_sliding_window"):
            if filled.get("layer_types") is not None and any(slides):
                raise wrong(where, "use_sliding_window", False, "true as layer_types slides", "correct one of the two")
            return None
        # transformers 4 and 5 agree about Qwen2-MoE only where both ways of saying it are there.
        doubtful = family.model_type == "qwen2_moe" and (
            filled.get("layer_types") is None or filled[FIRST_SLIDING] != 0
        )
        if not any(slides) and not doubtful:
            return None
        if not all(slides) or doubtful:
            found = {key: filled.get(key) for key in (FIRST_SLIDING, "layer_types")}
            remedy = "a window in some layers has no counterpart; take a model with use_sliding_window false"
            raise InputError(f"{where}: use_sliding_window is true with {found}, expected it for all layers; {remedy}")
    return int(number(where, "sliding_window", filled.get("sliding_window"), COUNT)) - 1, 0


def _sliding_layers(filled: Mapping[str, Any], family: Family, layers: int, where: str) -> list[bool]:
    """Which layers have the window if it is switched on."""
    if family.model_type == "qwen3_moe":
        return [True] * layers  # its class knows of no other
    start, types = filled.get(FIRST_SLIDING), filled.get("layer_types")
    if type(start) is not int or start < 0:
        raise wrong(where, FIRST_SLIDING, start, "an integer of at least 0", "correct it there")
    if types is None:
        return [at >= start for at in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise wrong(where, "layer_types", types, f"a list of {layers} kinds", "correct it there")
    return [kind == "sliding_attention" for kind in types]


def _mixture_arguments(
    config: Mapping[str, Any], family: Family, arguments: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The router's arguments and which layers are mixtures."""
    topk, experts, layers = (arguments[k] for k in ("moe_router_topk", "num_experts", "num_layers"))
    if topk > experts:
        raise wrong(where, "num_experts_per_tok", topk, f"at most num_experts {experts}", "correct one of the two")
    pattern = [1] * layers
    if family.dialect == "qwen_moe":
        step = number(where, "decoder_sparse_step", config.get("decoder_sparse_step", 1), COUNT)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(at) is int and 0 <= at < layers for at in dense):
            raise wrong(where, "mlp_only_layers", dense, f"layer numbers from 0 to {layers - 1}", "correct it there")
        pattern = [int(at not in dense and (at + 1) % step == 0) for at in range(layers)]
        if not any(pattern):
            found = f"decoder_sparse_step is {step} and mlp_only_layers {dense!r}"
            raise InputError(f"{where}: {found}, expected a mixture in some layer; take the dense model")
    normalised = family.dialect == "mixtral" or _switch(where, config, "norm_topk_prob")
    return {
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_router_pre_softmax": not normalised,
        "moe_router_score_function": "softmax",
    }


def _switch(where: str, config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise wrong(where, key, value, "true or false", "correct it there")
    return value
