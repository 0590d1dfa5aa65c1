"""What a recipe or a description is refused with: place, found, expected, and the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin

from megatron_btx.common.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

_EXPECTED = {
    "int_type": "a whole number, as 300_000",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text: put it in quotes",
    "list_type": "a list",
    "dict_type": "a mapping",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length} values",
}
"""pydantic's kind of error -> what it expects, with the values of its context."""
_FOUND_LETTERS_AT_MOST = 200


class RefusedKeyError(ValueError):
    """A validator of a mapping refuses one of its keys."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def refuse(place: str, message: str) -> NoReturn:
    """Raise InputError for a place in the recipe."""
    raise InputError(f"{place}: {message}")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that nobody knows, with the close match."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key; {hint}known here: {', '.join(known)}"


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for all that pydantic refused; a key that nobody knows is likely a slip and goes first."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    return "; ".join(dict.fromkeys(_describe_one(problem, model) for problem in problems))


def _describe_one(problem: ErrorDetails, model: type[BaseModel]) -> str:
    place, kind, context = problem["loc"], problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{_dotted(place)}: {unknown_key(str(place[-1]), _keys_at(model, place[:-1]))}"
    if kind == "value_error":
        cause = context["error"]
        if isinstance(cause, RefusedKeyError):
            place = (*place, cause.key)
        return f"{_dotted(place)}: {cause}"
    if kind == "missing":
        return f"{_dotted(place)}: missing; it has no default, so give it"
    if kind == "model_type":
        keys = _keys_at(model, place)
        expected = f"a mapping with {', '.join(keys)}" if keys else "true or false"
    else:
        expected = _EXPECTED[kind].format(**{name: _short(value) for name, value in context.items()})
    return f"{_dotted(place)}: found {_shown(problem['input'])}, expected {expected}"


def _short(value: object) -> object:
    """A number as one would write it: 1e+15, not 1000000000000000.0."""
    if isinstance(value, float):
        return f"{value:g}"
    return value


def _shown(value: object) -> str:
    text = repr(value)
    if len(text) > _FOUND_LETTERS_AT_MOST:
        text = f"{text[:_FOUND_LETTERS_AT_MOST]} ..."
    return text


def _dotted(place: Sequence[str | int]) -> str:
    """``("data", "domains", "math", "train", 0)`` -> ``data.domains.math.train[0]``."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":  # pydantic's word for a refused key, whose name stands before it
            text += f".{part}"
    return text.removeprefix(".")


def _keys_at(model: Any, place: Sequence[str | int]) -> list[str]:
    """The keys that the section at ``place`` has."""
    annotation = model
    for part in place:
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            continue
        fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
        annotation = _without_none(fields[str(part)].annotation)
    return [field.alias or name for name, field in annotation.model_fields.items()]


def _without_none(annotation: Any) -> Any:
    """``Section | None`` -> ``Section``."""
    present = [option for option in get_args(annotation) if option is not type(None)]
    if len(present) == 1 and get_origin(annotation) is not dict:
        return present[0]
    return annotation
