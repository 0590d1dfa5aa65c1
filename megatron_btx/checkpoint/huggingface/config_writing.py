"""Megatron arguments as a Hugging Face ``config.json``, and what either form cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS
from megatron_btx.checkpoint.huggingface import shared_expert
from megatron_btx.checkpoint.huggingface.families import (
    ALWAYS,
    COUNT,
    DTYPES,
    FAMILIES,
    MEGATRON_LLAMA3,
    MEGATRON_ROPE_FACTOR,
    POSITIVE,
    ROWS,
    Family,
    bad_value,
    check_number,
    family_of,
)
from megatron_btx.checkpoint.huggingface.rope import foreign_llama3
from megatron_btx.checkpoint.sizes import mixture_layers

_TRANSLATED = frozenset(row.argument for row in ROWS) | {
    "group_query_attention", "add_position_embedding", "rotary_base", "rotary_seq_len_interpolation_factor",
    "use_rope_scaling", "rope_scaling_factor", "add_qkv_bias", "qk_layernorm", "window_size", "moe_layer_freq",
    "untie_embeddings_and_output_weights", "moe_router_pre_softmax",
    # Without effect on what a model computes: µP's numbers while it is off, the router's precision, a policy of drops.
    "mup_base_hidden_size", "mup_base_head_dim", "mup_embedding_mult", "mup_output_mult", "mup_attn_scale_power",
    "moe_router_dtype", "moe_token_drop_policy",
}  # fmt: skip
"""Arguments that may have any value here; every other model argument must have the one value that can be written."""
PASSED_THROUGH = (
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "pretraining_tp", "initializer_range",
    "attention_dropout", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise",
)  # fmt: skip


def refuse_for_megatron(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse what a configuration carries from Hugging Face to Hugging Face and Megatron 0.19 cannot run.

    Raises:
        InputError: another rotary scaling, fractions where Megatron's flags take whole numbers, or one expert per
            token whose weight is normalised to one.
    """
    remedy = "convert it to a Hugging Face folder only"
    scaling = arguments.get("hf_rope_scaling")
    if scaling and scaling["rope_type"] not in ("llama3", "linear"):
        raise bad_value(
            where, "rope_scaling.rope_type", scaling["rope_type"], "'llama3' or 'linear' in Megatron", remedy
        )
    if scaling and scaling["rope_type"] == "llama3":
        for key, value in foreign_llama3(scaling).items():
            raise bad_value(where, f"rope_scaling.{key}", value, f"{MEGATRON_LLAMA3[key]} as fixed in Megatron", remedy)
    for key in ("rotary_base", "rotary_seq_len_interpolation_factor"):
        if isinstance(arguments.get(key), float):
            raise bad_value(where, key, arguments[key], "an integer in Megatron", remedy)
    one = arguments.get("num_experts") is not None and arguments.get("moe_router_topk") == 1
    if one and not arguments.get("moe_router_pre_softmax"):
        raise bad_value(where, "num_experts_per_tok", 1, "2 or more in Megatron where weights are normalised", remedy)


