"""A Hugging Face ``config.json`` as Megatron arguments, and back.

The arguments have the names of :data:`megatron_btx.checkpoint.arguments.MODEL_ARGUMENTS`. What both sides hold as one
number is a row of one table, read in both directions; everything else has a function per direction. A key that is
absent means what its transformers class makes of it. What is written is read alike by transformers 4.57 and 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS
from megatron_btx.errors import InputError


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

_COUNT, _POSITIVE, _FRACTION = "an integer of at least 1", "a number above 0", "a number from 0 up to 1"


@dataclasses.dataclass(frozen=True)
class _Row:
    """One number that both sides hold."""

    argument: str
    key: str
    kind: str = _COUNT
    mixtral_key: str = ""
    mixture: bool = False

    def key_of(self, family: Family) -> str:
        """The key in a family's configuration."""
        return self.mixtral_key if self.mixtral_key and family.dialect == "mixtral" else self.key


_ROWS = (
    _Row("num_layers", "num_hidden_layers"),
    _Row("hidden_size", "hidden_size"),
    _Row("ffn_hidden_size", "intermediate_size"),
    _Row("num_attention_heads", "num_attention_heads"),
    _Row("num_query_groups", "num_key_value_heads"),
    _Row("kv_channels", "head_dim"),
    _Row("layernorm_epsilon", "rms_norm_eps", _POSITIVE),
    _Row("max_position_embeddings", "max_position_embeddings"),
    _Row("padded_vocab_size", "vocab_size"),
    _Row("init_method_std", "initializer_range", _FRACTION),
    _Row("attention_dropout", "attention_dropout", _FRACTION),
    _Row("num_experts", "num_experts", mixtral_key="num_local_experts", mixture=True),
    _Row("moe_router_topk", "num_experts_per_tok", mixture=True),
    # After ffn_hidden_size: Mixtral's one width is that of its experts.
    _Row("moe_ffn_hidden_size", "moe_intermediate_size", mixtral_key="intermediate_size", mixture=True),
)
_ALWAYS = {
    "normalization": "RMSNorm", "position_embedding_type": "rope", "add_position_embedding": True,
    "rotary_percent": 1.0, "swiglu": True, "add_bias_linear": False, "hidden_dropout": 0.0,
}  # fmt: skip
"""Arguments with one value in every model that Hugging Face's forms can say."""
_TRANSLATED = frozenset(row.argument for row in _ROWS) | {
    "group_query_attention", "add_position_embedding", "rotary_base", "rotary_seq_len_interpolation_factor",
    "use_rope_scaling", "rope_scaling_factor", "add_qkv_bias", "qk_layernorm", "window_size", "moe_layer_freq",
    "untie_embeddings_and_output_weights", "moe_router_pre_softmax",
    # Without effect on what a model computes: µP's numbers while it is off, the router's precision, a policy of drops.
    "mup_base_hidden_size", "mup_base_head_dim", "mup_embedding_mult", "mup_output_mult", "mup_attn_scale_power",
    "moe_router_dtype", "moe_token_drop_policy",
}  # fmt: skip
"""Arguments that may have any value here; every other model argument must have the one value that can be written."""
_PASSED_THROUGH = (
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "pretraining_tp", "initializer_range",
    "attention_dropout", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise",
)  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32")
_MEGATRON_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
"""Numbers of Llama 3's rotary scaling that are fixed in Megatron 0.19."""
_MEGATRON_ROPE_FACTOR = 8.0
_START = "max_window_layers"
"""The first layer with a window, despite its name."""


def _wrong(where: str, key: str, value: object, expected: str, remedy: str) -> InputError:
    return InputError(f"{where}: {key} is {value!r}, expected {expected}; {remedy}")


def _number(where: str, key: str, value: object, kind: str) -> Any:
    """The value, if it is a number of its kind; never a bool or text."""
    types = (int,) if kind is _COUNT else (int, float)
    if isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value):
        in_range = {_COUNT: value >= 1, _FRACTION: 0 <= value <= 1, _POSITIVE: value > 0}
        if in_range[kind]:
            return value
    found = "is missing" if value is None else f"is {value!r}"
    raise InputError(f"{where}: {key} {found}, expected {kind}; correct it there")


