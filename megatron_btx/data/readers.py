"""Documents out of JSON, plain text and Parquet files, in units that workers can take.

The parent process only cuts files into units (raw lines, a text, a batch of a column); parsing happens where the unit
is tokenized, so that reading is never the bottleneck. Units come in a fixed order, which is what makes the output
independent of the number of workers.

What is wrong with one record is told apart from what is wrong with a file. Only records can be left out.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError
from megatron_btx.data.inputs import ENDINGS, HEAD_BYTES, Form, form_of, open_input

if TYPE_CHECKING:
    import pyarrow

TEXT_KEY = "text"

_UNIT_BYTES = 256 * 1024
_PARQUET_ROWS_READ = 256
_BOM = "\ufeff"
_KEYS_SHOWN = 10
_SHOWN_AT_MOST = 5


@dataclass(frozen=True)
class Unit:
    """A piece of one input file: what one worker parses and tokenizes at a time."""

    path: str
    """The input file."""
    form: Form
    """How the records are to be parsed; never JSON, whose values are LINES once they are cut."""
    records: Sequence[Any]
    """Raw JSON texts; or the one text; or rows of a Parquet file, each the bytes of its columns or None for null."""
    places: Sequence[str]
    """Where each record stands in the file, as it follows the path: ``:LINE``, or row group and row from 0."""
    input_bytes: int
    """How much of the file on disk this piece stands for; the progress bar adds these up."""


def cut(path: Path, keys: Sequence[str]) -> Iterator[Unit]:
    """Cut one input file into units.

    Raises:
        InputError: the file is damaged, cut off or in another encoding, or its columns are not those asked for.
        OSError: the file cannot be read.
    """
    form = form_of(path.name)
    if form is None:
        raise InputError(f"{path}: unknown kind of file; expected an ending among {ENDINGS}")
    if form is Form.PARQUET:
        yield from _cut_rows(path, keys)
        return
    with open_input(path) as (_, content):
        head = content.read(HEAD_BYTES)
    if b"\0" in head[:2] or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "UTF-32" if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) else "UTF-16"
        raise InputError(f"{path}: {name} text; convert it to UTF-8, as `iconv -f {name} -t UTF-8` does")
    if head.startswith(b"PAR1"):
        raise InputError(f"{path}: a Parquet file; name it .parquet")
    if form is Form.TEXT:
        if tuple(keys) != (TEXT_KEY,):
            raise InputError(f"{path}: a plain text file only has the key {TEXT_KEY!r}, asked for {list(keys)}")
        with open_input(path) as (raw, content):
            yield Unit(str(path), form, (content.read(),), ("",), raw.tell())
        return
    first_line = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0].rstrip()
    is_array = first_line.startswith(b"[")
    if form is Form.JSON and (is_array or first_line == b"{"):
        yield from _cut_values(path, is_array)
    else:
        yield from _cut_lines(path)


def cut_all(paths: Iterable[Path], keys: Sequence[str]) -> Iterator[Unit]:
    """Cut input files into units, one file after the other; raises as :func:`cut` does."""
    for path in paths:
        yield from cut(path, keys)


def parse(unit: Unit, keys: Sequence[str], on_bad: Callable[[BadRecord], None]) -> Iterator[tuple[str, dict[str, str]]]:
    """The documents of one unit: where each stands, and its texts by key.

    Args:
        on_bad: gets the records that give none, and raises unless they are to be left out. See :func:`refuse`.
    """
    for record, place in zip(unit.records, unit.places, strict=True):
        where = unit.path + place
        try:
            texts = _texts_of(record, unit.form, keys)
        except BadRecord as bad:
            bad.where = where
            on_bad(bad)
            continue
        if texts is not None:
            yield where, texts


def refuse(record: BadRecord, key_flag: str = "", skip: str = "") -> None:
    """Stop at a bad record; the InputError's remedy names what chooses the key, and what leaves bad records out."""
    remedy = "mend the record or take it out"
    if skip:
        remedy = f"mend the record, or leave such records out with {skip}"
    if key_flag and record.cause == "no key":
        remedy = f"name the right key with {key_flag}, {remedy}"
    raise InputError(f"{record.line()}; {remedy}")


def _texts_of(record: Any, form: Form, keys: Sequence[str]) -> dict[str, str] | None:
    """The texts of a record by key; None for a blank line."""
    if form is Form.PARQUET:
        row = dict(zip(keys, record, strict=True))
        return {key: _text(row, key) for key in keys}
    if form is Form.LINES:
        return texts_of_json(record, keys)
    # Text files are written with any line ends and may begin with a byte order mark; neither is of the text.
    text = decoded(record).removeprefix(_BOM)
    return {TEXT_KEY: text.replace("\r\n", "\n").replace("\r", "\n")}