def config_from_arguments(
    arguments: Mapping[str, Any], base: Mapping[str, Any] | None = None, where: str = "the model's arguments"
) -> dict[str, Any]:
    """The config.json of a model with these Megatron arguments, which transformers 4.57 and 5 read alike.

    ``vocab_size`` becomes the padded size: the rows that are stored, all of which take part in the softmax.

    Args:
        base: a configuration to take the tokens' numbers and other fields without effect on the model from, and the
            architecture, if it can say this model; else the first of :data:`FAMILIES` that can.
        where: the model, for messages.

    Raises:
        InputError: a number is missing or impossible, or the model has a part that Hugging Face's forms do not say.
    """
    mixture = arguments.get("num_experts") is not None
    for argument in MODEL_ARGUMENTS:
        value, expected = argument.value(arguments), ALWAYS.get(argument.name, argument.default)
        is_said = argument.name in _TRANSLATED or (argument.moe and not mixture)
        if value != expected and not is_said:
            remedy = "keep this model in Megatron's format, or start from a seed with that value"
            raise bad_value(where, argument.name, value, f"{expected!r} for a Hugging Face model", remedy)
    values = _completed(arguments, where)
    before = _keys_before(values, where)
    family = _fitting(values, mixture, before, base, where)
    config: dict[str, Any] = {}
    for key in PASSED_THROUGH:
        if base and key in base:
            config[key] = base[key]
    config |= {"architectures": [family.architecture], "model_type": family.model_type, "hidden_act": "silu"}
    for row in ROWS:
        if row.argument in values and (mixture or not row.mixture):
            value = check_number(where, row.argument, values[row.argument], row.kind)
            if row.kind is not COUNT:
                value = float(value)
            config[row.key_of(family)] = value
    config |= {
        "rope_theta": float(check_number(where, "rotary_base", values.get("rotary_base", 10000), POSITIVE)),
        "rope_scaling": _written_scaling(values, where),
        "tie_word_embeddings": not values.get("untie_embeddings_and_output_weights", False),
        "torch_dtype": _written_dtype(values, where),
    }
    config |= _written_window(before, family, values["num_layers"])
    if mixture:
        config |= _written_mixture(values, family, where)
    usual_heads = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    if family.model_type in ("qwen2", "qwen2_moe") and usual_heads:
        del config["head_dim"]  # these classes do not have it; Qwen2's attention yet takes one that is given
    return config


