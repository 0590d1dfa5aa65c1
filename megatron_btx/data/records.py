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
    """The texts of a row by key. A byte order mark before a text is no part of it.

    Raises:
        BadRecord: a key is missing, or its value is no text.
    """
    return {key: _text(row, key) for key in keys}


def decoded(raw: bytes) -> str:
    """UTF-8 bytes as text.

    Raises:
        BadRecord: they are none; names the byte, from 0.
    """
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
    return value.removeprefix(_BOM)


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
    cutter = _Cutter(array)
    while chunk := stream.read(_CHUNK_BYTES):
        yield from cutter.feed(chunk)
    yield from cutter.finish()


class _Cutter:
    def __init__(self, array: bool) -> None:
        self._array = array
        self._depth = 0
        self._in_string = False
        self._hidden = 0  # bytes of the next chunk that a backslash at the end of this one hides
        self._ended = False  # the array's last bracket was seen
        self._after_comma = False
        self._line = 1
        self._parts: list[bytes] = []  # of the value that has begun

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """The values that end in this chunk."""
        start = 0
        for at, mark in self._marks(chunk):
            if mark in b"[{":
                self._depth += 1
                if self._array and self._depth == 1 and not self._ended:
                    self._drop(chunk[start : at + 1])
                    start = at + 1
            elif mark in b"]}":
                self._depth -= 1
                if self._depth <= 0 and not self._ended:
                    end = at if self._array else at + 1
                    yield from self._last_value(chunk[start:end])
                    start = at + 1
            elif self._array and self._depth == 1:
                yield self._value(chunk[start:at])
                self._after_comma = True
                start = at + 1
        self._parts.append(chunk[start:])

    def _marks(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """Brackets and commas outside strings, with their positions."""
        position = self._hidden
        while position < len(chunk):
            match = (_INSIDE_STRINGS if self._in_string else _OUTSIDE_STRINGS).search(chunk, position)
            if match is None:
                break
            position = match.end()
            if match.group() == b"\\":
                position += 1
            elif match.group() == b'"':
                self._in_string = not self._in_string
            else:
                yield match.start(), match.group()
        self._hidden = max(position - len(chunk), 0)

    def _last_value(self, last_part: bytes) -> Iterator[tuple[int, bytes]]:
        """What a bracket ends: an object of a sequence, or an array with its last value, if it has any."""
        self._depth = 0
        self._ended = self._array
        is_empty = not b"".join([*self._parts, last_part]).strip()
        if is_empty and not self._after_comma:
            self._drop(last_part)
        else:
            yield self._value(last_part)

    def finish(self) -> Iterator[tuple[int, bytes]]:
        """What the end of the stream leaves."""
        rest = b"".join(self._parts)
        line = self._line + _leading_lines(rest)
        if not self._array:
            if rest.strip():
                yield self._value(b"")
            return
        if not self._ended:
            raise CutOffError(f"line {line}: the array has no end: the file was cut off, or a bracket or quote is open")
        if rest.strip():
            raise CutOffError(f"line {line}: something follows the end of the array")

    def _value(self, last_part: bytes) -> tuple[int, bytes]:
        raw = b"".join(self._parts) + last_part
        line = self._line + _leading_lines(raw)
        self._drop(last_part)
        return line, raw.removeprefix(_BOM.encode()).strip()

    def _drop(self, last_part: bytes) -> None:
        self._line += b"".join(self._parts).count(b"\n") + last_part.count(b"\n")
        self._parts.clear()


def _leading_lines(raw: bytes) -> int:
    return raw[: len(raw) - len(raw.lstrip())].count(b"\n")
