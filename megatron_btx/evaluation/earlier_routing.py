"""routing.json of earlier analyses, read again to be drawn beside a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.ground.errors import InputError

_PER_LAYER = ("entropy", "dropped", "dead")
_PER_EXPERT = ("choices", "first", "probabilities", "gates")


def read_earlier(files: Sequence[Path], names: Sequence[str], experts: list[str]) -> dict[str, Any]:
    """The models of earlier analyses, by name.

    Args:
        names: those of the new analysis, which no earlier model may have.

    Raises:
        InputError: a file is no routing.json, of other experts, or has a name that is taken.
    """
    models: dict[str, Any] = {}
    for file in files:
        where = f"--btx-route-beside {file}"
        found, of_experts = _read(file, where)
        if of_experts != experts:
            raise InputError(f"{where}: its experts are {', '.join(of_experts)}, expected {', '.join(experts)}")
        for name, routed in found.items():
            if name in models or name in names:
                raise InputError(f"{where}: its model {name} is there already; name one of them otherwise")
            models[name] = routed
    return models


def _read(file: Path, where: str) -> tuple[dict[str, Any], list[str]]:
    """The models of one file, and the names of their experts."""
    try:
        content = json.loads(file.read_text())
        models, experts = content["models"], content["experts"]
        for labels in models.values():
            for routed in labels.values():
                _check_numbers(routed, len(experts))
    except FileNotFoundError:
        raise InputError(f"{where}: there is no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: is no routing.json of this tool ({error}); analyse that model again") from error
    return models, experts


def _check_numbers(routed: Mapping[str, Any], experts: int) -> None:
    """Check the numbers of one label against what :func:`megatron_btx.evaluation.routing.describe` writes.

    Raises:
        ValueError, KeyError or TypeError: one of them is not as it should be.
    """
    layers = len(routed["layers"])
    if not layers:
        raise ValueError("it has no layers")
    for name in (*_PER_LAYER, *_PER_EXPERT):
        if len(routed[name]) != layers:
            raise ValueError("its lists have other lengths than its layers")
    for name in _PER_EXPERT:
        for shares_E in routed[name]:
            if len(shares_E) != experts:
                raise ValueError("its shares are not one per expert")
    float(routed["loss"])
    sum(routed["entropy"])
    sum(routed["dropped"])
