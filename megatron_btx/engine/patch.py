"""The only way to replace something of Megatron's or PyTorch's, and the list of what was replaced.

What is replaced must be there in the form that its stand-in was written for. Otherwise
:class:`~megatron_btx.ground.errors.MegatronVersionError` names the versions, because a silent mismatch would be worse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from megatron_btx.ground.errors import MegatronVersionError

WRITTEN_FOR = "megatron-core 0.19"

_replaced: list[str] = []


def expect(owner: Any, *names: str) -> None:
    """Look whether a module or class has all these attributes.

    Raises:
        MegatronVersionError: one is missing.
    """
    for name in names:
        if not hasattr(owner, name):
            raise MegatronVersionError(f"{_describe(owner, name)} does not exist: {_versions()}")


def expect_parameters(owner: Any, name: str, parameters: Sequence[str], only_first: int | None = None) -> None:
    """Look whether a function takes the parameters of these names, in this order.

    Args:
        only_first: how many of them are looked at; all by default.

    Raises:
        MegatronVersionError: it is missing, or takes others.
    """
    expect(owner, name)
    found = list(inspect.signature(getattr(owner, name)).parameters)
    if found[:only_first] != list(parameters):
        raise MegatronVersionError(
            f"{_describe(owner, name)} takes {found}, expected {list(parameters)}: {_versions()}"
        )


def replace(owner: Any, name: str, replacement: Any) -> None:
    """Put ``replacement`` in the place of an attribute that must be there.

    Raises:
        MegatronVersionError: it is missing.
    """
    expect(owner, name)
    setattr(owner, name, replacement)
    _replaced.append(_describe(owner, name))


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute by what ``make`` makes of it.

    Raises:
        MegatronVersionError: it is missing.
    """
    expect(owner, name)
    replace(owner, name, make(getattr(owner, name)))


def list_replaced() -> list[str]:
    """What was replaced in this process, in order, each with its module or class."""
    return list(_replaced)


def _describe(owner: Any, name: str) -> str:
    where = getattr(owner, "__name__", repr(owner))
    if inspect.isclass(owner):
        where = f"{owner.__module__}.{where}"
    return f"{where}.{name}"


def _versions() -> str:
    found = f"megatron-core {version('megatron-core')} with torch {version('torch')}"
    return f"this is written for {WRITTEN_FOR}, found {found}; install the pinned versions"
