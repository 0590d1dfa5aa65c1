"""Which files are read, and how: those named, those a glob finds, and what a directory holds; compressed or not.

Compressed files are told by their first bytes, read to their very end, or refused. The standard library's readers drop
in silence what follows the first member where its header is damaged, and pyarrow's refuses the long windows of zstd. So
the members are walked here, by one loop for all four formats.
"""

from __future__ import annotations

import bz2
import contextlib
import enum
import glob
import io
import lzma
import os
import zlib
from collections.abc import Buffer, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zstandard

from megatron_btx.common.errors import InputError
from megatron_btx.data.description import SUFFIX

if TYPE_CHECKING:
    from megatron_btx.data.domains import Description

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
"""Endings, and what they promise. The first bytes decide."""

_MAGIC_BYTES = 10
"""As many bytes as the longest signature has."""
_GZIP, _ZSTD, _XZ = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00"
_BZIP2_STARTS = (b"1AY&SY", b"\x17rE8P\x90")  # a block, or the end of an empty file, after "BZh" and a digit
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f; pzstd writes such frames
_NOT_READ = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"\x04\x22\x4d\x18": "compressed by lz4: unpack it, or compress it with zstd",
    b"version http": "a Git LFS pointer in place of the data: run `git lfs pull`",
}
_LONGEST_ZSTD_WINDOW_BYTES = 1 << 31
"""What ``zstd --long=31`` asks for, the most that the format's library allows."""
_DECOMPRESSORS: Mapping[str, Callable[[], Any]] = {
    "gzip": partial(zlib.decompressobj, wbits=31),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=_LONGEST_ZSTD_WINDOW_BYTES).decompressobj(),
    "xz": lzma.LZMADecompressor,
    "bzip2": bz2.BZ2Decompressor,
}
"""They read one member, and have ``decompress``, ``eof`` and ``unused_data`` in common."""
_DAMAGE = (zstandard.ZstdError, zlib.error, lzma.LZMAError, OSError, ValueError, MemoryError)
"""What they raise for bad data (bz2 an OSError), or a MemoryError for a window too large."""
_PIECE_BYTES = 8 * 1024
"""Compressed bytes given at a time: small, because a piece of zeros grows some ten thousand times."""
HEAD_BYTES = 4096


def format_of(start: bytes) -> str | None:
    """The compression that these first bytes tell, or None."""
    if start.startswith(_GZIP):
        return "gzip"
    if start.startswith(_ZSTD) or (start[1:4] == _ZSTD_SKIPPABLE and 0x50 <= start[0] <= 0x5F):
        return "zstd"
    if start.startswith(_XZ):
        return "xz"
    if start.startswith(b"BZh") and start[4:10] in _BZIP2_STARTS:
        return "bzip2"
    return None


