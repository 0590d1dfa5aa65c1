"""The values that may stand in a recipe, and how each is checked: names, flags, numbers, paths.

A check raises ValueError with the message; refusals.py puts the place before it.
"""

from __future__ import annotations

import glob
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from megatron_btx.common.names import check_name
from megatron_btx.common.refusals import RefusedKeyError
from megatron_btx.recipe.flags import DERIVED_FLAGS, LAYOUT_FLAGS, FlagValue
from megatron_btx.recipe.from_checkpoint import find_model
from megatron_btx.recipe.names import GENERALIST, is_set_aside
from megatron_btx.recipe.section import form

LARGEST_SEED = 2**32 - 1
"""What NumPy takes."""
RESERVED_NAMES = {GENERALIST: "the seed, which can be an expert of the mix", "mean": "a column of the reports"}
"""Names that no domain may have."""
_TOKENIZER_FLAGS = ("tokenizer-type", "tokenizer-model")


def _check_name(name: str) -> str:
    """Refuse a name that a later stage could not use: of a folder, an expert, a column."""
    check_name(name)
    if is_set_aside(name):
        raise ValueError("ends as the folders of earlier runs do that are kept; give it another name")
    return name


def _check_domain_name(name: str) -> str:
    reserved = RESERVED_NAMES.get(_folded(name))
    if reserved:
        raise ValueError(f"the name of {reserved}; give it another")
    return name


def check_names_differ(named: dict[str, Any]) -> dict[str, Any]:
    """Refuse names that some disks take for one folder."""
    seen: dict[str, str] = {}
    for name in named:
        other = seen.setdefault(_folded(name), name)
        if other != name:
            raise RefusedKeyError(
                name, f"differs from {other} in case alone, and some disks take both for one folder; give it another"
            )
    return named


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _check_flag(name: str) -> str:
    """Refuse what is no flag, and flags that are said elsewhere in a recipe."""
    if name.startswith("-") or "_" in name:
        raise ValueError("expected a Megatron flag without its leading dashes, as num-layers")
    if name in LAYOUT_FLAGS:
        raise ValueError(f"a layout flag; put it under layout, as layout: {{{name}: ...}}")
    if name in DERIVED_FLAGS:
        raise ValueError(f"set by the pipeline from {DERIVED_FLAGS[name]}; leave it out here")
    return name


def _check_tokenizer_flag(name: str) -> str:
    if name in _TOKENIZER_FLAGS:
        return name
    return _check_flag(name)


def _read_flag_value(value: object) -> FlagValue:
    """A flag's value. Raises ValueError for one that the command line would have as a flag of its own."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if str(item).startswith("--"):
            raise ValueError(f"found {item!r}, which is a flag; give every flag a line of its own")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, int | float | str) for item in value):
        return tuple(value)
    raise ValueError(f"found {value!r}, expected true, false, a number, a text, or a list of values")


def absolute_path(text: object) -> Path:
    """An absolute path; ``~`` is a home. Raises ValueError where there is none."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"found {text!r}, expected a text")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"found {text!r}, and there is no such home; give the path without ~") from None


def _as_whole_number(value: object) -> object:
    """3.0e+4 and 1e8 are whole numbers; YAML has them as a float and a text."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d{1,2}", value):
        return _as_whole_number(float(value))
    return value


def _read_model(text: object) -> Path:
    """The folder of a given model."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"found {text!r}, expected a text")
    if text.startswith("~"):
        absolute_path(text)  # refuses a home that is not there
    return find_model(text)


def _read_text_path(text: object) -> str:
    """The absolute path of a text file, a folder, or a pattern of files."""
    path = absolute_path(text)
    if not path.exists() and next(glob.iglob(str(path), recursive=True), None) is None:
        raise ValueError(f"{path} does not exist; expected a text file, or a folder of them; make it, or mend the path")
    return str(path)


def _read_dataset(text: object) -> tuple[float, str]:
    """(weight, absolute prefix) of a dataset."""
    words = re.fullmatch(r"(?:(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s+)?(\S.*)", str(text).strip())
    weight = 0.0
    if words is not None:
        weight = float(words[1] or 1.0)
    if words is None or weight <= 0:
        raise ValueError(f'found {text!r}, expected "PREFIX" or "WEIGHT PREFIX" with a weight above zero')
    prefix = absolute_path(words[2])
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise ValueError(f"{prefix}{suffix} does not exist; make it with btx preprocess")
    return weight, str(prefix)


RandomSeed = Annotated[int, Field(ge=1, le=LARGEST_SEED)]
Tokens = Annotated[int, BeforeValidator(_as_whole_number), Field(ge=1)]
Processes = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0)]
Blend = dict[str, Share]
"""Domain -> share: shares of one, percent, or any numbers, which are normalised."""
RunName = Annotated[
    str,
    form(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}",
        "at most 80 letters, digits, dots, dashes and underscores, the first a letter or digit",
    ),
]
Name = Annotated[str, AfterValidator(_check_name)]
DomainName = Annotated[Name, AfterValidator(_check_domain_name)]
VariantName = Annotated[Name, form(r"[^\W_]([^\W_]|-)*", "a name of letters, digits and dashes")]
Model = Annotated[Path, PlainValidator(_read_model)]
"""A Megatron checkpoint, a Hugging Face model folder, or a model in the hub's cache; see given.py."""
Datasets = Annotated[list[Annotated[tuple[float, str], PlainValidator(_read_dataset)]], Field(min_length=1)]
"""Texts "PREFIX" or "WEIGHT PREFIX" of .bin/.idx files."""
Texts = Annotated[list[Annotated[str, PlainValidator(_read_text_path)]], Field(min_length=1)]
"""JSONL, Parquet or plain text, plain or compressed: files, folders of them, or patterns."""
WrittenValue = Annotated[FlagValue, PlainValidator(_read_flag_value)]
WrittenFlags = dict[Annotated[str, AfterValidator(_check_flag)], WrittenValue]
"""Megatron's flags without the leading dashes; see flags.py. Null takes one back that an outer section gave."""
TokenizerFlags = dict[Annotated[str, AfterValidator(_check_tokenizer_flag)], WrittenValue]
