"""What the tools are asked to read: models and texts by name, and the names of a mixture's experts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_btx.common.cli_args import read_pairs
from megatron_btx.common.errors import InputError


def inputs_of(args: argparse.Namespace, kind: str, output: str) -> tuple[dict[str, str], dict[str, str]]:
    """The models and the texts, name -> path, of ``--btx-KIND-model`` and ``--btx-KIND-data``.

    Args:
        output: what ``--btx-KIND-output`` names, for the refusal.

    Raises:
        InputError: something is missing or has another form.
    """
    models = named_paths(getattr(args, f"btx_{kind}_model"), f"--btx-{kind}-model")
    data = named_paths(getattr(args, f"btx_{kind}_data"), f"--btx-{kind}-data")
    if getattr(args, f"btx_{kind}_output") is None:
        raise InputError(f"--btx-{kind}-output is missing; name {output} for the results")
    return models, data


def named_paths(words: list[str], flag: str) -> dict[str, str]:
    """NAME=PATH words as a mapping. Raises InputError for another form, a name given twice, or none."""
    if not words:
        raise InputError(f"{flag} is missing; give at least one NAME=PATH")
    return read_pairs(words, flag)


def expert_names(stored: Mapping[str, Mapping[str, Any]], count: int | None) -> list[str] | None:
    """The names of the experts, in the order of the mixtures; None for dense models.

    Args:
        stored: path -> the arguments that its checkpoint holds.

    Raises:
        InputError: two mixtures of other experts, or of the same in another order, which one list would mislabel.
    """
    if not count:
        return None
    named = {}
    for path, arguments in stored.items():
        if arguments.get("btx_experts"):
            named[path] = list(arguments["btx_experts"])
    if not named:
        return [f"expert {number}" for number in range(count)]
    first, names = next(iter(named.items()))
    for path, others in named.items():
        if others != names:
            raise InputError(
                f"{path}: its experts are {', '.join(others)}, those of {first} {', '.join(names)}; mixtures of other "
                "experts, or in another order, need a run of their own"
            )
    return names
