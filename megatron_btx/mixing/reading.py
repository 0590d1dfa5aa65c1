"""From what is given, on a command line, in Python or in a recipe, to a request, before any source is opened."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.mixing.methods import METHODS
from megatron_btx.mixing.options import Option, options_of
from megatron_btx.mixing.request import Options, Request

_NO_NAME = "/\\ \t,:"
"""Characters that no expert's name has: names stand in lists, in paths, and in NAME=PATH."""


def list_options(*groups: str) -> dict[str, Option]:
    """The options of these groups by their keys, those of all methods among them."""
    options = [*_own_options(), *options_of(Request).values(), *options_of(Options).values()]
    found = {}
    for group in groups:
        for row in options:
            if row.group == group:
                found[row.key] = row
    return found


def _own_options() -> list[Option]:
    """What methods have of their own, each name once; the help says whose it is, and each one's default."""
    rows: dict[str, Option] = {}
    for method, row in METHODS.items():
        for own in row.options:
            default = "no default"
            if own.default is not None:
                default = f"default: {own.default}"
            said = f"{method}: {own.help} ({default})"
            if own.name in rows:
                said = f"{rows[own.name].help}; {said}"
            rows[own.name] = dataclasses.replace(own, help=said, default=None)
    return list(rows.values())


def read_request(
    experts: Sequence[tuple[str, str]], method: str = Request.method, settings: Mapping[str, object] | None = None
) -> Request:
    """The request for a mix of (name, path), of keywords; None stands for an option that is not given.

    Raises:
        InputError: what no source can fulfil: names the flag or setting, what was given and what is expected.
        TypeError: there is no such option.
    """
    if method not in METHODS:
        raise InputError(f"--method {method}: expected one of {', '.join(METHODS)}")
    names = [name for name, _ in experts]
    _check_names(names, method)
    common = options_of(Request)
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    values: dict[str, Any] = {name: value for name, value in given.items() if name in common}
    own = {name: value for name, value in given.items() if name not in common}
    request = Request(tuple(experts), method, _read_own(method, own), **values)
    for flag, named in (("--weight", request.weights), ("--take", request.take.values())):
        for name in named:
            if name not in names:
                raise InputError(f"{flag} names the expert {name!r}; there are {', '.join(names)}")
    if request.weights and not METHODS[method].averages:
        raise InputError(f"--weight does not apply to --method {method}, which averages nothing")
    if not 0 < sum(request.weights.get(name, 1.0) for name in names) < math.inf:
        raise InputError("--weight: all weights are 0, or their sum is infinite; at least one must be more than 0")
    return request


def _read_own(method: str, given: Mapping[str, object]) -> dict[str, Any]:
    rows = {row.name: row for row in METHODS[method].options}
    for name in given:
        owners = [other for other, row in METHODS.items() if name in [own.name for own in row.options]]
        if not owners:
            raise TypeError(f"there is no option {name}; btx convert --help has them all")
        if method not in owners:
            flag = name.replace("_", "-")
            raise InputError(f"--method {method}: --{flag} does not apply, it belongs to {', '.join(owners)}")
    values = {}
    for name, row in rows.items():
        value = given.get(name, row.default)
        if value is None:
            raise InputError(f"--method {method}: --{row.key} is missing")
        values[name] = row.value_of(value)
    return values


def _check_names(names: Sequence[str], method: str) -> None:
    for name in names:
        if not name or not name.isprintable() or set(_NO_NAME) & set(name):
            raise InputError(
                f"--expert {name!r}: expected a name without slashes, commas, colons, blanks or control characters"
            )
        if names.count(name) > 1:
            raise InputError(f"--expert {name}= is given twice; every expert needs a name of its own")
    row = METHODS[method]
    if len(names) < row.at_least:
        raise InputError(
            f"{len(names)} expert given, at least {row.at_least} needed for {method}; repeat --expert NAME=PATH"
        )
    if row.at_most is not None and len(names) > row.at_most:
        raise InputError(f"--expert: {len(names)} given, {method} takes {row.at_most}; leave the others out")
