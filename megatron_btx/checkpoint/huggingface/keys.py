"""Keys of a config.json that change what a model computes and that its class does not have.

A configuration may hold anything, and most of it is harmless: who made it, defaults for generating text, caches. But
forks of a model give it scales, caps and windows by such keys; a converter that passes over them makes another model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_btx.checkpoint.huggingface.families import Family, bad_value
from megatron_btx.common.errors import InputError

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

_LAYER_KINDS: tuple[str, ...] = ("full_attention", "sliding_attention")


def refuse_unknown_keys(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse keys that change the function and that the family's class passes over.

    Raises:
        InputError: names the key and its value.
    """
    remedy = "convert a model without it, or take the key away if the model was trained without it"
    if config.get("is_causal", True) is not True:
        raise bad_value(where, "is_causal", config["is_causal"], "true, as Megatron attends to the past alone", remedy)
    for key, value in config.items():
        neutral = _neutral_values(key)
        if neutral and value not in neutral:
            expected = " or ".join(map(str, neutral[:2]))
            raise bad_value(where, key, value, f"{expected}, because this architecture has no such part", remedy)
    code = config.get("auto_map")
    if isinstance(code, Mapping) and any(str(name).startswith("AutoModel") for name in code):
        raise InputError(
            f"{where}: auto_map names code of the model's own, which is not run, expected a class of "
            "transformers; take auto_map away if transformers' class computes the same"
        )
    _refuse_other_windows(config, family, where)


def _neutral_values(key: str) -> tuple[Any, ...]:
    """The values with which a key of this name changes nothing; none for keys that never change anything."""
    if key in _READ:
        return ()
    if _SCALES.search(key):
        return _NEUTRAL_SCALES
    if _OTHERS.search(key):
        return _NEUTRAL_OTHERS
    return ()


def _refuse_other_windows(config: Mapping[str, Any], family: Family, where: str) -> None:
    """Windows that the family's class passes over, and layers that see in another way."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list):
        kinds = []
    allowed = _LAYER_KINDS
    if family.window == "none":
        allowed = ("full_attention",)
    for kind in kinds:
        if kind not in allowed:
            remedy = "such layers cannot be converted"
            raise bad_value(where, "layer_types", kind, f"{' or '.join(allowed)} in this architecture", remedy)
    if family.window == "own" and len(set(kinds)) > 1:
        remedy = "a window in some layers has no counterpart; take a model with one kind of layers"
        raise bad_value(where, "layer_types", kinds, "the same for all layers", remedy)
    if family.window == "none" and config.get("sliding_window") and config.get("use_sliding_window", True):
        remedy = "say MistralForCausalLM if it was trained with one, else take the key away"
        raise bad_value(where, "sliding_window", config["sliding_window"], "none in this architecture", remedy)
