"""Two tokenizers with tokens in common: whether they cut texts alike, as far as their files tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.tokenizers.comparison import check_same_tokenizer, check_vocabulary_union
from tests.unit.tokenizers.test_vocabulary import sentencepiece_bytes

MODEL: dict[str, Any] = {
    "type": "BPE",
    "vocab": {token: number for number, token in enumerate([*"abcdefgh", "ab", "bc", "abc"])},
    "merges": [["a", "b"], ["b", "c"], ["ab", "c"]],
}
SWAPPED = [["b", "c"], ["a", "b"], ["ab", "c"]]
CHANGES: dict[str, dict[str, Any]] = {
    "merges": {"merges": SWAPPED},
    "model settings": {"ignore_merges": True},
}


def folder(place: Path, model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json as stored arguments name it."""
    place.mkdir()
    (place / "tokenizer.json").write_text(json.dumps({"model": model, **parts}))
    return {"hf_folder": place}


def larger(**changes: Any) -> dict[str, Any]:
    """The model with one token more, and its merge in the first place."""
    model = MODEL | changes
    return model | {"vocab": MODEL["vocab"] | {"cd": 11}, "merges": [["c", "d"], *model["merges"]]}


@pytest.mark.parametrize("part", ["merges", "normaliser", "first cut into words", "model settings"])
def test_a_larger_table_that_cuts_otherwise(part, tmp_path):
    """One token more changes nothing of the others: its merge is left out, and all else must be equal."""
    parts = {"normaliser": {"normalizer": {"type": "Lowercase"}}}
    parts["first cut into words"] = {"pre_tokenizer": {"type": "Whitespace"}}
    sources = {
        "a": folder(tmp_path / "a", MODEL),
        "b": folder(tmp_path / "b", larger()),
        "c": folder(tmp_path / "c", larger(**CHANGES.get(part, {})), **parts.get(part, {})),
    }
    check_vocabulary_union({name: sources[name] for name in "ab"}, "--remedy")
    for names in ("ac", "ca", "abc"):
        with pytest.raises(InputError, match=f"tokens in common and cut texts in other ways, because of their {part}"):
            check_vocabulary_union({name: sources[name] for name in names}, "--remedy")


def test_larger_sentencepiece_models(tmp_path):
    """Scores and order of the pieces that both have."""
    from sentencepiece import sentencepiece_model_pb2

    for kind, said in (("unigram", "their scores"), ("bpe", "their order of pieces")):
        content = sentencepiece_bytes(tmp_path, model_type=kind, vocab_size=60)
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)
        proto.pieces.add(piece="word7", score=-0.5)
        sources = {}
        for name, model in (("small", content), ("large", proto.SerializeToString())):
            (tmp_path / f"{kind}-{name}.model").write_bytes(model)
            sources[name] = {"tokenizer_model": str(tmp_path / f"{kind}-{name}.model")}
        check_vocabulary_union(sources, "--remedy")
        proto.pieces[20].score, proto.pieces[40].score = proto.pieces[40].score, proto.pieces[20].score
        (tmp_path / f"{kind}-large.model").write_bytes(proto.SerializeToString())
        with pytest.raises(InputError, match=f"tokens in common .* {said}"):
            check_vocabulary_union(sources, "--remedy")


def test_two_that_differ_behind_one_that_tells_nothing(tmp_path):
    """Without merges.txt the first is like either; the others are not like one another."""
    sources = {"b": folder(tmp_path / "b", MODEL), "c": folder(tmp_path / "c", MODEL | {"merges": SWAPPED})}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "vocab.json").write_text(json.dumps(MODEL["vocab"]))
    sources = {"a": {"hf_folder": tmp_path / "a"}, **sources}
    check_same_tokenizer({name: sources[name] for name in "ac"}, "--remedy")
    with pytest.raises(InputError, match="b and c have the same tokens and cut texts in other ways"):
        check_same_tokenizer(sources, "--remedy")


@pytest.mark.parametrize(
    "change",
    [
        {"byte_fallback": True},
        {"ignore_merges": True},
        {"unk_token": "h"},
        {"fuse_unk": True},
        {"end_of_word_suffix": "</w>"},
        {"continuing_subword_prefix": "##"},
        {"dropout": 0.1},
    ],
)
def test_settings_of_the_model_decide_ids(change, tmp_path):
    """What a writer leaves out is what the library takes in its place."""
    empty = {"byte_fallback": False, "unk_token": None, "continuing_subword_prefix": "", "dropout": None}
    model = MODEL | {"merges": []}
    sources = {"a": folder(tmp_path / "a", model), "b": folder(tmp_path / "b", model | empty)}
    check_same_tokenizer(sources, "--remedy")
    sources["b"] = folder(tmp_path / "c", model | change)
    with pytest.raises(InputError, match="because of their model settings"):
        check_same_tokenizer(sources, "--remedy")


def test_word_pieces_of_other_lengths(tmp_path):
    words = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1, "##b": 2}}
    words |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    sources = {"a": folder(tmp_path / "a", words), "b": folder(tmp_path / "b", words)}
    check_same_tokenizer(sources, "--remedy")
    sources["b"] = folder(tmp_path / "c", words | {"max_input_chars_per_word": 3})
    with pytest.raises(InputError, match="because of their model settings .*max_input_chars_per_word"):
        check_same_tokenizer(sources, "--remedy")
