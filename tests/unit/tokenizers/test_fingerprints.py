"""Fingerprints that stand in the descriptions of existing datasets: they are never made otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.data.description import Tokenizer

LETTERS = {token: number for number, token in enumerate([*"abcdefgh", "ab", "bc", "abc"])}
PAIRS = {"type": "BPE", "vocab": LETTERS, "merges": [["a", "b"], ["b", "c"], ["ab", "c"]]}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("\u2581a", -1.5, 1),
    ("b", -2.25, 1),
    ("\u2581", -3.1, 1),
    ("a", -4.7, 1),
]
FORMS: dict[str, dict[str, Any]] = {
    "byte-level, as it was written first": {
        "model": PAIRS | {"merges": ["a b", "b c", "ab c"], "dropout": None, "unk_token": None},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    },
    "byte-level, as it is written now": {
        "model": PAIRS | {"ignore_merges": True, "byte_fallback": False, "fuse_unk": False},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\s+|\\d"}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "normalizer": {"type": "NFC"},
        "added_tokens": [{"id": 11, "content": "<x>", **FLAGS}],
    },
    "bytes as a normaliser": {
        "model": PAIRS | {"dropout": 0.1, "fuse_unk": True, "unk_token": "h", "end_of_word_suffix": ""},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "ByteLevel"}]},
    },
    "unigram of old": {
        "model": {"type": "Unigram", "unk_id": 1, "vocab": [["a", -0.1], ["b", -2.123456789], ["c", 0.0]]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "add_prefix_space": True, "str_rep": "\u2581"},
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    },
    "unigram of now": {
        "model": {"type": "Unigram", "unk_id": 1, "vocab": [["a", -0.1], ["b", -2.5]], "byte_fallback": True},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
    },
    "word pieces": {
        "model": {
            "type": "WordPiece",
            "unk_token": "a",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 50,
            "vocab": {"a": 0, "##b": 1},
        },
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    },
}

EXISTING: dict[str, list[Any]] = {
    "byte-level, as it was written first": [
        "b8d8f71fdcc7c5dd",
        {
            "kind": "391745ebba2a5331",
            "model settings": "44136fa355b3678a",
            "merges": "b6d142d2c3b7d3af",
            "normaliser": "74234e98afe7498f",
            "first cut into words": "baad9354616c54e2",
        },
    ],
    "byte-level, as it is written now": [
        "98d0e3e637f270c9",
        {
            "kind": "391745ebba2a5331",
            "model settings": "a06ec714528be4d7",
            "merges": "b6d142d2c3b7d3af",
            "normaliser": "d9903ccf2534b316",
            "first cut into words": "a586c1cd48695e62",
        },
    ],
    "bytes as a normaliser": [
        "b8d8f71fdcc7c5dd",
        {
            "kind": "391745ebba2a5331",
            "model settings": "c6c5e3a662ee30f4",
            "merges": "b6d142d2c3b7d3af",
            "normaliser": "ad8f803ca9f0a38d",
            "first cut into words": "74234e98afe7498f",
        },
    ],
    "unigram of old": [
        "eaad3d4665305328",
        {
            "kind": "65f3171618f25661",
            "model settings": "9133bb4f32ebbcac",
            "normaliser": "c2b4399864a6cad8",
            "first cut into words": "c24311ebac2f4220",
            "scores in tokenizer.json": "186fcda8cd03b0b5",
        },
    ],
    "unigram of now": [
        "a010d841c0f55ced",
        {
            "kind": "65f3171618f25661",
            "model settings": "17b3e27fbf060572",
            "normaliser": "74234e98afe7498f",
            "first cut into words": "318f83582e66c72d",
            "scores in tokenizer.json": "1fe3ee66cbd7a2b7",
        },
    ],
    "word pieces": [
        "6ceaec44565d2fe8",
        {
            "kind": "3339defc5f4b0249",
            "model settings": "7388c8030a49ed6a",
            "normaliser": "9ff45928e105eb39",
            "first cut into words": "1e02db982a837c7a",
        },
    ],
    "two files": ["b8d8f71fdcc7c5dd", {"merges": "b6d142d2c3b7d3af"}],
    "SentencePiece unigram": [
        "f3b98a2a00311425",
        {
            "kind": "65f3171618f25661",
            "scores": "69b4801d8d8f9c6b",
            "SentencePiece normaliser": "3c4d68950813fd5b",
            "SentencePiece dummy prefix": "b5bea41b6c623f7c",
            "SentencePiece removal of blanks": "b5bea41b6c623f7c",
            "SentencePiece escaping of blanks": "b5bea41b6c623f7c",
        },
    ],
    "SentencePiece byte pairs": [
        "f3b98a2a00311425",
        {
            "kind": "391745ebba2a5331",
            "order of pieces": "b0229c06acf4d5c9",
            "SentencePiece normaliser": "3c4d68950813fd5b",
            "SentencePiece dummy prefix": "b5bea41b6c623f7c",
            "SentencePiece removal of blanks": "b5bea41b6c623f7c",
            "SentencePiece escaping of blanks": "b5bea41b6c623f7c",
        },
    ],
}
"""What these tokenizers' descriptions have said since there are descriptions."""


def merges_beside(folder: Path) -> dict[str, Any]:
    (folder / "vocab.json").write_text(json.dumps(LETTERS))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nb c\nab c\n")
    return {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}


def model_file(folder: Path, kind: int) -> dict[str, Any]:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = kind
    for piece, score, type_ in PIECES:
        proto.pieces.add(piece=piece, score=score, type=type_)
    (folder / "t.model").write_bytes(proto.SerializeToString())
    return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(folder / "t.model")}


def described(name: str, folder: Path) -> list[Any]:
    """Table and rules of a tokenizer."""
    if name in FORMS:
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", **FORMS[name]}))
        arguments = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}
    elif name == "two files":
        arguments = merges_beside(folder)
    else:
        arguments = model_file(folder, {"SentencePiece unigram": 1, "SentencePiece byte pairs": 2}[name])
    tokenizer = Tokenizer.of(arguments, None)
    return [tokenizer.table(20), tokenizer.rules()]


@pytest.mark.parametrize("name", [*FORMS, "two files", "SentencePiece unigram", "SentencePiece byte pairs"])
def test_fingerprints_of_existing_datasets(name, tmp_path):
    """More rules than a description has are no difference; each that it has must be told, and be equal."""
    table, rules = EXISTING[name]
    found_table, found_rules = described(name, tmp_path)
    assert found_table == table
    assert {rule: found_rules.get(rule) for rule in rules} == rules