@contextlib.contextmanager
def open_input(path: Path) -> Iterator[tuple[io.BufferedReader, io.BufferedReader[Any]]]:
    """Open a file, compressed or not, whatever its name says: the file, and its content without compression.

    How far the file was read is the progress.

    Raises:
        InputError: its name promises a compression and it holds neither that nor text; an archive; an LFS pointer.
            Reading raises it for compressed data that is damaged or cut off.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as raw:
        start = raw.read(HEAD_BYTES)
        raw.seek(0)
        found = format_of(start)
        if found is None:
            _check_plain(path, start)
            yield raw, raw
            return
        with io.BufferedReader(_Members(raw, found, path), 64 * 1024) as content:
            yield raw, content


def _check_plain(path: Path, start: bytes) -> None:
    for signature, what in _NOT_READ.items():
        if start.startswith(signature):
            raise InputError(f"{path}: is {what}")
    promised = SUFFIXES.get(path.suffix.lower())
    if promised is None:
        return
    if len(start) < _MAGIC_BYTES:
        raise InputError(f"{path}: cut off, {len(start)} bytes are no {promised} file; fetch or write it again")
    if start.startswith(b"PAR1"):
        return
    try:
        start[:-4].decode()  # the cut may go through a character, which has four bytes at most
    except UnicodeDecodeError as error:
        if error.start < len(start) - 8:
            raise InputError(f"{path}: holds neither {promised} data nor text; fetch or write it again") from error


class _Members(io.RawIOBase):
    """The content of all members (gzip), frames (zstd) or streams (xz, bzip2) of a file, one after the other."""

    def __init__(self, raw: io.BufferedReader, name: str, path: Path) -> None:
        self._raw, self._format, self._path = raw, name, path
        self._decompressor: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        """As io.RawIOBase has it; raises InputError for data that are damaged or cut off."""
        target = memoryview(buffer).cast("B")
        while not self._output:
            if not self._advance():
                return 0
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _advance(self) -> bool:
        """Decompress one more piece; False at the end of the file."""
        if not self._input:
            self._input = self._raw.read(_PIECE_BYTES)
        if self._decompressor is None:
            if not self._start_member():
                return False
        elif not self._input:
            raise self._damaged("it ends in the middle")
        try:
            self._output = memoryview(self._decompressor.decompress(self._input))
        except _DAMAGE as error:
            raise self._damaged(str(error) or type(error).__name__) from error
        self._input = b""
        if self._decompressor.eof:
            self._input = self._decompressor.unused_data
            self._decompressor = None
        return True

    def _start_member(self) -> bool:
        """Begin the next member; False when there is none. Zeros between members are padding."""
        self._input = self._input.lstrip(b"\0")
        while len(self._input) < _MAGIC_BYTES:
            more = self._raw.read(_PIECE_BYTES)
            if not more:
                break
            self._input = (self._input + more).lstrip(b"\0")
        if not self._input:
            return False
        if format_of(self._input) != self._format:
            raise self._damaged(f"what follows the end of the {self._format} data is none")
        self._decompressor = _DECOMPRESSORS[self._format]()
        return True

    def _damaged(self, why: str) -> InputError:
        if "memory" in why.lower():
            return InputError(f"{self._path}: {self._format}: {why}; a long window needs up to 2 GiB: free some memory")
        at = f"near byte {self._raw.tell():,} of {os.fstat(self._raw.fileno()).st_size:,}"
        return InputError(f"{self._path}: damaged {self._format} data {at}: {why}; fetch or write the file again")


class Form(enum.StrEnum):
    """How a file holds its documents."""

    LINES = "lines"
    """One JSON object in each line."""
    JSON = "json"
    """A JSON array of objects; objects one after the other; or lines."""
    TEXT = "text"
    """The file is one document."""
    PARQUET = "parquet"
    """A table, one document in each row."""


_FORMS = {
    ".jsonl": Form.LINES,
    ".ndjson": Form.LINES,
    ".json": Form.JSON,
    ".txt": Form.TEXT,
    ".md": Form.TEXT,
    ".parquet": Form.PARQUET,
}
ENDINGS = f"{', '.join(_FORMS)}, each also with {', '.join(SUFFIXES)}"
"""For people."""

_ABOUT_THE_DATA = ("readme", "license", "licence", "dataset_info", "dataset_infos", "dataset_dict")
"""Names, without endings, of files that stand beside a corpus and are none of its documents."""
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Inputs:
    """What is read, and what was found beside it."""

    files: tuple[Path, ...]
    """In a fixed order."""
    not_read: tuple[Path, ...]
    """What the directories hold besides, hidden files not counted."""

    def size_bytes(self) -> int:
        """The size of the files that are read, as they lie on disk."""
        return sum(file.stat().st_size for file in self.files)


def form_of(name: str) -> Form | None:
    """How a file of this name holds documents, or None when it is not read."""
    path = Path(name.lower())
    if path.suffix in SUFFIXES:
        path = path.with_suffix("")
    return _FORMS.get(path.suffix)


def expand_inputs(patterns: Sequence[str], where: str = "--input") -> Inputs:
    """The input files behind files, globs and directories, in a fixed order.

    Arguments keep their order; what a glob or a directory stands for is sorted by path. Directories are read with all
    that is below them. A file named twice is read once, because a corpus that silently repeats itself is never what
    was meant.

    Args:
        where: what named them, for messages.

    Raises:
        InputError: an input that does not exist, has an unknown ending, or a directory without readable files.
        OSError: a directory cannot be listed.
    """
    files: dict[str, Path] = {}
    not_read: dict[str, Path] = {}
    for pattern in patterns:
        matches = [Path(pattern)]
        if not os.path.exists(pattern):
            matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not matches:
            raise InputError(f"{where} {pattern}: no such file, directory or matching glob; check the path")
        for path in matches:
            if path.is_dir():
                found, others = _contents(path, where)
                if not found:
                    said = f" ({listed(others)})" if others else ""
                    raise InputError(f"{where} {path}: the directory holds no file ending in {ENDINGS}{said}")
                not_read.update((os.path.abspath(other), other) for other in others)
            elif not path.is_file():
                raise InputError(f"{where} {path}: neither a file nor a directory; write what it gives into a file")
            elif form_of(path.name) is None:
                raise InputError(f"{where} {path}: unknown kind of file; expected an ending among {ENDINGS}")
            else:
                found = [path]
            files.update((os.path.abspath(file), file) for file in found)
    return Inputs(tuple(files.values()), tuple(path for name, path in not_read.items() if name not in files))


def listed(paths: Iterable[Path]) -> str:
    """``not read: 7 files (a.csv, b.csv, ...)``: how many, and the first by name."""
    names = [path.name for path in paths]
    files = f"{len(names):,} files"
    if len(names) == 1:
        files = "1 file"
    more = ""
    if len(names) > _NAMED_AT_MOST:
        more = ", ..."
    return f"not read: {files} ({', '.join(names[:_NAMED_AT_MOST])}{more})"


def _contents(directory: Path, where: str) -> tuple[list[Path], list[Path]]:
    """The files below a directory that are read, and the others; linked directories are entered once."""
    read: list[Path] = []
    others: list[Path] = []
    missing: list[Path] = []
    entered: set[str] = set()
    for folder, folders, names in os.walk(directory, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.is_symlink() and not path.exists():
                missing.append(path)
            about = name.lower().split(".")[0] in _ABOUT_THE_DATA or name.endswith(SUFFIX)
            if form_of(name) is not None and not about and path.is_file():
                read.append(path)
            else:
                others.append(path)
    if missing:
        paths = ", ".join(map(str, sorted(missing)[:_NAMED_AT_MOST]))
        each = "a link to a file that is not there; fetch it, or remove the link"
        raise InputError(f"{where} {paths}: {each} ({len(missing):,} in all)")
    return sorted(read), sorted(others)


def _refuse(error: OSError) -> None:
    raise error


def find_files(description: Description, where: str = "--description: ") -> dict[tuple[str, str], Inputs]:
    """(domain, "text" or split) -> its files.

    Args:
        where: what gave the description, for messages.

    Raises:
        InputError: files do not exist, or stand twice: what a model is tested on would be what it was trained on, or
            two experts would be the same. All are named.
    """
    found: dict[tuple[str, str], Inputs] = {}
    owners: dict[str, str] = {}
    refused: list[str] = []
    for name, domain in description.domains.items():
        for source, paths in domain.sources().items():
            place = f"{where}domains.{name}.{source}"
            try:
                inputs = found[name, source] = expand_inputs(paths, f"{place}:")
                for file in inputs.files:
                    owner = owners.setdefault(os.path.realpath(file), place)
                    if owner != place:
                        other = owner.rpartition(" ")[2]
                        raise InputError(f"{place}: {file} is text of {other}, too; leave it out of one")
                    if not os.access(file, os.R_OK):
                        raise InputError(f"{place}: {file} cannot be read; change its rights, or leave it out")
            except InputError as error:
                refused.append(str(error))
            except OSError as error:
                refused.append(f"{place}: {error.filename}: {error.strerror}")
    if refused:
        raise InputError("; ".join(refused))
    return found
