"""The converter's options as keys of a recipe: every flag that decides a result, under its own name, declared once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator, create_model

from megatron_btx.mixing import cli
from megatron_btx.mixing.methods import METHODS
from megatron_btx.mixing.options import DIFFERENCES, MIXTURE, RESULT, Option
from megatron_btx.mixing.reading import list_options
from megatron_btx.mixing.request import Request
from megatron_btx.recipe.flags import DERIVED_FLAGS
from megatron_btx.recipe.names import MIX_STAGE
from megatron_btx.recipe.section import Section
from megatron_btx.recipe.values import absolute_path

ROWS = "padded-vocab-size"
_FILE = ".npy"
"""Ends the values that are files."""


class Words(tuple[str, ...]):
    """What one key says, as words of the converter's command line."""

    __slots__ = ()


_BASE = "base"
"""The base of a method that has one: the run's seed."""


def _options(*titles: str) -> Mapping[str, Option]:
    """The options of these groups by their keys, and the method among them."""
    found: dict[str, Option] = {}
    for title in titles:
        if title == MIXTURE:
            found["method"] = Option("method", "", default=Request.method, choices=tuple(METHODS))
        found |= list_options(title)
    found.pop(_BASE, None)
    return found


def with_options[S: Section](*titles: str) -> Callable[[type[S]], type[S]]:
    """Give a section the converter's options of these groups as keys, but those that it has itself."""

    def extend(section: type[S]) -> type[S]:
        fields: dict[str, Any] = {}
        for key, option in _options(*titles).items():
            name = key.replace("-", "_")
            if key not in DERIVED_FLAGS and name not in section.model_fields:
                fields[name] = (Annotated[Any, PlainValidator(partial(_read_option, option))], None)
        return create_model(section.__name__, __base__=section, __module__=section.__module__, **fields)

    return extend


def option_words(section: Section) -> tuple[str, ...]:
    """What the section's keys say to the converter; nothing where they say its defaults."""
    words: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Words):
            words += value
    return tuple(words)


def words_of(words: tuple[str, ...], *titles: str) -> tuple[str, ...]:
    """Those of the words that are options of these groups."""
    flags = {f"--{key}" for key in _options(*titles)}
    return tuple(word for word in words if word.partition("=")[0] in flags)


def pad_rows(rows: int, words: Sequence[str]) -> int:
    """Rows of an embedding, made a multiple of what the words say; the converter refuses one that is none."""
    multiple: int = cli.parser().parse_args(list(words)).pad_vocabulary or 1
    return -(-rows // multiple) * multiple


def say_keys(text: str, place: str) -> str:
    """A refusal of the converter's with the recipe's keys in place of the flags: mix.take: {dtype: math}."""
    for key, option in _options(RESULT, DIFFERENCES, MIXTURE).items():
        where = place if key in _options(RESULT) else MIX_STAGE
        said = f"{where}.{DERIVED_FLAGS.get(key, key).rpartition('mix.')[2]}"
        flag = rf"(?<![\w-])--{key}(?![\w-])"
        if option.kind is bool:
            text = re.sub(flag, f"{said}: true", text)
        text = re.sub(rf"{flag} (\w+)=(\w[\w.-]*)", rf"{said}: {{\1: \2}}", text)
        for choice in option.choices:
            text = re.sub(rf"{flag} {choice}\b", f"{said}: {choice}", text)
        text = re.sub(flag, said, text)
    text = text.replace("--description: ", f"{place}.").replace("--json-keys", "json-key")
    text = re.sub(r"(?<![\w-])--(btx-first-loss-bound)", rf"{place}.megatron.\1", text)
    return re.sub(r"(?<![\w-])--expert(?![\w-])( NAME=PATH)?", f"{place}.experts", text)


def takes_base(words: Sequence[str]) -> bool:
    """Whether the method that the words choose needs the model that the experts began from."""
    return METHODS[cli.parser().parse_args(list(words)).method].has_base


def _read_option(option: Option, value: object) -> Words:
    """The words that a key's value is on the command line. Raises ValueError with what is expected."""
    flag = f"--{option.key}"
    if option.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"found {value!r}, expected true or false")
        return Words([flag] if value else [])
    if option.kind is dict:
        if not isinstance(value, dict):
            raise ValueError(f"found {value!r}, expected a mapping, as {{{option.metavar.replace('=', ': ')}}}")
        return Words(f"{flag}={name}={value[name]}" for name in sorted(value))
    text = str(value)
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        text = text.replace(" ", "")
    elif isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"found {value!r}, expected a value for {flag}")
    if option.choices and text not in option.choices:
        raise ValueError(f"found {value!r}, expected one of {', '.join(option.choices)}")
    if option.kind in (int, float):
        try:
            option.kind(text)
        except ValueError:
            raise ValueError(f"found {value!r}, expected a number") from None
    if text.endswith(_FILE):
        text = str(absolute_path(text))
        if not Path(text).is_file():
            raise ValueError(f"{text} does not exist; make it, or mend the path")
    if text == str(option.default):
        return Words()
    return Words([f"{flag}={text}"])
