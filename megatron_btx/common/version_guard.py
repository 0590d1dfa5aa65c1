"""What this code expects of Megatron's and PyTorch's inside, and one wording for what is not there.

A silent mismatch would be worse than a refusal: what is built on must be there in the form that it was written for.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import version

from megatron_btx.common.errors import MegatronVersionError

WRITTEN_FOR = "megatron-core 0.19"


def expect(owner: object, *names: str) -> None:
    """Look whether a module, class or object has all these attributes.

    Raises:
        MegatronVersionError: one is missing.
    """
    for name in names:
        if not hasattr(owner, name):
            raise mismatch(f"{describe_attribute(owner, name)} does not exist")


def expect_parameters(owner: object, name: str, parameters: Sequence[str], only_first: int | None = None) -> None:
    """Look whether a function takes the parameters of these names, in this order.

    Args:
        only_first: how many of them are looked at; all by default.

    Raises:
        MegatronVersionError: it is missing, or takes others.
    """
    expect(owner, name)
    found = list(inspect.signature(getattr(owner, name)).parameters)
    if found[:only_first] != list(parameters):
        raise mismatch(f"{describe_attribute(owner, name)} takes {found}, expected {list(parameters)}")


def mismatch(found: str) -> MegatronVersionError:
    """The refusal of something in another form than expected: what was found, the versions, the remedy."""
    versions = f"megatron-core {version('megatron-core')} with torch {version('torch')}"
    return MegatronVersionError(
        f"{found}: this is written for {WRITTEN_FOR}, found {versions}; install the pinned versions"
    )


def describe_attribute(owner: object, name: str) -> str:
    """An attribute with its module or class; of an object, with the class that it is of."""
    if inspect.isclass(owner):
        return f"{owner.__module__}.{owner.__name__}.{name}"
    where = getattr(owner, "__name__", None)
    if where is None:
        where = f"{type(owner).__module__}.{type(owner).__name__}()"
    return f"{where}.{name}"
