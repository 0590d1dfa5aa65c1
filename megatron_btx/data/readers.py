"""Documents out of JSONL, plain text and Parquet files, in units that workers can take.

The parent process only cuts files into units (raw lines, one text file, one Parquet row group); parsing happens
where the unit is tokenized, so that reading is never the bottleneck. Units come in a fixed order, which is what
makes the output independent of the number of workers.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.errors import InputError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_SUFFIXES = (".txt", ".md")
PARQUET_SUFFIXES = (".parquet",)
KNOWN_SUFFIXES = JSONL_SUFFIXES + TEXT_SUFFIXES + PARQUET_SUFFIXES
TEXT_KEY = "text"

_LINES_PER_UNIT_BYTES = 256 * 1024


@dataclass(frozen=True)
class Unit:
    """A piece of one input file: what one worker parses and tokenizes at a time."""

    path: str
    """The input file."""
    first: int
    """First line (from 1) of a JSONL piece, or the row group (from 0) of a Parquet piece."""
    lines: tuple[bytes, ...]
    """The raw lines of a JSONL piece; empty for text and Parquet, which the worker opens itself."""
    input_bytes: int
    """How much of the file on disk this piece stands for; the progress bar adds these up."""


@dataclass(frozen=True)
class Document:
    """One document: its texts by key, and where it came from for error messages."""

    where: str
    texts: Mapping[str, str]


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The input files behind files, globs and directories, in a fixed order.

    Arguments keep their order; what a glob or a directory stands for is sorted by path. A file named twice is
    read once, because a corpus that silently repeats itself is never what was meant.

    Raises:
        InputError: an input that does not exist, has an unknown ending, or a directory without readable files.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(KNOWN_SUFFIXES))
            if not found:
                raise InputError(f"--input {pattern}: the directory holds no file ending in {_known()}")
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
            if not found:
                raise InputError(f"--input {pattern}: no such file, directory or matching glob; check the path")
        for file in found:
            if not file.name.endswith(KNOWN_SUFFIXES):
                raise InputError(f"--input {file}: unknown kind of file; expected an ending among {_known()}")
            files[file] = None
    return list(files)


def cut(path: Path, keys: Sequence[str]) -> Iterator[Unit]:
    """Cut one input file into units.

    Raises:
        InputError: the file is damaged, or lacks a key in a way that shows without parsing rows.
        OSError: the file cannot be read.
    """
    if path.name.endswith(JSONL_SUFFIXES):
        yield from _cut_lines(path)
    elif path.name.endswith(PARQUET_SUFFIXES):
        yield from _cut_row_groups(path, keys)
    else:
        if tuple(keys) != (TEXT_KEY,):
            raise InputError(f"{path}: a plain text file only has the key {TEXT_KEY!r}, asked for {list(keys)}")
        yield Unit(str(path), 1, (), path.stat().st_size)


def parse(unit: Unit, keys: Sequence[str]) -> Iterator[Document]:
    """The documents of one unit.

    Raises:
        InputError: a line that is not JSON, a key that is missing, a text that is not a string.
    """
    if unit.lines:
        yield from _parse_lines(unit, keys)
    elif unit.path.endswith(PARQUET_SUFFIXES):
        yield from _parse_row_group(unit, keys)
    else:
        try:
            text = Path(unit.path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{unit.path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from error
        yield Document(unit.path, {TEXT_KEY: text})


def _cut_lines(path: Path) -> Iterator[Unit]:
    with open(path, "rb") as raw:
        stream = _decompressed(raw, path)
        line_number, position = 1, 0
        try:
            while lines := stream.readlines(_LINES_PER_UNIT_BYTES):
                reached = raw.tell()
                yield Unit(str(path), line_number, tuple(lines), reached - position)
                line_number, position = line_number + len(lines), reached
        except OSError as error:
            if error.errno is not None:
                raise
            raise InputError(f"{path}: damaged near line {line_number}: {error}; fetch or write it again") from error


def _decompressed(raw: io.BufferedReader, path: Path) -> io.BufferedReader:
    """Raw bytes as they are, or through pyarrow's codecs: it is a dependency anyway and knows gzip and zstd."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    if codec is None:
        return raw
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(raw, compression=codec))


def _parse_lines(unit: Unit, keys: Sequence[str]) -> Iterator[Document]:
    for offset, line in enumerate(unit.lines):
        if not line.strip():
            continue
        where = f"{unit.path}:{unit.first + offset}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not a line of JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object with {list(keys)}, found {type(row).__name__}")
        yield Document(where, _texts(row, keys, where))


def _texts(row: Mapping[str, Any], keys: Sequence[str], where: str) -> dict[str, str]:
    for key in keys:
        if key not in row:
            raise InputError(f"{where}: no key {key!r}; it has {sorted(row)}; name the right one with --json-keys")
        if not isinstance(row[key], str):
            raise InputError(f"{where}: {key!r} should be a string, found {type(row[key]).__name__}")
        try:
            row[key].encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a character; tokenizers fail on it obscurely
            raise InputError(f"{where}: {key!r} is not valid Unicode at character {error.start}") from error
    return {key: row[key] for key in keys}


def _cut_row_groups(path: Path, keys: Sequence[str]) -> Iterator[Unit]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, groups = file.schema_arrow.names, file.num_row_groups
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error
    for key in keys:
        if key not in names:
            raise InputError(f"{path}: no column {key!r}; it has {names}; name the right one with --json-keys")
    size = path.stat().st_size
    for group in range(groups):
        yield Unit(str(path), group, (), size * (group + 1) // groups - size * group // groups)


def _parse_row_group(unit: Unit, keys: Sequence[str]) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(unit.path) as file:
            columns = file.read_row_group(unit.first, columns=list(keys)).to_pydict()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{unit.path}: row group {unit.first} cannot be read: {error}") from error
    for row, values in enumerate(zip(*(columns[key] for key in keys), strict=True)):
        where = f"{unit.path}: row group {unit.first}, row {row}"
        yield Document(where, _texts(dict(zip(keys, values, strict=True)), keys, where))


def _known() -> str:
    return ", ".join(KNOWN_SUFFIXES)
