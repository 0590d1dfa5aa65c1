"""Text files to measure on: refused in one line before anything runs."""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.data import texts
from megatron_btx.data.texts import check_documents, check_texts
from tests.support import pico


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


def test_all_that_will_be_read_is_checked(tmp_path, monkeypatch):
    """A record that is bad far down stops the program before it starts, not in the middle of its measurement."""
    monkeypatch.setattr("megatron.training.get_tokenizer", _Numbers)
    path = tmp_path / "a.ndjson.gz"
    good = b'{"text": "1 2 3"}\n'
    path.write_bytes(gzip.compress(good * 300 + b'{"text": null}\n'))
    check_texts({"a": str(path)}, "--data", 1000, "--tokens", BATCH)
    with pytest.raises(InputError, match="a.ndjson.gz:301: 'text' should be a string, found null; mend the record"):
        check_texts({"a": str(path)}, "--data", 2000, "--tokens", BATCH)
    check_documents(str(path), "--flag a=", documents=300)
    with pytest.raises(InputError, match="a.ndjson.gz:301: "):
        check_documents(str(path), "--flag a=", documents=301)


def test_a_file_without_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.training.get_tokenizer", _Numbers)
    (tmp_path / "a.json").write_text('[{"text": " "}, {"text": "\\n"}]')
    with pytest.raises(InputError, match="a.json: holds 0 tokens, fewer than one batch"):
        check_texts({"a": str(tmp_path / "a.json")}, "--data", 999, "--tokens", BATCH)


def test_what_can_be_read_passes(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n{"text": "b"}\nnot read any more')
    for name in ("a.txt", "a.jsonl"):
        check_documents(str(tmp_path / name), "--flag a=")


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Five documents of 366 tokens."""
    return pico.write_corpus(tmp_path / "text", 5)


def _cut(suffix: str, at: int):
    def damage(prefix: Path) -> None:
        file = Path(f"{prefix}{suffix}")
        file.write_bytes(file.read_bytes()[:at])

    return damage


def _write(content: bytes, at: int = 0):
    def damage(prefix: Path) -> None:
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(at)
            file.write(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_write(b"garbage"), "text.idx is no index of a dataset, or was cut off .bad header"),
        (_cut(".idx", 5), "bad header"),
        (_cut(".idx", 20), "is no index of a dataset, or was cut off"),
        (_cut(".idx", -1), "is no index of a dataset, or was cut off"),
        (_write(bytes(8), at=26), "is no index of a dataset, or was cut off"),
        (_write(b"\x03", at=18), "index 3 sequences that end at .*: one of them was cut off"),
        (_cut(".bin", -2), "text.bin has 730 bytes and its index 5 sequences that end at 732"),
    ],
)
def test_a_damaged_dataset(damage, said, dataset, capfd):
    """One line with flag and remedy, whatever Megatron's reader makes of it; and nothing else is said."""
    damage(dataset)
    with pytest.raises(InputError, match=f"--flag a= .*{said}.*; make it again with tools/preprocess_data.py"):
        check_documents(str(dataset), "--flag a=")
    assert "Traceback" not in capfd.readouterr().err


class _Numbers:
    """As Megatron's NullTokenizer."""

    eod = 9

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


BATCH = Namespace(seq_length=60, micro_batch_size=1, data_parallel_size=2, pipeline_model_parallel_size=3)


@pytest.mark.parametrize(
    ("tokens", "change", "said"),
    [
        (360, {}, None),
        (359, {}, "--tokens 359: fewer than one batch, expected at least 360: --seq-length 60 x .* 1 x 2 .* x 3 "),
        (0, {}, "--tokens 0: fewer than one batch"),
        (-5, {}, "--tokens -5: fewer than one batch"),
        (999, {"seq_length": 61}, "--data a=.*: holds 366 tokens, fewer than one batch .* at least 367"),
        (999, {"micro_batch_size": 2}, "at least 721"),
    ],
)
@pytest.mark.parametrize("kind", ["dataset", "text"])
def test_less_than_a_batch(kind, tokens, change, said, dataset, monkeypatch):
    """Seen before any rank starts: the same batch, and one label, in a dataset and in a text file."""
    path, args = str(dataset), Namespace(**vars(BATCH) | change)
    if kind == "text":
        monkeypatch.setattr("megatron.training.get_tokenizer", _Numbers)
        path += ".jsonl"
        documents = [" ".join(map(str, ids[:-1])) for ids in texts.documents_of(str(dataset))]
        Path(path).write_text("\n".join(json.dumps({"text": document}) for document in documents))
    if said is None:
        check_texts({"a": path}, "--data", tokens, "--tokens", args)
        return
    with pytest.raises(InputError, match=said):
        check_texts({"a": path}, "--data", tokens, "--tokens", args)


def test_a_text_that_the_tokenizer_does_not_take(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.training.get_tokenizer", _Numbers)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(InputError, match="a.txt: the run's tokenizer does not take its text .*'words'"):
        check_texts({"a": str(tmp_path / "a.txt")}, "--data", 999, "--tokens", BATCH)