def _switch(where: str, config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise _wrong(where, key, value, "true or false", "correct it there")
    return value


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a configuration: by ``architectures``, or by ``model_type`` where that is missing.

    Raises:
        InputError: it is none of :data:`FAMILIES`, or the two fields contradict each other.
    """
    named, model_type = config.get("architectures") or [], config.get("model_type")
    named = named if isinstance(named, list) else [named]
    for family in FAMILIES:
        if family.architecture in named if named else family.model_type == model_type:
            if model_type not in (None, family.model_type):
                raise _wrong(
                    where, "model_type", model_type, f"{family.model_type!r} as of {named}", "correct one of the two"
                )
            return family
    key, found = ("architectures", named) if named else ("model_type", model_type)
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise _wrong(where, key, found, f"one of {supported}", "convert one of those")


def arguments_from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The Megatron arguments of a Hugging Face configuration.

    Besides model arguments: ``vocab_size``, ``seq_length`` (tokens, the longest position), ``params_dtype`` (its
    name), ``bf16``, ``fp16``, ``init_method_std``, dropouts, and, where there is a rotary scaling, ``hf_rope_scaling``:
    all of it, also what Megatron does not have (see :func:`refuse_for_megatron`).

    Args:
        config: the content of config.json, of transformers 4 or 5.
        where: the file, for messages.

    Raises:
        InputError: another architecture, a missing or impossible number, or a part that no Megatron argument says.
    """
    family = family_of(config, where)
    _refuse_parts(config, family, where)
    filled = _with_defaults(config, family, where)
    arguments: dict[str, Any] = dict(_ALWAYS)
    for row in _ROWS:
        if family.is_mixture or not row.mixture:
            arguments[row.argument] = _number(where, row.key_of(family), filled.get(row.key_of(family)), row.kind)
    heads, groups, layers = (arguments[k] for k in ("num_attention_heads", "num_query_groups", "num_layers"))
    if heads % groups:
        raise _wrong(
            where, "num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}", "correct one of the two"
        )
    theta, scaling = _rope(config, family, where)
    dtype = _dtype(config, where)
    arguments |= _scaling_arguments(scaling)
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
    if config.get("hidden_act", "silu") != "silu":
        raise _wrong(where, "hidden_act", config["hidden_act"], "'silu'", "only gated SiLU models can be converted")
    if config.get("quantization_config") is not None:
        raise InputError(f"{where}: quantization_config is given, expected plain weights; take the unquantized model")
    for key in ("attention_bias", "mlp_bias"):
        if True not in family.qkv_biases and _switch(where, config, key):
            remedy = "such biases, also on the output projections, have no counterpart; take a model without them"
            raise _wrong(where, key, True, "false", remedy)
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        remedy = "only rotary embeddings over the whole head can be converted"
        raise _wrong(where, "partial_rotary_factor", config["partial_rotary_factor"], "1.0", remedy)
    shared = config.get("shared_expert_intermediate_size", family.defaults.get("shared_expert_intermediate_size", 0))
    if family.is_mixture and shared != 0:
        remedy = "a gated shared expert has no counterpart; take a model without one"
        raise _wrong(where, "shared_expert_intermediate_size", shared, "0", remedy)


def _with_defaults(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The configuration with what its class makes of absent and null keys."""
    filled = {**family.defaults, **config}
    hidden, heads = (_number(where, key, filled.get(key), _COUNT) for key in ("hidden_size", "num_attention_heads"))
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = heads
    if filled.get("head_dim") is None:
        if hidden % heads:
            raise _wrong(
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
            raise _wrong(where, "num_local_experts", counts[-1], f"num_experts {counts[0]}", "correct one of the two")
        filled["num_experts"] = filled["num_local_experts"] = counts[0] if counts else None
    return filled


def _qkv_bias(config: Mapping[str, Any], family: Family, where: str) -> bool:
    if len(family.qkv_biases) == 1:
        return family.qkv_biases[0]
    return _switch(where, config, "qkv_bias", family.qkv_biases[0])


def _dtype(config: Mapping[str, Any], where: str) -> str:
    """Name of the weights' type: ``dtype`` of transformers 5, ``torch_dtype`` of 4; float32 where there is neither."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(key) or "float32"
    if name not in _DTYPES:
        raise _wrong(where, key, name, f"one of {', '.join(_DTYPES)}", "save the model in one of those types")
    return str(name)


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
            raise _wrong(where, key, form, "one set of numbers for all layers", "take a model with one")
        kinds = {form[name] for name in ("rope_type", "type") if isinstance(form.get(name), str)} or {"default"}
        if len(kinds) > 1:
            raise _wrong(
                where, f"{key}.type", form["type"], f"rope_type {form['rope_type']!r}", "correct one of the two"
            )
        if form.get("partial_rotary_factor", 1.0) != 1.0:
            remedy = "only rotary embeddings over the whole head can be converted"
            raise _wrong(where, f"{key}.partial_rotary_factor", form["partial_rotary_factor"], "1.0", remedy)
        if form.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = form["rope_theta"]
        kept = {k: v for k, v in form.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
        scalings.append({k: v for k, v in kept.items() if v is not None} | {"rope_type": kinds.pop()})
    theta = thetas.get("rope_theta", next(iter(thetas.values()), family.defaults["rope_theta"]))
    for key, value in {"rope_theta": theta, **thetas}.items():
        if _number(where, key, value, _POSITIVE) != theta:
            raise _wrong(where, key, value, f"rope_theta {theta!r}", "correct one of the two")
    if scalings and scalings[0] != scalings[-1]:
        raise _wrong(where, "rope_scaling", scalings[-1], f"rope_parameters {scalings[0]!r}", "correct one of the two")
    scaling = scalings[0] if scalings and scalings[0]["rope_type"] != "default" else None
    required = {"linear": ("factor",), "llama3": ("factor", *_MEGATRON_LLAMA3)}
    for key in required.get(scaling["rope_type"], ()) if scaling else ():
        _number(where, f"rope_scaling.{key}", scaling.get(key) if scaling else None, _POSITIVE)
    return theta, scaling


def _scaling_arguments(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The Megatron arguments of a rotary scaling: those of no scaling where Megatron does not have it."""
    scaling = scaling or {"rope_type": "default"}
    llama3 = scaling["rope_type"] == "llama3" and not _foreign_llama3(scaling)
    return {
        "use_rope_scaling": llama3,
        "rope_scaling_factor": float(scaling["factor"]) if llama3 else _MEGATRON_ROPE_FACTOR,
        "rotary_seq_len_interpolation_factor": _whole(scaling["factor"]) if scaling["rope_type"] == "linear" else None,
    }


def _whole(value: float) -> float:
    """As an int where it is one: Megatron's flags for rotary base and interpolation take nothing else."""
    return int(value) if value == int(value) else value


def _foreign_llama3(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a Llama 3 scaling that differ from those fixed in Megatron."""
    return {key: scaling.get(key) for key, fixed in _MEGATRON_LLAMA3.items() if scaling.get(key) != fixed}


def _window(filled: Mapping[str, Any], family: Family, layers: int, where: str) -> tuple[int, int] | None:
    """Megatron's (keys before, keys after) of a sliding window that all layers have; None for full attention."""
    if family.window == "none" or (family.window == "own" and filled.get("sliding_window") is None):
        return None
    if family.window == "switched":
        slides = _sliding_layers(filled, family, layers, where)
        if not _switch(where, filled, "use_sliding_window"):
            if filled.get("layer_types") is not None and any(slides):
                raise _wrong(where, "use_sliding_window", False, "true as layer_types slides", "correct one of the two")
            return None
        # transformers 4 and 5 agree about Qwen2-MoE only where both ways of saying it are there.
        doubtful = family.model_type == "qwen2_moe" and (filled.get("layer_types") is None or filled[_START] != 0)
        if not any(slides) and not doubtful:
            return None
        if not all(slides) or doubtful:
            found = {key: filled.get(key) for key in (_START, "layer_types")}
            remedy = "a window in some layers has no counterpart; take a model with use_sliding_window false"
            raise InputError(f"{where}: use_sliding_window is true with {found}, expected it for all layers; {remedy}")
    return int(_number(where, "sliding_window", filled.get("sliding_window"), _COUNT)) - 1, 0


def _sliding_layers(filled: Mapping[str, Any], family: Family, layers: int, where: str) -> list[bool]:
    """Which layers have the window if it is switched on."""
    if family.model_type == "qwen3_moe":
        return [True] * layers  # its class knows of no other
    start, types = filled.get(_START), filled.get("layer_types")
    if type(start) is not int or start < 0:
        raise _wrong(where, _START, start, "an integer of at least 0", "correct it there")
    if types is None:
        return [at >= start for at in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise _wrong(where, "layer_types", types, f"a list of {layers} kinds", "correct it there")
    return [kind == "sliding_attention" for kind in types]


def _mixture_arguments(
    config: Mapping[str, Any], family: Family, arguments: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The router's arguments and which layers are mixtures."""
    topk, experts, layers = (arguments[k] for k in ("moe_router_topk", "num_experts", "num_layers"))
    if topk > experts:
        raise _wrong(where, "num_experts_per_tok", topk, f"at most num_experts {experts}", "correct one of the two")
    pattern = [1] * layers
    if family.dialect == "qwen_moe":
        step = _number(where, "decoder_sparse_step", config.get("decoder_sparse_step", 1), _COUNT)
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(at) is int and 0 <= at < layers for at in dense):
            raise _wrong(where, "mlp_only_layers", dense, f"layer numbers from 0 to {layers - 1}", "correct it there")
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


def refuse_for_megatron(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse what a configuration carries from Hugging Face to Hugging Face and Megatron 0.19 cannot run.

    Raises:
        InputError: another rotary scaling, fractions where Megatron's flags take whole numbers, or one expert per
            token whose weight is normalised to one.
    """
    remedy = "convert it to a Hugging Face folder only"
    scaling = arguments.get("hf_rope_scaling")
    if scaling and scaling["rope_type"] not in ("llama3", "linear"):
        raise _wrong(where, "rope_scaling.rope_type", scaling["rope_type"], "'llama3' or 'linear' in Megatron", remedy)
    if scaling and scaling["rope_type"] == "llama3":
        for key, value in _foreign_llama3(scaling).items():
            raise _wrong(where, f"rope_scaling.{key}", value, f"{_MEGATRON_LLAMA3[key]} as fixed in Megatron", remedy)
    for key in ("rotary_base", "rotary_seq_len_interpolation_factor"):
        if isinstance(arguments.get(key), float):
            raise _wrong(where, key, arguments[key], "an integer in Megatron", remedy)
    one = arguments.get("num_experts") is not None and arguments.get("moe_router_topk") == 1
    if one and not arguments.get("moe_router_pre_softmax"):
        raise _wrong(where, "num_experts_per_tok", 1, "2 or more in Megatron where weights are normalised", remedy)


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
    _refuse_unsayable(arguments, mixture, where)
    values = _completed(arguments, where)
    family = _fitting(values, mixture, base, where)
    config = {key: base[key] for key in _PASSED_THROUGH if key in base} if base else {}
    config |= {"architectures": [family.architecture], "model_type": family.model_type, "hidden_act": "silu"}
    for row in _ROWS:
        if row.argument in values and (mixture or not row.mixture):
            value = _number(where, row.argument, values[row.argument], row.kind)
            config[row.key_of(family)] = value if row.kind is _COUNT else float(value)
    config |= {
        "rope_theta": float(_number(where, "rotary_base", values.get("rotary_base", 10000), _POSITIVE)),
        "rope_scaling": _written_scaling(values, where),
        "tie_word_embeddings": not values.get("untie_embeddings_and_output_weights", False),
        "torch_dtype": _written_dtype(values, where),
    }
    config |= _written_window(values, family, where) | (_written_mixture(values, family, where) if mixture else {})
    usual_heads = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    if family.model_type in ("qwen2", "qwen2_moe") and usual_heads:
        del config["head_dim"]  # these classes do not have it; Qwen2's attention yet takes one that is given
    return config


def _refuse_unsayable(arguments: Mapping[str, Any], mixture: bool, where: str) -> None:
    """Refuse every model argument that has no key in the configurations and not the one value they stand for."""
    remedy = "keep this model in Megatron's format, or start from a seed with that value"
    for argument in MODEL_ARGUMENTS:
        if argument.name in _TRANSLATED or (argument.moe and not mixture):
            continue
        value, expected = argument.value(arguments), _ALWAYS.get(argument.name, argument.default)
        if value != expected:
            raise _wrong(where, argument.name, value, f"{expected!r} for a Hugging Face model", remedy)
    if arguments.get("btx_sample_top1"):
        raise _wrong(where, "btx_sample_top1", arguments["btx_sample_top1"], "false for a Hugging Face model", remedy)
    if arguments.get("qk_layernorm") and arguments.get("add_qkv_bias"):
        raise InputError(
            f"{where}: add_qkv_bias is True with qk_layernorm True, expected one of them at most: Qwen3 has biases on "
            f"all attention projections or none; {remedy}"
        )


def _completed(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments with what Megatron makes of the ones that are not given."""
    values = dict(arguments)
    hidden, heads = (_number(where, key, values.get(key), _COUNT) for key in ("hidden_size", "num_attention_heads"))
    if not values.get("group_query_attention"):
        values["num_query_groups"] = heads
    elif heads % _number(where, "num_query_groups", values.get("num_query_groups"), _COUNT):
        wanted = f"a divisor of num_attention_heads {heads}"
        raise _wrong(where, "num_query_groups", values["num_query_groups"], wanted, "correct one of the two")
    if values.get("kv_channels") is None:
        if hidden % heads:
            wanted = f"a multiple of num_attention_heads {heads}"
            raise _wrong(where, "hidden_size", hidden, wanted, "correct it, or give kv_channels")
        values["kv_channels"] = hidden // heads
    values.setdefault("layernorm_epsilon", values.get("norm_epsilon", 1e-5))
    values.setdefault("rope_scaling_factor", _MEGATRON_ROPE_FACTOR)
    for name, other in {"padded_vocab_size": "vocab_size", "moe_ffn_hidden_size": "ffn_hidden_size"}.items():
        values[name] = values.get(other) if values.get(name) is None else values[name]
    for name in ("num_layers", "ffn_hidden_size", "max_position_embeddings"):
        values.setdefault(name, None)  # so that a missing one is refused by name
    return values


def _fitting(values: Mapping[str, Any], mixture: bool, base: Mapping[str, Any] | None, where: str) -> Family:
    """The base's family where it can say the model, else the first that can."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    for family in ((family_of(base, f"the base configuration of {where}"),) if base else ()) + FAMILIES:
        if (
            family.is_mixture is mixture
            and family.qk_norm is bool(values.get("qk_layernorm"))
            and bool(values.get("add_qkv_bias")) in family.qkv_biases
            and (family.window != "none" or _keys_before(values, where) is None)
            and (family.model_type != "llama" or hidden % heads == 0)  # transformers 5 demands it of Llama
        ):
            if family.model_type == "qwen2_moe" and values["kv_channels"] * heads != hidden:
                remedy = "the Qwen2-MoE form has no other head size; keep this model in Megatron's format"
                raise _wrong(where, "kv_channels", values["kv_channels"], f"{hidden}/{heads} (hidden/heads)", remedy)
            return family
    raise InputError(f"{where}: no Hugging Face architecture has these parts; keep this model in Megatron's format")


def _keys_before(values: Mapping[str, Any], where: str) -> int | None:
    """How many keys before its own a token sees; None for all."""
    window = values.get("window_size")
    given = tuple(window) if isinstance(window, (list, tuple)) else (window,)
    if given in ((None,), (-1, 0), (-1, -1)):
        return None
    if len(given) != 2 or type(given[0]) is not int or given[0] < 0 or given[1] != 0:
        raise _wrong(
            where,
            "window_size",
            window,
            "(keys before, 0) for a Hugging Face model",
            "train the seed with such a window",
        )
    return given[0]


def _written_window(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    before = _keys_before(values, where)
    if family.window == "none":
        return {}
    width = None if before is None else before + 1
    if family.window == "own":
        return {"sliding_window": width}  # also when None: an absent key is a window of 4096 for Mistral
    if width is None:
        return {"use_sliding_window": False}
    # Both: 4.57 goes by the first sliding layer, and 5 has another default for Qwen2-MoE's list.
    types = ["sliding_attention"] * values["num_layers"]
    return {"use_sliding_window": True, "sliding_window": width, "max_window_layers": 0, "layer_types": types}


def _written_scaling(values: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """transformers 4's ``rope_scaling``; a carried one must say what the arguments say."""
    carried, interpolation = values.get("hf_rope_scaling"), values.get("rotary_seq_len_interpolation_factor")
    made: dict[str, Any] | None = dict(carried) if carried else None
    if not carried and values.get("use_rope_scaling"):
        factor = _number(where, "rope_scaling_factor", values["rope_scaling_factor"], _POSITIVE)
        llama3 = {"rope_type": "llama3", "factor": float(factor)} | _MEGATRON_LLAMA3
        made = llama3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif not carried and interpolation is not None:
        factor = _number(where, "rotary_seq_len_interpolation_factor", interpolation, _POSITIVE)
        made = {"rope_type": "linear", "factor": float(factor)}
    for name, said in _scaling_arguments(made).items():
        matters = name != "rope_scaling_factor" or values.get("use_rope_scaling")
        if matters and (values.get(name) or None) != (said or None):
            remedy = "Hugging Face has one rotary scaling; correct one of the two"
            raise _wrong(where, name, values.get(name), f"{said!r} as of the rotary scaling {made}", remedy)
    return made


def _written_dtype(values: Mapping[str, Any], where: str) -> str:
    name = "bfloat16" if values.get("bf16") else "float16" if values.get("fp16") else values.get("params_dtype")
    name = str(name or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise _wrong(where, "params_dtype", name, f"one of {', '.join(_DTYPES)}", "save the model in one of those")
    return name


def _written_mixture(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The router's keys, and which layers are mixtures."""
    topk, experts = (_number(where, name, values.get(name), _COUNT) for name in ("moe_router_topk", "num_experts"))
    if topk > experts:
        raise _wrong(where, "moe_router_topk", topk, f"at most num_experts {experts}", "correct one of the two")
    frequency, layers = values.get("moe_layer_freq", 1), values["num_layers"]
    if isinstance(frequency, int) and frequency > 0:
        pattern = [int(at % frequency == 0) for at in range(layers)]
    else:
        pattern = list(frequency) if isinstance(frequency, (list, tuple)) else []
    if len(pattern) != layers or set(pattern) not in ({1}, {0, 1}):
        wanted = f"a whole number or a list of {layers} zeros and ones"
        raise _wrong(where, "moe_layer_freq", frequency, wanted, "correct it there")
    dense = [at for at, mixture in enumerate(pattern) if not mixture]
    pre_softmax = bool(values.get("moe_router_pre_softmax"))
    if family.dialect == "mixtral":
        if dense:
            remedy = "the Mixtral form has no dense layers; keep this model in Megatron's format"
            raise _wrong(where, "moe_layer_freq", frequency, "1 for a Mixtral model", remedy)
        if pre_softmax and topk < experts:
            remedy = "the Mixtral form normalises the weights of the chosen; keep this model in Megatron's format"
            raise _wrong(where, "moe_router_pre_softmax", True, "False for a Mixtral model", remedy)
        return {}
    keys = {"decoder_sparse_step": 1, "mlp_only_layers": dense, "norm_topk_prob": not pre_softmax}
    if family.model_type == "qwen2_moe":
        keys |= {"shared_expert_intermediate_size": 0, "qkv_bias": bool(values.get("add_qkv_bias"))}
    return keys
