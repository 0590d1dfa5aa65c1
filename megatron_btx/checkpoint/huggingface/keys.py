"""Keys of a config.json that change what a model computes and that its class does not have.

A configuration may hold anything, and most of it is harmless: who made it, defaults for generating text, caches. But
forks of a model give it scales, caps and windows by such keys; a converter that passes over them makes another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_btx.checkpoint.huggingface.families import POSITIVE, Family, number, wrong
from megatron_btx.ground.errors import InputError

_READ = frozenset(
    "rope_theta rope_scaling rope_parameters partial_rotary_factor sliding_window use_sliding_window "
    "max_window_layers layer_types decoder_sparse_step".split()
)
"""Keys that the words below would find, and that are read (or refused) elsewhere."""
_SCALES = re.compile(
    r"multiplier|logits?_scal|^scale_(emb|depth)$|embedding_scale|residual_scale|routed_scaling_factor"
)
_OTHERS = re.compile(
    r"softcap|alibi|rope|rotary|window|clip_qkv|parallel_(residual|attn|block)|logn_attn|dynamic_ntk|mup|"
    r"attention_chunk_size|temperature_tuning|query_pre_attn_scalar|attention_sink|dim_model_base|scoring_func"
)
_NEUTRAL_SCALES: tuple[Any, ...] = (None, 1, False)
_NEUTRAL_OTHERS: tuple[Any, ...] = (None, 0, False, "", [], {})

_ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    # "finetuned" tells how the model was made; no class of transformers reads it.
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate "
        "finetuned".split()
    ),
    "longrope": frozenset("factor short_factor long_factor attention_factor original_max_position_embeddings".split()),
    "llama3": frozenset("factor low_freq_factor high_freq_factor original_max_position_embeddings".split()),
}
"""The rotary scalings that transformers 4.57 and 5 both know (``modeling_rope_utils.py``), and their fields."""
_LAYER_KINDS = ("full_attention", "sliding_attention")
_FACTOR_NEEDED = ("linear", "dynamic", "yarn", "llama3")
_PER_FREQUENCY = frozenset({"short_factor", "long_factor"})
_NO_NUMBERS = frozenset({"rope_type", "truncate", "finetuned"})
_LENGTH_KEY = "original_max_position_embeddings"


def refuse_unknown_keys(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse keys that change the function and that the family's class passes over.

    Raises:
        InputError: names the key and its value.
    """
    remedy = "convert a model without it, or take the key away if the model was trained without it"
    for key, value in config.items():
        if key in _READ:
            continue
        neutral = _NEUTRAL_SCALES if _SCALES.search(key) else _NEUTRAL_OTHERS if _OTHERS.search(key) else (value,)
        if value not in neutral:
            expected = " or ".join(str(n) for n in neutral[:2])
            raise wrong(where, key, value, f"{expected}, because this architecture has no such part", remedy)
    code = config.get("auto_map")
    if isinstance(code, Mapping) and any(str(name).startswith("AutoModel") for name in code):
        raise InputError(
            f"{where}: auto_map names code of the model's own, which is not run, expected a class of "
            "transformers; take auto_map away if transformers' class computes the same"
        )
    _refuse_other_windows(config, family, where)


def _refuse_other_windows(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Windows that the family's class passes over, and layers that see in another way."""
    kinds = config.get("layer_types")
    kinds = kinds if isinstance(kinds, list) else []
    allowed = ("full_attention",) if family.window == "none" else _LAYER_KINDS
    other = next((kind for kind in kinds if kind not in allowed), None)
    if other is not None:
        remedy = "such layers cannot be converted"
        raise wrong(where, "layer_types", other, f"{' or '.join(allowed)} in this architecture", remedy)
    if family.window == "own" and len(set(kinds)) > 1:
        remedy = "a window in some layers has no counterpart; take a model with one kind of layers"
        raise wrong(where, "layer_types", kinds, "the same for all layers", remedy)
    if family.window == "none" and config.get("sliding_window") and config.get("use_sliding_window", True):
        remedy = "say MistralForCausalLM if it was trained with one, else take the key away"
        raise wrong(where, "sliding_window", config["sliding_window"], "none in this architecture", remedy)


def check_rope_fields(scaling: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Refuse a rotary scaling of a kind that nobody knows, or with fields of unknown meaning.

    Args:
        scaling: its kind under ``rope_type``, without what holds for all kinds (base, part of the head).

    Raises:
        InputError: names the kind or the field.
    """
    kind = scaling["rope_type"]
    if kind not in _ROPE_FIELDS:
        known = ", ".join(_ROPE_FIELDS)
        remedy = "transformers 4.57 and 5 do not both have it; convert a model without it"
        raise wrong(where, "rope_scaling.rope_type", kind, f"one of {known}", remedy)
    unknown = sorted(scaling.keys() - _ROPE_FIELDS[kind] - {"rope_type"})
    if unknown:
        expected = f"none of that name in a rotary scaling of type {kind!r}"
        remedy = "correct the type, or take the field away if the model was trained without it"
        raise wrong(where, f"rope_scaling.{unknown[0]}", scaling[unknown[0]], expected, remedy)
    if kind in _FACTOR_NEEDED:
        number(where, "rope_scaling.factor", scaling.get("factor"), POSITIVE)
    for key in sorted(_PER_FREQUENCY & scaling.keys()):
        given = scaling[key]
        for factor in given if isinstance(given, list) and given else [given]:
            number(where, f"rope_scaling.{key}", factor, POSITIVE)
    for key in sorted(scaling.keys() - _PER_FREQUENCY - _NO_NUMBERS):
        if scaling[key]:  # 0 and null mean that there is none
            number(where, f"rope_scaling.{key}", scaling[key], POSITIVE)
    if kind in ("yarn", "longrope", "dynamic") and config.get(_LENGTH_KEY) not in (None, scaling.get(_LENGTH_KEY)):
        raise wrong(
            where,
            _LENGTH_KEY,
            config[_LENGTH_KEY],
            f"rope_scaling.{_LENGTH_KEY} {scaling.get(_LENGTH_KEY)!r}",
            "say it in rope_scaling alone",
        )
