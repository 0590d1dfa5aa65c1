"""Text files to measure on: refused in one line before anything runs."""

from __future__ import annotations

import pytest

from megatron_btx.data.texts import check_documents
from megatron_btx.errors import InputError


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", None, "--flag a=.*a.jsonl: does not exist; give a text file, or the prefix"),
        ("a.jsonl", "", "--flag a=.*a.jsonl: holds no text"),
        ("a.jsonl", '{"text": ""}\n', "--flag a=.*a.jsonl: holds no text"),
        ("a.jsonl", "no json\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", '{"body": "x"}\n', "a.jsonl:1: no key 'text'; it has \\['body'\\]"),
        ("a.parquet", "PAR?", "a.parquet: not a readable Parquet file"),
        ("a", None, "--flag a= .*a.bin does not exist"),
    ],
)
def test_refusals(name, content, said, tmp_path):
    """Names the flag and the file, or the file and its line."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        check_documents(str(tmp_path / name), "--flag a=")


def test_what_can_be_read_passes(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n{"text": "b"}\nnot read any more')
    for name in ("a.txt", "a.jsonl"):
        check_documents(str(tmp_path / name), "--flag a=")
