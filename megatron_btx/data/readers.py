"""Documents out of JSON, plain text and Parquet files, in units that workers can take.

The parent process only cuts files into units (raw lines, a text, a batch of a column); parsing happens where the unit
is tokenized, so that reading is never the bottleneck. Units come in a fixed order, which is what makes the output
independent of the number of workers.

What is wrong with one record is told apart from what is wrong with a file. Only records can be left out.
"""

from __future__ import annotations

import codecs
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError
from megatron_btx.data.inputs import ENDINGS, HEAD_BYTES, Form, form_of, open_input
from megatron_btx.data.records import (
    BadRecord,
    CutOffError,
    decoded,
    json_values,
    texts_of_json,
    texts_of_values,
)

if TYPE_CHECKING:
    import pyarrow

TEXT_KEY = "text"

_UNIT_BYTES = 256 * 1024
_PARQUET_ROWS_READ = 256


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


@dataclass(frozen=True)
class Document:
    """One document: its texts by key, and where it came from for error messages."""

    where: str
    texts: Mapping[str, str]


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


def parse(unit: Unit, keys: Sequence[str], on_bad: Callable[[BadRecord], None]) -> Iterator[Document]:
    """The documents of one unit.

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
            yield Document(where, texts)


def refuse(record: BadRecord, key_flag: str = "", skip: str = "") -> None:
    """Stop at a bad record, with an InputError that names it and what is wrong.

    Args:
        key_flag: what chooses the key, for the remedy.
        skip: what leaves bad records out.
    """
    remedy = "mend the record or take it out"
    if skip:
        remedy = f"mend the record, or leave such records out with {skip}"
    if key_flag and record.cause == "no key":
        remedy = f"name the right key with {key_flag}, {remedy}"
    raise InputError(f"{record.line()}; {remedy}")


def _texts_of(record: Any, form: Form, keys: Sequence[str]) -> dict[str, str] | None:
    """The texts of a record by key; None for a blank line."""
    if form is Form.PARQUET:
        return texts_of_values(dict(zip(keys, record, strict=True)), keys)
    if form is Form.LINES:
        return texts_of_json(record, keys)
    # Text files are written with any line ends and may begin with a byte order mark; neither is of the text.
    text = decoded(record).removeprefix("\ufeff")
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
