"""Which files are read: those named, those a glob finds, and what a directory holds that can be read."""

from __future__ import annotations

import enum
import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.common.errors import InputError
from megatron_btx.data import compression
from megatron_btx.data.description import SUFFIX


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
ENDINGS = f"{', '.join(_FORMS)}, each also with {', '.join(compression.SUFFIXES)}"
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
    if path.suffix in compression.SUFFIXES:
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
        for path in _existing(pattern, where):
            if path.is_dir():
                found, others = _contents(path, where)
                if not found:
                    said = f" ({listed(others)})" if others else ""
                    raise InputError(f"{where} {path}: the directory holds no file ending in {ENDINGS}{said}")
                not_read.update((os.path.abspath(other), other) for other in others)
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


def _existing(pattern: str, where: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir() or path.is_file():
        return [path]
    if path.exists():
        raise InputError(f"{where} {pattern}: neither a file nor a directory; write what it gives into a file first")
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    if not found:
        raise InputError(f"{where} {pattern}: no such file, directory or matching glob; check the path")
    return found


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
