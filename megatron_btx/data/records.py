"""One record of a file into its texts, or what is wrong with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_BOM = "\ufeff"
_KEYS_NAMED_AT_MOST = 10
_SHOWN_AT_MOST = 5


@dataclass(frozen=True)
class BadRecord:
    """A record that gives no texts."""

    where: str
    """File and line; for Parquet file, row group and row."""
    cause: str
    """The kind of fault, for counting."""
    detail: str
    """What was found and what was expected."""

    def line(self) -> str:
        """For people."""
        return f"{self.where}: {self.detail}"


class RecordError(ValueError):
    """A record that gives no texts; see :class:`BadRecord`."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.detail = cause, detail


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


class _Repeated(dict[str, Any]):
    """A JSON object in which keys stand twice."""

    names: frozenset[str] = frozenset()


def texts_of_json(raw: bytes, keys: Sequence[str]) -> dict[str, str] | None:
    """The texts of a JSON object by key, or None for a blank line.

    NaN and Infinity, which JSON does not know and many programs write, are taken: they stand in other fields. A key
    that is asked for and stands twice is refused, because readers differ in which of the two they take.

    Raises:
        RecordError: anything that is no JSON object with strings under these keys.
    """
    text = decoded(raw).removeprefix(_BOM)
    if not text.strip():
        return None
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise RecordError("nested too deeply", "JSON nested deeper than can be read") from error
    except ValueError as error:
        raise RecordError("not JSON", f"not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        hint = "; a JSON array of records is read from a file ending in .json" if isinstance(row, list) else ""
        raise RecordError("no object", f"expected a JSON object with {list(keys)}, found {json_name(row)}{hint}")
    if isinstance(row, _Repeated):
        for key in keys:
            if key in row.names:
                raise RecordError("key repeated", f"the key {key!r} stands twice in the record")
    return texts_of_values(row, keys)


def texts_of_values(row: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """The texts of a row by key. A byte order mark before a text is no part of it.

    Raises:
        RecordError: a key is missing, or its value is no text.
    """
    return {key: _text(row, key) for key in keys}


def decoded(raw: bytes) -> str:
    """UTF-8 bytes as text.

    Raises:
        RecordError: they are none; names the byte, from 0.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def json_name(value: object) -> str:
    """What JSON calls a value of this kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    counts = Counter(name for name, _ in pairs)
    repeated = _Repeated(row)
    repeated.names = frozenset(name for name, count in counts.items() if count > 1)
    return repeated


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        names = sorted(row)
        more = ["..."] if len(names) > _KEYS_NAMED_AT_MOST else []
        found = names[:_KEYS_NAMED_AT_MOST] + more
        raise RecordError("no key", f"no key {key!r}; it has {found}")
    value = row[key]
    if isinstance(value, bytes):  # a column of bytes, or of text that nobody has checked
        try:
            value = decoded(value)
        except RecordError as error:
            raise RecordError(error.cause, f"{key!r} is {error.detail}") from error
    if not isinstance(value, str):
        raise RecordError("no string", f"{key!r} should be a string, found {json_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character; tokenizers fail on it obscurely
        raise RecordError("not Unicode", f"{key!r} is not valid Unicode at character {error.start}") from error
    return value.removeprefix(_BOM)
