"""JSON values out of a stream, cut where they end without being parsed.

A file of many gigabytes that is one array cannot be parsed whole, and a broken record in it should cost that record
only. So brackets, commas and quotes are followed here; whoever takes a value parses it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

_CHUNK_BYTES = 256 * 1024
_OUTSIDE_STRINGS = re.compile(rb'["\[\]{},]')
_INSIDE_STRINGS = re.compile(rb'["\\]')
_BOM = b"\xef\xbb\xbf"


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
        return line, raw.removeprefix(_BOM).strip()

    def _drop(self, last_part: bytes) -> None:
        self._line += b"".join(self._parts).count(b"\n") + last_part.count(b"\n")
        self._parts.clear()


def _leading_lines(raw: bytes) -> int:
    return raw[: len(raw) - len(raw.lstrip())].count(b"\n")
