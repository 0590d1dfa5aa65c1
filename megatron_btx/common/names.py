"""Names that become names of files and folders: one rule for recipes and for descriptions of datasets."""

from __future__ import annotations

import unicodedata

NAME_BYTES_AT_MOST = 80
"""A folder's name may have 255, and ours have words before and a date behind."""
_MARKS = "._-"


def check_name(name: str) -> str:
    """Refuse a name that is not one folder's name on every system, or that a command line would read otherwise.

    Letters and digits of every script are taken, with their combining marks. Blanks, slashes, colons, quotes and
    control characters are not: they end a word, a path or a ``NAME=PATH`` somewhere.

    Raises:
        ValueError: with the rule.
    """
    if not name or name[0] in ".-" or len(name.encode("utf-8", "replace")) > NAME_BYTES_AT_MOST or not _is_plain(name):
        raise ValueError(
            "not a name; expected letters, digits, dots, dashes and underscores, at most "
            f"{NAME_BYTES_AT_MOST} bytes, beginning with none of . and -"
        )
    return name


def _is_plain(name: str) -> bool:
    """Whether it is made of letters, digits, combining marks and three signs; a mark needs a letter before it."""
    if unicodedata.category(name[0]).startswith("M"):
        return False
    for letter in name:
        if not letter.isalnum() and letter not in _MARKS and not unicodedata.category(letter).startswith("M"):
            return False
    return True
