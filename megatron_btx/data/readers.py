"""Documents out of JSON, plain text and Parquet files, in units that workers can take.

The parent process only cuts files into units (raw lines, a text, a batch of a column); parsing happens where the unit
is tokenized, so that reading is never the bottleneck. Units come in a fixed order, which is what makes the output
independent of the number of workers.

What is wrong with one record is told apart from what is wrong with a file. Only records can be left out.
"""

from __future__ import annotations

import codecs
import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError
from megatron_btx.data.inputs import ENDINGS, Form, form_of, head_of, open_input
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
_UTF_16_AND_32 = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
"""Byte order marks; UTF-32's first, because its mark begins as that of UTF-16 does."""


@dataclass(frozen=True)
class Unit:
    """A piece of one input file: what one worker parses and tokenizes at a time."""

    path: str
    """The input file."""
    form: Form
    """How the records are to be parsed; never JSON, whose values are LINES once they are cut."""
    records: tuple[bytes, ...]
    """Raw JSON texts; or the one text; or one Arrow stream with rows of a Parquet file."""
    numbers: Sequence[int]
    """The line, from 1, of each JSON text; or the first row, from 0 in its row group, of a Parquet piece."""
    row_group: int
    """Of a Parquet piece, from 0."""
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
    head = head_of(path)
    _check_encoding(path, head)
    if form is Form.TEXT:
        yield _whole_text(path, keys)
    elif form is Form.JSON and (start := _first_line(head)) in (b"[", b"{"):
        yield from _cut_values(path, array=start == b"[")
    elif form is Form.JSON and start.startswith(b"["):
        yield from _cut_values(path, array=True)
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
    for where, read in _records(unit, keys):
        try:
            texts = read()
        except BadRecord as record:
            record.where = where
            on_bad(record)
            continue
        if texts is not None:
            yield Document(where, texts)


def refuse(record: BadRecord) -> None:
    """Stop at a bad record.

    Raises:
        InputError: always; names the record and what is wrong.
    """
    raise InputError(f"{record.line()}; mend the record or take it out")


_Reader = Callable[[], dict[str, str] | None]


def _records(unit: Unit, keys: Sequence[str]) -> Iterator[tuple[str, _Reader]]:
    """Where each record stands, and the function that reads it."""
    if unit.form is Form.PARQUET:
        for row, values in enumerate(_rows(unit.records[0], keys), start=unit.numbers[0]):
            where = f"{unit.path}: row group {unit.row_group}, row {row}"
            yield where, partial(texts_of_values, values, keys)
    elif unit.form is Form.TEXT:
        yield unit.path, partial(_texts_of_a_file, unit.records[0])
    else:
        for number, raw in zip(unit.numbers, unit.records, strict=True):
            yield f"{unit.path}:{number}", partial(texts_of_json, raw, keys)


def _texts_of_a_file(raw: bytes) -> dict[str, str]:
    """Text files are written with any line ends and may begin with a byte order mark; neither is of the text."""
    text = decoded(raw).removeprefix("\ufeff")
    return {TEXT_KEY: text.replace("\r\n", "\n").replace("\r", "\n")}


def _check_encoding(path: Path, head: bytes) -> None:
    for name, marks in _UTF_16_AND_32.items():
        if head.startswith(marks):
            raise InputError(f"{path}: {name} text; convert it to UTF-8, as `iconv -f {name} -t UTF-8` does")
    if head[:1] and b"\0" in head[:2]:
        raise InputError(f"{path}: text of two or four bytes for each character, as UTF-16; convert it to UTF-8")
    if head.startswith(b"PAR1"):
        raise InputError(f"{path}: a Parquet file; name it .parquet")


def _first_line(head: bytes) -> bytes:
    return head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0].rstrip()


def _cut_lines(path: Path) -> Iterator[Unit]:
    number, position = 1, 0
    with open_input(path) as file:
        while lines := file.content.readlines(_UNIT_BYTES):
            reached = file.raw.tell()
            numbers = range(number, number + len(lines))
            yield Unit(str(path), Form.LINES, tuple(lines), numbers, 0, reached - position)
            number, position = number + len(lines), reached


def _cut_values(path: Path, array: bool) -> Iterator[Unit]:
    values: list[bytes] = []
    numbers: list[int] = []
    size_bytes = position = 0
    with open_input(path) as file:
        try:
            for number, value in json_values(file.content, array):
                values.append(value)
                numbers.append(number)
                size_bytes += len(value)
                if size_bytes >= _UNIT_BYTES:
                    reached = file.raw.tell()
                    yield Unit(str(path), Form.LINES, tuple(values), tuple(numbers), 0, reached - position)
                    values, numbers, size_bytes, position = [], [], 0, reached
        except CutOffError as error:
            raise InputError(f"{path}: {error}; fetch or write it again") from error
        if values:
            yield Unit(str(path), Form.LINES, tuple(values), tuple(numbers), 0, file.raw.tell() - position)


def _whole_text(path: Path, keys: Sequence[str]) -> Unit:
    if tuple(keys) != (TEXT_KEY,):
        raise InputError(f"{path}: a plain text file only has the key {TEXT_KEY!r}, asked for {list(keys)}")
    with open_input(path) as file:
        content = file.content.read()
        return Unit(str(path), Form.TEXT, (content,), (1,), 0, file.raw.tell())


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
                    row = 0
                    share = size * (group + 1) // groups - size * group // groups
                    for batch in file.iter_batches(_PARQUET_ROWS_READ, row_groups=[group], columns=list(keys)):
                        for piece in _pieces(batch):
                            yield Unit(str(path), Form.PARQUET, (_stream_of(piece),), (row,), group, share)
                            row, share = row + len(piece), 0
        # Damage shows as almost any error, because the file says how much memory and which codec to use.
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise InputError(f"{path}: not a readable Parquet file: {error}; fetch or write it again") from error


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """A file's content where one can jump: itself, or a temporary copy when it is compressed as a whole."""
    with open_input(path) as file:
        if file.content is file.raw:
            yield file.raw
            return
        with tempfile.TemporaryFile() as copy:
            while piece := file.content.read(1 << 20):
                copy.write(piece)
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


def _pieces(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    """A batch in slices of about a unit's size, so that long texts do not fill the memory."""
    rows = max(1, len(batch) * _UNIT_BYTES // max(batch.nbytes, 1))
    for start in range(0, len(batch), rows):
        yield batch.slice(start, rows)


def _stream_of(batch: pyarrow.RecordBatch) -> bytes:
    import pyarrow

    target = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(target, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(target.getvalue())


def _rows(stream: bytes, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow stream, strings as bytes: nobody has checked that they are UTF-8."""
    import pyarrow

    with pyarrow.ipc.open_stream(stream) as reader:
        for batch in reader:
            columns = [_raw_values(batch.column(key)) for key in keys]
            for values in zip(*columns, strict=True):
                yield dict(zip(keys, values, strict=True))


def _raw_values(column: pyarrow.Array) -> list[bytes | None]:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values
