"""Whole files or none, JSON from strangers, and hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.common.files import hash_file, read_json, read_json_object, write_atomically, write_json

REMEDY = "make it again"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Folders are made, nothing is left beside the file."""
    write_json(tmp_path / "deep" / "er" / "file.json", {"a": [1.5, None]})
    assert read_json_object(tmp_path / "deep" / "er" / "file.json", REMEDY) == {"a": [1.5, None]}
    assert os.listdir(tmp_path / "deep" / "er") == ["file.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And names it, and leaves nothing beside it."""
    file = tmp_path / "file"
    write_atomically(file, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError) as caught:
        write_atomically(file, "new")
    assert (caught.value.filename, file.read_text(), os.listdir(tmp_path)) == (str(file), "old", ["file"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "does not exist"),
        ("", "is not JSON"),
        ('{"a": 1', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "holds a list, expected an object"),
    ],
    ids=["missing", "empty", "cut", "nested without end", "a list"],
)
def test_refusals_name_file_find_and_remedy(tmp_path: Path, content: str | None, found: str) -> None:
    """One line, of the class that the caller wants."""
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_json_object(file, REMEDY, CheckpointError)
    assert str(caught.value).startswith(f"{file}: {found}") and str(caught.value).endswith(f"; {REMEDY}")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody writes into it, and reading would never end."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no file, or a link to none; make it again"):
        read_json(tmp_path / "pipe", REMEDY)


def test_hash(tmp_path: Path) -> None:
    """SHA-256 of the bytes."""
    (tmp_path / "file").write_bytes(b"abc" * 1_000_000)
    assert hash_file(tmp_path / "file") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
