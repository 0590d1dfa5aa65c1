"""Records of a file into their texts, or what is wrong with them; and JSON values cut out of a stream.

A file of many gigabytes that is one array cannot be parsed whole, and a broken record in it should cost that record
only. So brackets, commas and quotes are followed here; whoever takes a value parses it.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_BOM = "\ufeff"
_KEYS_NAMED_AT_MOST = 10
_SHOWN_AT_MOST = 5


class BadRecord(ValueError):  # noqa: N818 - it is counted as often as it is raised
    """A record that gives no texts."""

    def __init__(self, cause: str, detail: str) -> None:
        """Say the kind of fault, for counting; and what was found and what was expected."""
        super().__init__(detail)
        self.cause, self.detail = cause, detail
        self.where = ""
        """File and line; for Parquet file, row group and row."""

    def line(self) -> str:
        """For people."""
        return f"{self.where}: {self.detail}"


@dataclass
class Tally:
    """Bad records by cause, and the first of them."""

    counts: Counter[str] = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)

    def add(self, record: BadRecord) -> None:
        """Count a record."""
        self.counts[record.cause] += 1
        if len(self.shown) < _SHOWN_AT_MOST:
            self.shown.append(record.line())

    def merge(self, later: Tally) -> None:
        """Count what another tally counted of later records."""
        self.counts.update(later.counts)
        self.shown += later.shown[: _SHOWN_AT_MOST - len(self.shown)]

    def text(self) -> str:
        """``3 bad records: 2 not JSON, 1 no key``."""
        total = sum(self.counts.values())
        causes = ", ".join(f"{count:,} {cause}" for cause, count in self.counts.most_common())
        return f"{total:,} bad record{'s' if total != 1 else ''}: {causes}"


def texts_of_json(raw: bytes, keys: Sequence[str]) -> dict[str, str] | None:
    """The texts of a JSON object by key, or None for a blank line.

    NaN and Infinity, which JSON does not know and many programs write, are taken: they stand in other fields.

    Raises:
        BadRecord: anything that is no JSON object with strings under these keys.
    """
    text = decoded(raw).removeprefix(_BOM)
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except RecursionError as error:
        raise BadRecord("nested too deeply", "JSON nested deeper than can be read") from error
    except ValueError as error:
        raise BadRecord("not JSON", f"not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        hint = "; a JSON array of records is read from a file ending in .json" if isinstance(row, list) else ""
        raise BadRecord("no object", f"expected a JSON object with {list(keys)}, found {json_name(row)}{hint}")
    return texts_of_values(row, keys)


def texts_of_values(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """The texts of a row by key; raises BadRecord where a key is missing, or its value is no text."""
    return {key: _text(row, key) for key in keys}


def decoded(raw: bytes) -> str:
    """UTF-8 bytes as text; raises BadRecord with the first byte that is none, from 0."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", f"not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def json_name(value: object) -> str:
    """What JSON calls a value of this kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        names = sorted(row)
        more = ["..."] if len(names) > _KEYS_NAMED_AT_MOST else []
        found = names[:_KEYS_NAMED_AT_MOST] + more
        raise BadRecord("no key", f"no key {key!r}; it has {found}")
    value = row[key]
    if isinstance(value, bytes):  # a column of bytes, or of text that nobody has checked
        try:
            value = decoded(value)
        except BadRecord as error:
            raise BadRecord(error.cause, f"{key!r} is {error.detail}") from error
    if not isinstance(value, str):
        raise BadRecord("no string", f"{key!r} should be a string, found {json_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character; tokenizers fail on it obscurely
        raise BadRecord("not Unicode", f"{key!r} is not valid Unicode at character {error.start}") from error
    return value.removeprefix(_BOM)  # such a mark is no part of a text


_CHUNK_BYTES = 256 * 1024
_OUTSIDE_STRINGS = re.compile(rb'["\[\]{},]')
_INSIDE_STRINGS = re.compile(rb'["\\]')


class CutOffError(ValueError):
    """The stream ends inside its array, or goes on after it."""


def json_values(stream: io.BufferedReader[Any], array: bool) -> Iterator[tuple[int, bytes]]:
    """The values of a stream, each with the line it starts in, from 1.

    Args:
        array: the values stand in one array, parted by commas; otherwise one follows the other.

    Raises:
        CutOffError: the array has no end, or something follows it; names the line.
    """
    held = bytearray()  # what follows the last value, as far as it was read
    line = 1  # in which it begins
    at = depth = 0
    in_string = after_comma = ended = False

    def take(end: int, rest: int) -> tuple[int, bytes]:
        """Take what stands before ``end`` out of ``held``, and go on from ``rest``; its first line and its content."""
        nonlocal line, at
        raw = bytes(held[:end])
        start = line + raw[: len(raw) - len(raw.lstrip())].count(b"\n")
        line += raw.count(b"\n")
        del held[:rest]
        at = 0
        return start, raw.removeprefix(_BOM.encode()).strip()

    while chunk := stream.read(_CHUNK_BYTES):
        held += chunk
        while not ended and (match := (_INSIDE_STRINGS if in_string else _OUTSIDE_STRINGS).search(held, at)):
            at, mark = match.end(), match.group()
            if mark == b"\\":
                at += 1
            elif mark == b'"':
                in_string = not in_string
            elif mark in b"[{":
                depth += 1
                if array and depth == 1:
                    take(at, at)
            elif mark in b"]}":
                depth = max(depth - 1, 0)
                if depth > 0:
                    continue
                ended = array
                value = take(at - 1 if array else at, at)
                if value[1] or after_comma:  # an array may be empty
                    yield value
            elif array and depth == 1:
                yield take(at - 1, at)
                after_comma = True
        at = max(at, len(held))
    line, rest = take(len(held), len(held))
    if array and not ended:
        raise CutOffError(f"line {line}: the array has no end: the file was cut off, or a bracket or quote is open")
    if array and rest:
        raise CutOffError(f"line {line}: something follows the end of the array")
    if rest:
        yield line, rest
