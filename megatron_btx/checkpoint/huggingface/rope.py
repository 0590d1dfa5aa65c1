"""Rotary position embeddings of a ``config.json``: their base and scaling, and what Megatron can say of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_btx.checkpoint.huggingface.families import (
    MEGATRON_LLAMA3,
    MEGATRON_ROPE_FACTOR,
    POSITIVE,
    bad_value,
    check_number,
)

_LENGTH_KEY = "original_max_position_embeddings"
_FIELDS = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "dynamic": ("factor", _LENGTH_KEY),
    # "finetuned" tells how the model was made; no class of transformers reads it.
    "yarn": ("factor", f"{_LENGTH_KEY} attention_factor beta_fast beta_slow mscale mscale_all_dim truncate finetuned"),
    "longrope": ("", f"factor short_factor long_factor attention_factor {_LENGTH_KEY}"),
    "llama3": (f"factor low_freq_factor high_freq_factor {_LENGTH_KEY}", ""),
}
"""Rotary scalings that transformers 4.57 and 5 both know (``modeling_rope_utils.py``): fields they need, and may have.

Its own checks only log what they find, and 4.57 calls every whole number wrong: so they are made here.
"""
_PER_FREQUENCY = ("short_factor", "long_factor")
_NO_NUMBERS = frozenset({"rope_type", "truncate", "finetuned"})


def read_rope(config: Mapping[str, Any], default: float, where: str) -> tuple[float, dict[str, Any] | None]:
    """The rotary base (``default`` where none is given) and scaling; transformers 4 has two keys, 5 one for both.

    Returns: the base, and the scaling with its kind under ``rope_type``, or None for plain rotary embeddings.
    """
    thetas = {"rope_theta": config.get("rope_theta")}
    scaling: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        form = config.get(key)
        if not form:
            continue
        if not isinstance(form, Mapping) or any(isinstance(value, Mapping) for value in form.values()):
            raise bad_value(where, key, form, "one set of numbers for all layers", "take a model with one")
        if form.get("partial_rotary_factor", 1.0) != 1.0:
            remedy = "only rotary embeddings over the whole head can be converted"
            raise bad_value(where, f"{key}.partial_rotary_factor", form["partial_rotary_factor"], "1.0", remedy)
        thetas[f"{key}.rope_theta"] = form.get("rope_theta")
        found = _scaling_of(form)
        if scaling and found != scaling:
            raise bad_value(where, "rope_scaling", found, f"rope_parameters {scaling!r}", "correct one of the two")
        scaling = found
    given = {key: value for key, value in thetas.items() if value is not None}
    theta = next(iter(given.values()), default)
    for key, value in {"rope_theta": theta, **given}.items():
        if check_number(where, key, value, POSITIVE) != theta:
            raise bad_value(where, key, value, f"rope_theta {theta!r}", "correct one of the two")
    if scaling:
        _check_scaling(scaling, config, where)
    if not scaling or scaling["rope_type"] == "default":
        return theta, None
    return theta, scaling


def _scaling_of(form: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling with its kind under ``rope_type``, and without what holds for all kinds; ``type`` is the older key."""
    scaling: dict[str, Any] = {}
    for name, value in form.items():
        if value is not None and name not in ("type", "rope_theta", "partial_rotary_factor"):
            scaling[name] = value
    scaling["rope_type"] = str(form.get("rope_type") or form.get("type") or "default")
    return scaling


def _check_scaling(scaling: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Refuse a rotary scaling of a kind that nobody knows, or with fields of unknown meaning."""
    kind = scaling["rope_type"]
    if kind not in _FIELDS:
        remedy = "transformers 4.57 and 5 do not both have it; convert a model without it"
        raise bad_value(where, "rope_scaling.rope_type", kind, f"one of {', '.join(_FIELDS)}", remedy)
    needed, optional = map(str.split, _FIELDS[kind])
    for name in sorted(scaling.keys() - {*needed, *optional, "rope_type"}):
        expected = f"none of that name in a rotary scaling of type {kind!r}"
        remedy = "correct the type, or take the field away if the model was trained without it"
        raise bad_value(where, f"rope_scaling.{name}", scaling[name], expected, remedy)
    for name in sorted({*needed, *scaling} - _NO_NUMBERS):
        values = scaling.get(name)
        if name not in _PER_FREQUENCY or not isinstance(values, list) or not values:
            values = [values]
        for value in values:
            if value or name in needed or name in _PER_FREQUENCY:  # elsewhere 0 means that there is none
                check_number(where, f"rope_scaling.{name}", value, POSITIVE)
    if kind in ("yarn", "longrope", "dynamic") and config.get(_LENGTH_KEY) not in (None, scaling.get(_LENGTH_KEY)):
        expected = f"rope_scaling.{_LENGTH_KEY} {scaling.get(_LENGTH_KEY)!r}"
        raise bad_value(where, _LENGTH_KEY, config[_LENGTH_KEY], expected, "say it in rope_scaling alone")


def scaling_arguments(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The Megatron arguments of a rotary scaling: those of no scaling where Megatron does not have it."""
    arguments = {
        "use_rope_scaling": False,
        "rope_scaling_factor": MEGATRON_ROPE_FACTOR,
        "rotary_seq_len_interpolation_factor": None,
    }
    if scaling is not None and scaling["rope_type"] == "llama3" and not foreign_llama3(scaling):
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}
    if scaling is not None and scaling["rope_type"] == "linear":
        arguments["rotary_seq_len_interpolation_factor"] = as_int(scaling["factor"])
    return arguments


def as_int(value: float) -> float:
    """As an int where it is one: Megatron's flags for rotary base and interpolation take nothing else."""
    if value == int(value):
        return int(value)
    return value


def foreign_llama3(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a Llama 3 scaling that differ from those fixed in Megatron."""
    return {key: scaling.get(key) for key, fixed in MEGATRON_LLAMA3.items() if scaling.get(key) != fixed}
