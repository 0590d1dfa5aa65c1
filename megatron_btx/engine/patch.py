"""The only way to replace something of Megatron's or PyTorch's, and the list of what was replaced.

What is replaced must be there in the form that its stand-in was written for
(:mod:`megatron_btx.common.version_guard`). Most calls of :func:`replace` and :func:`wrap` are in cpu.py
(without a GPU), in repairs.py (always) and in the training room (what follows a step).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron_btx.common.version_guard import describe_attribute, expect, expect_parameters

__all__ = ["Call", "around", "expect", "expect_parameters", "list_replaced", "replace", "wrap"]

Call = Callable[..., Any]
"""One of Megatron's functions, as what stands around it calls it."""

_replaced: list[str] = []


def replace(owner: object, name: str, replacement: object) -> None:
    """Put ``replacement`` in the place of an attribute that must be there.

    Raises:
        MegatronVersionError: it is missing.
    """
    wrap(owner, name, lambda _: replacement)


def wrap(owner: object, name: str, make: Callable[[Any], Any], parameters: Sequence[str] = ()) -> None:
    """Replace an attribute by what ``make`` makes of it.

    Args:
        parameters: names of the first ones that the attribute, a function, must take.

    Raises:
        MegatronVersionError: it is missing, or takes others.
    """
    expect(owner, name)
    if parameters:
        expect_parameters(owner, name, parameters, only_first=len(parameters))
    setattr(owner, name, make(getattr(owner, name)))
    _replaced.append(describe_attribute(owner, name))


def around(owner: object, name: str, call: Callable[..., object], parameters: Sequence[str] = ()) -> None:
    """Replace a function by ``call``, which gets the function itself before the arguments of every call.

    Args:
        parameters: as :func:`wrap` takes them.

    Raises:
        MegatronVersionError: see :func:`wrap`.
    """

    def bind(original: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(original)
        def called(*given: object, **named: object) -> object:
            return call(original, *given, **named)

        return called

    wrap(owner, name, bind, parameters)


def list_replaced() -> list[str]:
    """What was replaced in this process, in order, each with its module or class."""
    return list(_replaced)
