"""The YAML of a recipe as one mapping: included files, and changes from the command line.

It is YAML 1.2: 010 is 10, 1:30 and yes are texts, a key that stands twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from megatron_btx.common.errors import InputError

_PLACES_OF_NAMES = (".experts", ".data.domains", ".ablation.variants")
"""Sections whose keys are names, which may be those of settings."""

Tree = dict[str, Any]
"""A YAML mapping; its values are what YAML has, so that no narrower type is true of them."""


def load_tree(file: Path, changes: Sequence[str] = ()) -> Tree:
    """The YAML mapping in ``file`` with ``changes`` (dotted KEY=VALUE, the value read as YAML) applied.

    Raises:
        InputError: the file or the change, the line as far as it is known, and what was found.
    """
    tree = _read_with_included(file, ())
    for change in changes:
        _apply_change(tree, change, _parse(change.partition("=")[2], f"--set {change}"))
    return tree


def check_keys(node: object, place: str = "") -> None:
    """Refuse keys that are no texts for YAML (1, 2026-01-01), and {math:1}, which it reads as a name.

    Raises:
        InputError: the place in the recipe and what stands there.
    """
    if isinstance(node, list):
        for value in node:
            check_keys(value, place)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        below = f"{place}.{key}" if place else str(key)
        if not isinstance(key, str):
            raise InputError(f"{below}: YAML reads this name as {type(key).__name__} {key!r}; put it in quotes")
        colon = re.fullmatch(r"([^\s:]+):(\S+)", key)
        if value is None and colon:
            remedy = f"write a blank behind the colon, as {colon[1]}: {colon[2]}"
            raise InputError(f"{below}: YAML reads {key!r} as a name without a value; {remedy}")
        check_keys(value, below)


def _parse(text: str, name: str) -> object:
    """The content of a YAML text; what aliases repeat lies in several places, so that one can change alone.

    Raises:
        InputError: ``name``, and as far as it is known the line.
    """
    try:
        return _copy_without_aliases(YAML(typ="safe", pure=True).load(text))
    except RecursionError:
        raise InputError(f"{name}: nested too deeply; an anchor may hold an alias of itself") from None
    except (YAMLError, ValueError) as error:  # ValueError: dates that are none, numbers of too many digits
        said = re.sub(r"\s*To suppress this check see:.*", "", str(error), flags=re.DOTALL)
        raise InputError(f"{name}: not readable as YAML: {said}") from None


def _copy_without_aliases(node: object) -> object:
    if isinstance(node, dict):
        return {key: _copy_without_aliases(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copy_without_aliases(value) for value in node]
    return node


def _read_with_included(file: Path, including: tuple[Path, ...]) -> Tree:
    """The mapping in ``file``, laid over that of the file it names under ``include`` (relative to itself).

    Mappings are merged key by key, anything else is replaced, and so is a blend, whose shares belong together. Null
    takes a key back.
    """
    if file.resolve() in including:
        circle = " includes ".join(map(str, (*including[including.index(file.resolve()) :], file.resolve())))
        raise InputError(f"include: a circle: {circle}; leave one of these includes out")
    if not file.exists():
        raise InputError(f"{file}: there is no such recipe; give a recipe's path, as examples/recipes/quickstart.yaml")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not readable as YAML: {error}") from None
    tree = _parse(text, str(file))
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise InputError(f"{file}: found {found}, expected a mapping")
    if "include" not in tree:
        return tree
    name = tree.pop("include")
    base = file.parent / str(name)
    if not isinstance(name, str) or not base.is_file():
        raise InputError(f"{file}: include: found {name!r}, expected a recipe file, relative to this one")
    included = _read_with_included(base, (*including, file.resolve()))
    # The name says where the run lies. Another recipe is another run, or it would go on in the folder of the first.
    included.pop("name", None)
    return _laid_over(included, tree, "")


def _laid_over(base: Tree, over: Tree, place: str) -> Tree:
    """``over``, with the keys of ``base`` that it leaves out."""
    laid = dict(base)
    for key, value in over.items():
        below, is_blend = base.get(key), key == "blend" and place not in _PLACES_OF_NAMES
        if isinstance(below, dict) and isinstance(value, dict) and not is_blend:
            value = _laid_over(below, value, f"{place}.{key}")
        _put(laid, key, value)
    return laid


def _put(mapping: Tree, key: str, value: object) -> None:
    """Set a key; null takes a whole section or variant out, as if it had never been written."""
    if value is None and isinstance(mapping.get(key), dict):
        del mapping[key]
    else:
        mapping[key] = value


def _apply_change(tree: Tree, change: str, value: object) -> None:
    """Set the place that a dotted KEY=VALUE names. Raises InputError where a recipe cannot have such a place."""
    key, equals, _ = change.partition("=")
    *outer, last = key.split(".")
    section: object = tree
    for part in outer:
        section = section.setdefault(part, {}) if isinstance(section, dict) else None
    if not equals or not all((*outer, last)) or not isinstance(section, dict):
        raise InputError(f"--set {change}: expected KEY=VALUE, KEY being the dotted place of a setting in the recipe")
    _put(section, last, value)
