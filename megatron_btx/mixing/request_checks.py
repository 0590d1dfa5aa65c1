"""What can be said of a request before any source is opened."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from megatron_btx.common.errors import InputError
from megatron_btx.mixing.methods import METHODS, Method
from megatron_btx.mixing.overrides import field_of
from megatron_btx.mixing.request import Request, RouterInit

_EXPERTS_AT_MOST = 4096
"""A slip of the keyboard would take all memory before anything else could refuse it."""
MULTIPLE_AT_MOST = 1 << 16
_NO_NAME = "/\\ \t,:"
"""Characters that no expert's name has: names stand in lists, in paths, and in NAME=PATH."""


def check_request(request: Request) -> Request:
    """Refuse a request that no source can fulfil; returns it with the fields of ``take`` under their own names.

    Raises:
        InputError: names the flag or setting, what was given and what is expected.
    """
    if request.method not in METHODS:
        raise InputError(f"--method {request.method}: expected one of {', '.join(METHODS)}")
    if request.vocabulary not in ("same", "union"):
        raise InputError(f"--vocab {request.vocabulary}: expected same or union")
    method = METHODS[request.method]
    names = [name for name, _ in request.experts]
    _check_names(names, request.method, method)
    _check_number(request, method)
    _check_router(request.router)
    if not 1 <= request.pad_vocabulary <= MULTIPLE_AT_MOST:
        raise InputError(
            f"--pad-vocab-to-multiple-of {request.pad_vocabulary}: expected 1 to {MULTIPLE_AT_MOST}; 128 suits every "
            "tensor parallel size up to 128"
        )
    _check_weights(request, method, names)
    take = _by_field(request.take)
    for name in take.values():
        _check_named("--take", name, names)
    return dataclasses.replace(request, take=take)


def number_of(request: Request) -> int:
    """The number that the request's method needs; 1 where it needs none."""
    return request.chunks or request.copies or 1


def _check_names(names: Sequence[str], method_name: str, method: Method) -> None:
    for name in names:
        if not name or not name.isprintable() or set(_NO_NAME) & set(name):
            raise InputError(
                f"--expert {name!r}: expected a name without slashes, commas, colons, blanks or control characters"
            )
        if names.count(name) > 1:
            raise InputError(f"--expert {name}= is given twice; every expert needs a name of its own")
    if len(names) < method.at_least:
        raise InputError(
            f"{len(names)} expert given, at least {method.at_least} needed for {method_name}; repeat --expert NAME=PATH"
        )
    if method.at_most is not None and len(names) > method.at_most:
        raise InputError(f"--expert: {len(names)} given, {method_name} takes {method.at_most}; leave the others out")


def _check_number(request: Request, method: Method) -> None:
    """Refuse a number of experts that the method does not take, or one that is missing or too small."""
    if request.chunks is not None and request.copies is not None:
        raise InputError("--chunks belongs to --method split, --copies to --method upcycle; give one of them")
    for field, number in (("chunks", request.chunks), ("copies", request.copies)):
        if field != method.number:
            if number is not None:
                raise InputError(f"--method {request.method}: --{field} does not apply")
        elif number is None:
            raise InputError(f"--method {request.method}: --{field} is missing")
        elif not 2 <= number <= _EXPERTS_AT_MOST:
            raise InputError(f"--{field} {number}: expected 2 to {_EXPERTS_AT_MOST}")


def _check_router(router: RouterInit) -> None:
    if not (router.std > 0 and math.isfinite(router.std)):
        raise InputError(f"--router-std {router.std}: expected a number above 0; --router-init zeros gives zeros")
    if not 0 <= router.seed < 2**63:
        raise InputError(f"--router-seed {router.seed}: expected 0 to {2**63 - 1}")


def _check_weights(request: Request, method: Method, names: Sequence[str]) -> None:
    for name in request.weights:
        _check_named("--weight", name, names)
    if request.weights and not method.averages:
        raise InputError(f"--weight does not apply to --method {request.method}, which averages nothing")
    for name, weight in request.weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"--weight {name}={weight}: expected a number of at least 0")
    weights = [request.weights.get(name, 1.0) for name in names]
    if not 0 < sum(weights) < math.inf:
        raise InputError("--weight: all weights are 0, or their sum is infinite; at least one must be more than 0")


def _check_named(flag: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise InputError(f"{flag} names the expert {name!r}; there are {', '.join(names)}")


def _by_field(take: Mapping[str, str]) -> dict[str, str]:
    """The sources to take fields from, by the fields' own names."""
    found: dict[str, str] = {}
    for given, name in take.items():
        field = field_of(given)
        if field in found:
            raise InputError(f"--take {field}= is given twice; give it once")
        found[field] = name
    return found