def _cut_lines(path: Path) -> Iterator[Unit]:
    number, position = 1, 0
    with open_input(path) as (raw, content):
        while lines := content.readlines(_UNIT_BYTES):
            reached = raw.tell()
            places = [f":{line}" for line in range(number, number + len(lines))]
            yield Unit(str(path), Form.LINES, lines, places, reached - position)
            number, position = number + len(lines), reached


def _cut_values(path: Path, array: bool) -> Iterator[Unit]:
    values: list[bytes] = []
    places: list[str] = []
    size_bytes = position = 0
    with open_input(path) as (raw, content):
        try:
            for number, value in json_values(content, array):
                values.append(value)
                places.append(f":{number}")
                size_bytes += len(value)
                if size_bytes >= _UNIT_BYTES:
                    reached = raw.tell()
                    yield Unit(str(path), Form.LINES, values, places, reached - position)
                    values, places, size_bytes, position = [], [], 0, reached
        except CutOffError as error:
            raise InputError(f"{path}: {error}; fetch or write it again") from error
        if values:
            yield Unit(str(path), Form.LINES, values, places, raw.tell() - position)


def _cut_rows(path: Path, keys: Sequence[str]) -> Iterator[Unit]:
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    with _seekable(path) as source:
        try:
            with pyarrow.parquet.ParquetFile(source) as file:
                _check_columns(path, file.schema_arrow, keys)
                groups = file.num_row_groups
                for group in range(groups):
                    first = 0
                    share = size * (group + 1) // groups - size * group // groups
                    for batch in file.iter_batches(_PARQUET_ROWS_READ, row_groups=[group], columns=list(keys)):
                        for rows in _pieces(batch, keys):
                            numbers = range(first, first + len(rows))
                            places = [f": row group {group}, row {row}" for row in numbers]
                            yield Unit(str(path), Form.PARQUET, rows, places, share)
                            first, share = first + len(rows), 0
        # Damage shows as almost any error, because the file says how much memory and which codec to use.
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputError(f"{path}: not a readable Parquet file: {error}; fetch or write it again") from error


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """A file's content where one can jump: itself, or a temporary copy when it is compressed as a whole."""
    with open_input(path) as (raw, content):
        if content is raw:
            yield raw
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(content, copy)
            copy.seek(0)
            yield copy


def _check_columns(path: Path, schema: pyarrow.Schema, keys: Sequence[str]) -> None:
    from pyarrow import types

    for key in keys:
        if schema.names.count(key) != 1:
            found = "no column" if key not in schema.names else "more than one column"
            raise InputError(f"{path}: {found} {key!r}; it has {schema.names}; name the right one with --json-keys")
        kind = schema.field(key).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        tests = (
            types.is_string, types.is_large_string, types.is_string_view,
            types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null,
        )  # fmt: skip
        if not any(test(kind) for test in tests):
            raise InputError(f"{path}: the column {key!r} should hold strings, found {kind}; name the right one")


def _pieces(batch: pyarrow.RecordBatch, keys: Sequence[str]) -> Iterator[list[tuple[bytes | None, ...]]]:
    """The rows of a batch, about a unit's bytes at a time, so that long texts do not fill the memory.

    Strings are given as bytes: nobody has checked that they are UTF-8.
    """
    import pyarrow

    count = max(1, len(batch) * _UNIT_BYTES // max(batch.nbytes, 1))
    for start in range(0, len(batch), count):
        columns = []
        for key in keys:
            column = batch.column(key).slice(start, count)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            columns.append(column.cast(pyarrow.large_binary()).to_pylist())
        yield list(zip(*columns, strict=True))


# --- records: their texts, or what is wrong with them ----------------------------------------------------------


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
    """The text under a key; raises BadRecord where the key is missing, or its value is no text."""
    if key not in row:
        names = sorted(row)
        more = ["..."] if len(names) > _KEYS_SHOWN else []
        found = names[:_KEYS_SHOWN] + more
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


# --- JSON values out of a stream -------------------------------------------------------------------------------
# A file of many gigabytes that is one array cannot be parsed whole, and a broken record in it should cost that record
# only. So brackets, commas and quotes are followed here; whoever takes a value parses it.

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
