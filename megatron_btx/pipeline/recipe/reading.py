"""Checked reading of a recipe's YAML: duplicate and unknown keys are refused, with place and remedy."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.folder import is_set_aside
from megatron_btx.pipeline.recipe.flags import DERIVED_FLAGS, LAYOUT_FLAGS, Flags, FlagValue

LARGEST_SEED = 2**32 - 1
"""What NumPy takes."""
_NAME_BYTES_AT_MOST = 80
"""A folder's name may have 255, and ours have words before and a date behind."""


_INTEGER_BITS_AT_MOST = 63
_PROCESSES_AT_MOST = 1024
_PLACES_OF_NAMES = (".experts", ".data.domains", ".ablation.variants")
"""Sections whose keys are names, which may be those of settings."""
_DEPTH_AT_MOST = 30
_VALUES_AT_MOST = 100_000
"""What aliases repeat counted as often: a few lines of them can stand for more than any memory holds."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, refusing what YAML 1.1 takes in silence: a key that stands twice, of which the last one would
    win, and numbers in base 8 or 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                where = f"{node.start_mark.name}: line {written[number].start_mark.line + 1}"
                raise InputError(f"{where}: the key {key!r} stands twice; keep one")
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float:
        """A number. Raises InputError for 010 and 1:30, which are 8 and 90."""
        as_number = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        value: int | float = as_number(node)
        octal = node.tag.endswith(":int") and re.fullmatch(r"[-+]?0[0-9_]+", node.value)
        if octal or ":" in node.value:
            where = f"{node.start_mark.name}: line {node.start_mark.line + 1}"
            remedy = "write a number without leading zeros and colons, a text in quotes"
            raise InputError(f"{where}: found {node.value}, which YAML reads as {value}; {remedy}")
        return value


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_decimal)


class Section:
    """A mapping of the recipe and its place, for checked reading."""

    def __init__(self, node: Any, place: str, known: tuple[str, ...] | None, reader: Reader) -> None:
        self.place, self.reader = place, reader
        if not isinstance(node, dict):
            reader.refuse(place, f"found {node!r}, expected a mapping" + (f" with {', '.join(known)}" if known else ""))
        for key in node:
            if not isinstance(key, str):  # 1, yes and 2026-01-01 are no texts for YAML; what follows would miss them
                reader.refuse(self.at(key), f"YAML reads this name as {type(key).__name__} {key!r}; put it in quotes")
        self.node = {key: value for key, value in node.items() if value is not None}
        for key in node:
            if known is not None and key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                reader.refuse(self.at(key), f"unknown key; {hint}known here: {', '.join(known)}")

    def at(self, key: Any) -> str:
        return f"{self.place}.{key}" if self.place else str(key)

    def refuse(self, key: str, message: str) -> NoReturn:
        self.reader.refuse(self.at(key), message)

    def check_names(self, reserved: Mapping[str, str] | None = None) -> None:
        """Refuse keys that a later stage could not use as a name: of a folder, an expert, a column.

        Args:
            reserved: names (in lower case) that mean something else, and what.
        """
        seen: dict[str, str] = {}
        for name in self.node:
            if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > _NAME_BYTES_AT_MOST:
                expected = f"letters, digits, dots, dashes and underscores, at most {_NAME_BYTES_AT_MOST} bytes"
                self.refuse(name, f"not a name; expected {expected}, beginning with none of . and -")
            if is_set_aside(name):
                self.refuse(name, "ends as the folders of earlier runs do that are kept; give it another name")
            folded = unicodedata.normalize("NFKC", name).casefold()
            if folded in (reserved or {}):
                self.refuse(name, f"the name of {(reserved or {})[folded]}; give it another")
            if folded in seen:
                self.refuse(name, f"differs from {seen[folded]} in case alone, and some disks take both for one folder")
            seen[folded] = name

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int | None = None) -> int:
        value = self.node.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            found = f"found {value!r}" if key in self.node else "missing"
            self.refuse(key, f"{found}, expected a whole number of at least {minimum} (as 300_000)")
        if maximum is not None and value > maximum:
            self.refuse(key, f"found {value}, expected at most {maximum}")
        return value

    def processes(self, key: str, default: int) -> int:
        """A number of processes or threads of one machine."""
        return self.integer(key, default, maximum=_PROCESSES_AT_MOST)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.node.get(key, default)
        if not isinstance(value, str) or not value:
            self.refuse(key, f"{f'found {value!r}' if key in self.node else 'missing'}, expected a text")
        return value

    def path(self, key: str, text: str) -> Path:
        """An absolute path; ``~`` is a home."""
        try:
            return Path(text).expanduser().absolute()
        except RuntimeError:
            self.refuse(key, f"found {text!r}, and there is no such home; give the path without ~")

    def section(self, key: str, known: tuple[str, ...] | None = None) -> Section:
        return Section(self.node.get(key, {}), self.at(key), known, self.reader)

    def named(self, key: str) -> Section:
        """The section ``key``, whose keys are names. One that says nothing (``top2:``) is there all the same."""
        node = self.node.get(key, {})
        if isinstance(node, dict):
            node = {name: {} if settings is None else settings for name, settings in node.items()}
        return Section(node, self.at(key), None, self.reader)

    def flags(self, key: str, allowed: tuple[str, ...] = ()) -> Flags:
        """Megatron's flags under ``key``, less those that are said elsewhere in the recipe."""
        section = self.section(key)
        flags: dict[str, FlagValue] = {}
        for name in self.node.get(key, {}):
            value = section.node.get(name)
            if not isinstance(name, str) or name.startswith("-") or "_" in name:
                section.refuse(str(name), "expected a Megatron flag without its leading dashes, as num-layers")
            if name in LAYOUT_FLAGS:
                section.refuse(name, f"a layout flag; put it under layout, as layout: {{{name}: {value}}}")
            if name in DERIVED_FLAGS and name not in allowed:
                section.refuse(name, f"set by the pipeline from {DERIVED_FLAGS[name]}; leave it out here")
            flags[name] = section.flag_value(name, value)
        if flags:
            self.reader.flag_sections[self.at(key)] = flags
        return flags

    def flag_value(self, name: str, value: Any) -> FlagValue:
        """A flag's value as the recipe gives it. Raises InputError for one that would be a flag of its own."""
        for item in value if isinstance(value, list) else [value]:
            # The command line would have it as a flag of its own, which may be one that is refused here.
            if str(item).startswith("--"):
                self.refuse(name, f"found {item!r}, which is a flag; give every flag a line of its own")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list) and value and all(isinstance(item, int | float | str) for item in value):
            return tuple(value)
        self.refuse(name, f"found {value!r}, expected true, false, a number, a text, or a list of values")


