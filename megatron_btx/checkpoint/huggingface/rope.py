"""Rotary position embeddings of a ``config.json``: their base and scaling, and what Megatron can say of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_btx.checkpoint.huggingface.families import (
    MEGATRON_LLAMA3,
    MEGATRON_ROPE_FACTOR,
    POSITIVE,
    Family,
    bad_value,
    check_number,
)

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
_FACTOR_NEEDED = ("linear", "dynamic", "yarn", "llama3")
_PER_FREQUENCY = frozenset({"short_factor", "long_factor"})
_NO_NUMBERS = frozenset({"rope_type", "truncate", "finetuned"})
_LENGTH_KEY = "original_max_position_embeddings"


def read_rope(config: Mapping[str, Any], family: Family, where: str) -> tuple[float, dict[str, Any] | None]:
    """The rotary base and scaling; transformers 4 has two keys for them, 5 one that holds both.

    Returns: the base, and the scaling with its kind under ``rope_type``, or None for plain rotary embeddings.
    """
    thetas: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    scalings: list[dict[str, Any]] = []
    for key in ("rope_parameters", "rope_scaling"):
        form = config.get(key)
        if form:
            scalings.append(_scaling_of(form, key, where))
            thetas[f"{key}.rope_theta"] = form.get("rope_theta")
    theta = _theta_of(thetas, family, where)
    if not scalings:
        return theta, None
    scaling = scalings[0]
    if scaling != scalings[-1]:
        raise bad_value(where, "rope_scaling", scalings[-1], f"rope_parameters {scaling!r}", "correct one of the two")
    _check_fields(scaling, config, where)
    if scaling["rope_type"] == "default":
        return theta, None
    if scaling["rope_type"] == "llama3":
        for key in MEGATRON_LLAMA3:
            check_number(where, f"rope_scaling.{key}", scaling.get(key), POSITIVE)
    return theta, scaling


def _scaling_of(form: object, key: str, where: str) -> dict[str, Any]:
    """One of the two forms of a scaling, with its kind under ``rope_type`` and without what holds for all kinds."""
    if not isinstance(form, Mapping) or any(isinstance(value, Mapping) for value in form.values()):
        raise bad_value(where, key, form, "one set of numbers for all layers", "take a model with one")
    if form.get("partial_rotary_factor", 1.0) != 1.0:
        remedy = "only rotary embeddings over the whole head can be converted"
        raise bad_value(where, f"{key}.partial_rotary_factor", form["partial_rotary_factor"], "1.0", remedy)
    scaling = {}
    for name, value in form.items():
        if value is not None and name not in ("type", "rope_theta", "partial_rotary_factor"):
            scaling[name] = value
    scaling["rope_type"] = _kind_of(form)
    return scaling


def _kind_of(form: Mapping[str, Any]) -> str:
    """The kind of a scaling; ``type`` is its older key, which counts where there is no other."""
    for key in ("rope_type", "type"):
        if isinstance(form.get(key), str):
            return str(form[key])
    return "default"


def _theta_of(stated: Mapping[str, Any], family: Family, where: str) -> float:
    """The rotary base, from all keys that can state it: None for one that does not.

    Raises:
        InputError: one is no number, or two differ.
    """
    thetas = {key: value for key, value in stated.items() if value is not None}
    theta: float = next(iter(thetas.values()), family.defaults["rope_theta"])
    for key, value in {"rope_theta": theta, **thetas}.items():
        if check_number(where, key, value, POSITIVE) != theta:
            raise bad_value(where, key, value, f"rope_theta {theta!r}", "correct one of the two")
    return theta


def scaling_arguments(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The Megatron arguments of a rotary scaling: those of no scaling where Megatron does not have it."""
    arguments = {
        "use_rope_scaling": False,
        "rope_scaling_factor": MEGATRON_ROPE_FACTOR,
        "rotary_seq_len_interpolation_factor": None,
    }
    if scaling is None:
        return arguments
    if scaling["rope_type"] == "llama3" and not foreign_llama3(scaling):
        arguments |= {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}
    if scaling["rope_type"] == "linear":
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


def _check_fields(scaling: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
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
        raise bad_value(where, "rope_scaling.rope_type", kind, f"one of {known}", remedy)
    unknown = sorted(scaling.keys() - _ROPE_FIELDS[kind] - {"rope_type"})
    if unknown:
        expected = f"none of that name in a rotary scaling of type {kind!r}"
        remedy = "correct the type, or take the field away if the model was trained without it"
        raise bad_value(where, f"rope_scaling.{unknown[0]}", scaling[unknown[0]], expected, remedy)
    if kind in _FACTOR_NEEDED:
        check_number(where, "rope_scaling.factor", scaling.get("factor"), POSITIVE)
    for key in sorted(_PER_FREQUENCY & scaling.keys()):
        factors = scaling[key]
        if not isinstance(factors, list) or not factors:
            factors = [factors]
        for factor in factors:
            check_number(where, f"rope_scaling.{key}", factor, POSITIVE)
    for key in sorted(scaling.keys() - _PER_FREQUENCY - _NO_NUMBERS):
        if scaling[key]:  # 0 and null mean that there is none
            check_number(where, f"rope_scaling.{key}", scaling[key], POSITIVE)
    if kind in ("yarn", "longrope", "dynamic") and config.get(_LENGTH_KEY) not in (None, scaling.get(_LENGTH_KEY)):
        expected = f"rope_scaling.{_LENGTH_KEY} {scaling.get(_LENGTH_KEY)!r}"
        raise bad_value(where, _LENGTH_KEY, config[_LENGTH_KEY], expected, "say it in rope_scaling alone")
