"""Files: whole or not at all, JSON with a refusal of one line, hashes, and how far long work is."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError

_SECONDS_BETWEEN_LINES = 10.0


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` so that a reader, or whoever comes after a kill, sees the old file or the new one.

    Raises:
        OSError: it cannot be written, for a full disk say; names ``path``, and leaves nothing beside it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        error.filename = str(path)  # a failed write names no file, a failed open the temporary one
        raise
    finally:
        beside.unlink(missing_ok=True)


def write_flushed(file: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def write_json(file: Path, value: object) -> None:
    """Write ``value`` as JSON, atomically, and make its folder where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(value, indent=1))


def refuse_unusual(file: Path) -> None:
    """Raise InputError for a link, a pipe or the like, where a stranger's folder should have a file to write on."""
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
        raise InputError(f"{file}: is a link, or no regular file, and is not written to; remove it")


def refuse_unwritable(folder: str, where: str) -> None:
    """Raise InputError for a folder that cannot be written, or cannot be made where there is none."""
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{where}: {above} is no folder that can be written to; name another place")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, and where it is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(file: Path, remedy: str, error: type[InputError] = InputError) -> Any:
    """The value in a JSON file, which may be a stranger's.

    Args:
        remedy: what to do when the file is missing or damaged; the end of the message.
        error: the class to raise.

    Raises:
        InputError: ``file`` is missing, is no regular file (reading a pipe would wait forever), or holds no JSON.
    """
    if not file.is_file():
        found = "is no file, or a link to none" if os.path.lexists(file) else "does not exist"
        raise error(f"{file}: {found}; {remedy}")
    try:
        return parse_json(file.read_bytes())
    except ValueError as failure:
        raise error(f"{file}: is not JSON ({failure}); {remedy}") from failure


def read_json_object(file: Path, remedy: str, error: type[InputError] = InputError) -> dict[str, Any]:
    """The object in a JSON file; as :func:`read_json`, and anything but an object is refused, too."""
    content = read_json(file, remedy, error)
    if not isinstance(content, dict):
        raise error(f"{file}: holds a {type(content).__name__}, expected an object; {remedy}")
    return content


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class ByteProgress:
    """Bytes done out of a total, with rate and time left: a line on stderr every ten seconds, none before them."""

    def __init__(self, title: str, total_bytes: int, quiet: bool = False) -> None:
        """Begin to count time.

        Args:
            quiet: show nothing, as on all ranks but the first.
        """
        self._title, self._quiet = title, quiet
        self._total_bytes = max(total_bytes, 1)
        self._done_bytes = 0
        self._started = self._last_line = time.monotonic()

    def advance(self, done_bytes: int) -> None:
        """Count further bytes as done."""
        self._done_bytes += done_bytes
        now = time.monotonic()
        if self._quiet or not self._done_bytes or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        rate = self._done_bytes / (now - self._started)
        share = self._done_bytes / self._total_bytes
        left = (self._total_bytes - self._done_bytes) / rate
        print(
            f"{self._title}: {share:.0%} of {self._total_bytes / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
