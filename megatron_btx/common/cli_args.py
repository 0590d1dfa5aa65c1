"""Words of the form NAME=VALUE, as our command lines take them."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_btx.common.errors import InputError


def split_pair(word: str, flag: str, expected: str = "NAME=PATH") -> tuple[str, str]:
    """The name and the value of a word; the value may hold further equals signs.

    Raises:
        InputError: one of them is missing; says what was ``expected``.
    """
    name, separator, value = word.partition("=")
    if not separator or not name or not value:
        raise InputError(f"{flag} {word}: expected {expected}")
    return name, value


def read_pairs(words: Iterable[str], flag: str, expected: str = "NAME=PATH") -> dict[str, str]:
    """Name -> value of every word.

    Raises:
        InputError: a word of another form, or a name that is given twice.
    """
    pairs: dict[str, str] = {}
    for word in words:
        name, value = split_pair(word, flag, expected)
        if name in pairs:
            raise InputError(f"{flag} {name}= is given twice; give it once")
        pairs[name] = value
    return pairs