class Reader:
    """What is collected while a recipe is read."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.flag_sections: dict[str, Flags] = {}
        self.notes: list[str] = []

    def refuse(self, place: str, message: str) -> NoReturn:
        raise InputError(f"{self.file}: {place}: {message}" if place else f"{self.file}: {message}")


def load_tree(file: Path, changes: list[str]) -> dict[str, Any]:
    """The YAML mapping in ``file`` with ``changes`` (dotted KEY=VALUE, the value read as YAML) applied."""
    tree = _unshared(_with_included(file, ()), str(file))
    for change in changes:
        name = f"--set {change}"
        _apply(tree, change, _unshared(_parsed(change.partition("=")[2], name), name))
    if not isinstance(tree, dict):
        raise InputError(f"{file}: found {type(tree).__name__}, expected a mapping")
    return tree


def _parsed(text: str | IO[str], name: str) -> Any:
    """The content of a YAML text. Raises InputError with ``name`` and, as far as it is known, the line."""
    try:
        loader = _Loader(text)
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates that are none, bytes no UTF-8
        raise InputError(f"{name}: not readable as YAML: {error}") from error


def _unshared(tree: Any, name: str) -> Any:
    """A copy in which what aliases repeat lies in several places, so that a change of one is none of the others.

    Raises:
        InputError: it would be too large, or hold itself.
    """
    left = iter(range(_VALUES_AT_MOST))

    def copied(node: Any, depth: int) -> Any:
        if next(left, None) is None:
            raise InputError(f"{name}: more than {_VALUES_AT_MOST:,} values, counting what its aliases repeat")
        if depth > _DEPTH_AT_MOST:
            raise InputError(f"{name}: nested too deeply; an anchor may hold an alias of itself")
        if isinstance(node, dict):
            return {key: copied(value, depth + 1) for key, value in node.items()}
        return [copied(value, depth + 1) for value in node] if isinstance(node, list) else node

    return copied(tree, 0)


def check_values(node: Any, place: str, reader: Reader) -> None:
    """Refuse values that no command line or computation could take: NUL, half characters, nan, endless numbers."""
    if isinstance(node, dict):
        for key, value in node.items():
            check_values(value, f"{place}.{key}" if place else str(key), reader)
    elif isinstance(node, list):
        for value in node:
            check_values(value, place, reader)
    elif isinstance(node, float) and not math.isfinite(node):
        reader.refuse(place, f"found {node}, expected a finite number")
    elif isinstance(node, int) and node.bit_length() > _INTEGER_BITS_AT_MOST:
        reader.refuse(place, f"found a number of {node.bit_length()} bits, expected at most {_INTEGER_BITS_AT_MOST}")
    elif isinstance(node, str) and re.search(r"[\x00\ud800-\udfff]", node):
        reader.refuse(place, f"found {node!r}, which no command line can hold; write another text")


def _with_included(file: Path, including: tuple[Path, ...]) -> Any:
    """The mapping in ``file``, laid over that of the file it names under ``include`` (relative to itself).

    Mappings are merged key by key, anything else is replaced, and so is a blend, whose shares belong together. Null
    takes a key back.
    """
    if file.resolve() in including:
        circle = " includes ".join(map(str, (*including[including.index(file.resolve()) :], file.resolve())))
        raise InputError(f"include: a circle: {circle}; leave one of these includes out")
    if not file.exists():
        raise InputError(f"{file}: there is no such recipe; give a recipe's path, as examples/recipes/quickstart.yaml")
    with file.open(encoding="utf-8") as stream:
        tree = _parsed(stream, str(file))
    if including and not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise InputError(f"{file}: found {found}, expected a mapping, because {including[-1]} includes it")
    if not isinstance(tree, dict) or "include" not in tree:
        return tree
    name = tree.pop("include")
    base = file.parent / str(name)
    if isinstance(name, str) and not base.exists():
        raise InputError(f"{file}: include: {base} does not exist; give the path of a recipe, relative to this one")
    if not isinstance(name, str) or not base.is_file():
        raise InputError(f"{file}: include: found {name!r}, expected a recipe file, relative to this one")
    included = _with_included(base, (*including, file.resolve()))
    # The name says where the run lies. Another recipe is another run, or it would go on in the folder of the first.
    included.pop("name", None)
    return _laid_over(included, tree)


def _laid_over(base: Any, over: Any, place: str = "") -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    laid = dict(base)
    for key, value in over.items():
        is_blend = key == "blend" and place not in _PLACES_OF_NAMES
        _put(laid, key, value if is_blend else _laid_over(base.get(key), value, f"{place}.{key}"))
    return laid


def _put(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; null takes a whole section or variant out, as if it had never been written."""
    if value is None and isinstance(mapping.get(key), dict):
        del mapping[key]
    else:
        mapping[key] = value


def _apply(tree: Any, change: str, value: Any) -> None:
    key, equals, _ = change.partition("=")
    *outer, last = key.split(".")
    for part in outer:
        tree = tree.setdefault(part, {}) if isinstance(tree, dict) else None
    if not equals or not all((*outer, last)) or len(outer) > _DEPTH_AT_MOST or not isinstance(tree, dict):
        raise InputError(f"--set {change}: expected KEY=VALUE, KEY being the dotted place of a setting in the recipe")
    _put(tree, last, value)