def _completed(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments with what Megatron makes of the ones that are not given."""
    values = {"num_layers": None, "max_position_embeddings": None, **arguments}  # a missing one is refused by name
    hidden = check_number(where, "hidden_size", values.get("hidden_size"), COUNT)
    heads = check_number(where, "num_attention_heads", values.get("num_attention_heads"), COUNT)
    if not values.get("group_query_attention"):
        values["num_query_groups"] = heads
    if values.get("kv_channels") is None:
        values["kv_channels"] = hidden // heads
    values.setdefault("layernorm_epsilon", values.get("norm_epsilon", 1e-5))
    values.setdefault("ffn_hidden_size", None)
    for name, other in {"padded_vocab_size": "vocab_size", "moe_ffn_hidden_size": "ffn_hidden_size"}.items():
        if values.get(name) is None:
            values[name] = values.get(other)
    return values


def _fitting(
    values: Mapping[str, Any], mixture: bool, before: int | None, base: Mapping[str, Any] | None, where: str
) -> Family:
    """The base's family where its layers can have the model's parts, else the first whose layers can."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    families = list(FAMILIES)
    if base:
        families.insert(0, family_of(base, f"the base configuration of {where}"))
    for family in families:
        fits = family.is_mixture is mixture and family.qk_norm is bool(values.get("qk_layernorm"))
        fits = fits and bool(values.get("add_qkv_bias")) in family.qkv_biases
        if family.window == "none":
            fits = fits and before is None
        if family.model_type == "llama":  # transformers 5 demands it
            fits = fits and hidden % heads == 0
        if not fits:
            continue
        if family.model_type == "qwen2_moe" and values["kv_channels"] * heads != hidden:
            remedy = "the Qwen2-MoE form has no other head size; keep this model in Megatron's format"
            raise bad_value(where, "kv_channels", values["kv_channels"], f"{hidden}/{heads} (hidden/heads)", remedy)
        return family
    biases, remedy = bool(values.get("add_qkv_bias")), "correct one of the two, or keep this model in Megatron's format"
    expected = f"one that a Hugging Face architecture has with qk_layernorm {bool(values.get('qk_layernorm'))}"
    raise bad_value(where, "add_qkv_bias", biases, expected, remedy)


def _keys_before(values: Mapping[str, Any], where: str) -> int | None:
    """How many keys before its own a token sees; None for all."""
    window = values.get("window_size")
    if window is None or window in ([None], (None,)):
        return None
    if isinstance(window, list | tuple) and len(window) == 2:
        before, after = window
        if before == -1 and after in (-1, 0):
            return None
        if type(before) is int and before >= 0 and after == 0:
            return before
    expected = "(keys before, 0) for a Hugging Face model"
    raise bad_value(where, "window_size", window, expected, "train the seed with such a window")


def _written_window(before: int | None, family: Family, layers: int) -> dict[str, Any]:
    if family.window == "none":
        return {}
    if before is None:
        if family.window == "own":
            return {"sliding_window": None}  # an absent key is a window of 4096 for Mistral
        return {"use_sliding_window": False}
    if family.window == "own":
        return {"sliding_window": before + 1}
    # Both: 4.57 goes by the first sliding layer, and 5 has another default for Qwen2-MoE's list.
    types = ["sliding_attention"] * layers
    return {"use_sliding_window": True, "sliding_window": before + 1, "max_window_layers": 0, "layer_types": types}


def _written_scaling(values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """transformers 4's ``rope_scaling``: the one that was read, or what Megatron's arguments say."""
    if values.get("hf_rope_scaling"):
        return dict(values["hf_rope_scaling"])
    interpolation = values.get("rotary_seq_len_interpolation_factor")
    if values.get("use_rope_scaling"):
        if interpolation is not None:
            remedy = "Hugging Face has one rotary scaling; correct one of the two"
            expected = "None as use_rope_scaling (llama3) is on"
            raise bad_value(where, "rotary_seq_len_interpolation_factor", interpolation, expected, remedy)
        given = values.get("rope_scaling_factor", MEGATRON_ROPE_FACTOR)
        factor = check_number(where, "rope_scaling_factor", given, POSITIVE)
        llama3: dict[str, Any] = {"rope_type": "llama3", "factor": float(factor)}
        return llama3 | MEGATRON_LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if interpolation is None:
        return None
    factor = check_number(where, "rotary_seq_len_interpolation_factor", interpolation, POSITIVE)
    return {"rope_type": "linear", "factor": float(factor)}


def _written_dtype(values: Mapping[str, Any], where: str) -> str:
    if values.get("bf16"):
        return "bfloat16"
    if values.get("fp16"):
        return "float16"
    name = str(values.get("params_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise bad_value(where, "params_dtype", name, f"one of {', '.join(DTYPES)}", "save the model in one of those")
    return name


def _written_mixture(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The router's keys, and which layers are mixtures."""
    topk = check_number(where, "moe_router_topk", values.get("moe_router_topk"), COUNT)
    experts = check_number(where, "num_experts", values.get("num_experts"), COUNT)
    if topk > experts:
        raise bad_value(where, "moe_router_topk", topk, f"at most num_experts {experts}", "correct one of the two")
    frequency, layers = values.get("moe_layer_freq", 1), values["num_layers"]
    dense = [layer for layer, mixture in enumerate(mixture_layers(frequency, layers)) if not mixture]
    pre_softmax = bool(values.get("moe_router_pre_softmax"))
    if family.dialect == "mixtral":
        remedy = "the Mixtral form has no dense layers; keep this model in Megatron's format"
        if dense:
            raise bad_value(where, "moe_layer_freq", frequency, "1 for a Mixtral model", remedy)
        remedy = "the Mixtral form normalises the weights of the chosen; keep this model in Megatron's format"
        if pre_softmax and topk < experts:
            raise bad_value(where, "moe_router_pre_softmax", True, "False for a Mixtral model", remedy)
        return {}
    keys = {"decoder_sparse_step": 1, "mlp_only_layers": dense, "norm_topk_prob": not pre_softmax}
    if family.model_type == "qwen2_moe":
        keys |= {shared_expert.WIDTH_KEY: shared_expert.WRITTEN_WIDTH, "qkv_bias": bool(values.get("add_qkv_bias"))}
    return keys
