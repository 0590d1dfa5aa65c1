"""The table of a tokenizer: what transformers makes of a folder, and what Megatron's own kinds are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.tokenizers.comparison import check_same_tokenizer
from megatron_btx.tokenizers.vocabulary import UnknownVocabularyError, known_vocabulary, read_vocabulary
from tests.support.hugging_face import OLDER

WORDS = [f"word {i} of {i * 7 % 13} letters {chr(97 + i % 26)}" for i in range(400)]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
QWEN = {"tokenizer_class": "Qwen2Tokenizer"}


def sentencepiece_bytes(folder: Path, **settings: object) -> bytes:
    """A SentencePiece model of 90 pieces."""
    import sentencepiece

    settings = {"model_type": "bpe", "vocab_size": 90} | settings
    prefix = folder / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_prefix=str(prefix), minloglevel=2, hard_vocab_limit=False, **settings
    )
    return prefix.with_suffix(".model").read_bytes()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sentencepiece_bytes(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def byte_pairs() -> dict[str, Any]:
    """The content of a byte-level tokenizer.json of 300 tokens, <|endoftext|> among them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=299, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(WORDS, trainer)
    content = json.loads(made.to_str())
    content["model"]["vocab"]["<|endoftext|>"] = 299
    return content


def added(tokens: Mapping[int, str]) -> list[dict[str, Any]]:
    """Added tokens as tokenizer.json lists them."""
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return [{"id": number, "content": token, "special": True, **flags} for number, token in tokens.items()]


def decoder(tokens: Mapping[int, str]) -> dict[str, Any]:
    """The same as tokenizer_config.json has them."""
    entries = [(str(entry.pop("id")), entry) for entry in added(tokens)]
    return {"added_tokens_decoder": dict(entries)}


PIECES = 90
FOLDERS: dict[str, tuple[str, dict[int, str], dict[str, Any], dict[str, Any]]] = {
    # name: base, added tokens in tokenizer.json, tokenizer_config.json, other files
    "added_tokens.json": ("sp", {}, {}, {"added_tokens.json": {"<|a|>": 90, "<|b|>": 91}}),
    "added_tokens.json out of order": ("sp", {}, LLAMA, {"added_tokens.json": {"<|a|>": 91, "<|b|>": 90}}),
    "a decoder beside an older added_tokens.json": (
        "sp", {}, LLAMA | decoder({90: "[PAD]"}), {"added_tokens.json": {"<|a|>": 90}},
    ),
    "a decoder that renames a piece": ("sp", {}, LLAMA | decoder({5: "<|five|>"}), {}),
    "a hole in added_tokens.json": ("sp", {}, LLAMA, {"added_tokens.json": {"<|a|>": 95}}),
    "a named token without a number": ("sp", {}, LLAMA | {"pad_token": "<pad>"}, {}),
    "a map that names an added token": (
        "sp", {}, LLAMA, {"added_tokens.json": {"[PAD]": 90}, "special_tokens_map.json": {"pad_token": "[PAD]"}},
    ),
    "added_tokens.json beside tokenizer.json": ("json", {}, PLAIN, {"added_tokens.json": {"<|a|>": 300}}),
    "two files, one number": ("json", {300: "<|x|>"}, PLAIN, {"added_tokens.json": {"<|a|>": 300}}),
    "a decoder against tokenizer.json": ("json", {300: "<|x|>"}, PLAIN | decoder({300: "<|a|>"}), {}),
    "a decoder with more": ("json", {300: "<|x|>"}, PLAIN | decoder({300: "<|x|>", 301: "<|y|>"}), {}),
    "a pad token of tokenizer_config.json": ("json", {300: "<|x|>"}, PLAIN | {"pad_token": "<pad>"}, {}),
    "a pad token of the map": ("json", {300: "<|x|>"}, PLAIN, {"special_tokens_map.json": {"pad_token": "<pad>"}}),
    "a map that a decoder replaces": (
        "json", {300: "<|x|>"}, PLAIN | decoder({300: "<|x|>"}), {"special_tokens_map.json": {"pad_token": "<pad>"}},
    ),
    "a hole in tokenizer.json": ("json", {304: "<|x|>"}, PLAIN, {}),
    "an added token that is in the model": ("json", {300: "a"}, PLAIN, {}),
    "a number that the model has": ("json", {5: "<|five|>"}, PLAIN, {}),
    "listed tokens and a named one": (
        "json", {}, PLAIN | {"additional_special_tokens": ["<|e|>", "<|g|>"], "eos_token": "<|eos|>"}, {},
    ),
    "vocab.json and added_tokens.json": ("pairs", {}, QWEN, {"added_tokens.json": {"<|a|>": 301, "<|b|>": 300}}),
    "vocab.json and a decoder": ("pairs", {}, QWEN | decoder({300: "<|b|>", 303: "<|c|>"}), {}),
    "tokenizer.json before tokenizer.model": ("json", {300: "<|x|>"}, PLAIN, {"tokenizer.model": None}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pieces: bytes, byte_pairs: dict[str, Any]) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name, (base, in_json, config, files) in FOLDERS.items():
        folder = root / name
        folder.mkdir()
        kind = "qwen2" if base == "pairs" else "llama"
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        if config:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        write_base(folder, base, pieces, byte_pairs | {"added_tokens": added(in_json)})
        for file, content in files.items():
            (folder / file).write_bytes(pieces if content is None else json.dumps(content).encode())
    return root


def write_base(folder: Path, base: str, pieces: bytes, byte_pairs: dict[str, Any]) -> None:
    model = byte_pairs["model"]
    if base == "sp":
        (folder / "tokenizer.model").write_bytes(pieces)
    elif base == "json":
        (folder / "tokenizer.json").write_text(json.dumps(byte_pairs))
    else:
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [" ".join(merge) for merge in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


TABLES_OF_TRANSFORMERS = """
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
import transformers
transformers.utils.logging.set_verbosity_error()
load = transformers.AutoTokenizer.from_pretrained
answer = {folder.name: load(folder).get_vocab() for folder in pathlib.Path(sys.argv[1]).iterdir()}
print(json.dumps({"version": transformers.__version__, "tables": answer}))
"""


@pytest.fixture(scope="module", params=["5", "4"])
def transformers_tables(request: pytest.FixtureRequest, folders: Path) -> dict[str, dict[str, int]]:
    """What AutoTokenizer of one version makes of every folder."""
    if request.param == "4" and not OLDER.is_dir():
        pytest.skip(f"{OLDER} does not exist; bash tools/environment.sh --tests installs it")
    if request.param == "5" and not version("transformers").startswith("5."):
        pytest.skip(f"transformers {version('transformers')} is installed, no version 5")
    path = {"PYTHONPATH": str(OLDER)} if request.param == "4" else {}
    command = [sys.executable, "-c", TABLES_OF_TRANSFORMERS, str(folders)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"].startswith(request.param)
    return answer["tables"]


def test_tables_are_those_of_transformers(transformers_tables, folders):
    """Every folder, contradictions in it included, in both versions; a wrong guess at any of them would show."""
    wrong = {}
    for name, table in transformers_tables.items():
        mine = known_vocabulary({"hf_folder": folders / name}).tokens
        expected = {number: token for token, number in table.items()}
        if mine != expected:
            odd = sorted(set(mine.items()) ^ set(expected.items()))
            wrong[name] = odd[:4]
    assert not wrong and transformers_tables.keys() == FOLDERS.keys()


# --- other kinds ----------------------------------------------------------------------------------------------


def test_word_pieces(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\nthe\n##ing\n")
    (tmp_path / "added_tokens.json").write_text('{"[NEW]": 3}')
    expected = {0: "[PAD]", 1: "the", 2: "##ing", 3: "[NEW]"}
    assert known_vocabulary({"hf_folder": tmp_path}).tokens == expected


def test_sentencepiece_of_megatrons(tmp_path, pieces):
    """Older versions added tokens of their own after the pieces, to one of the three kinds; newer ones do not."""
    (tmp_path / "t.model").write_bytes(pieces)
    stored: dict[str, Any] = {"tokenizer_model": str(tmp_path / "t.model")}
    old = stored | {"vocab_extra_ids": 0}
    for kind, more in (("SentencePieceTokenizer", 5), ("GPTSentencePieceTokenizer", 0), ("Llama2Tokenizer", 0)):
        new = stored | {"tokenizer_type": kind, "vocab_extra_ids": 0, "tokenizer_sentencepiece_legacy": False}
        assert len(known_vocabulary(new).tokens) == PIECES
        assert len(known_vocabulary(old | {"tokenizer_type": kind}).tokens) == PIECES + more
    tokens = known_vocabulary(old | {"tokenizer_type": "SentencePieceTokenizer"}).tokens
    assert [tokens[number] for number in range(90, 95)] == ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"]


def test_gpt2_files_of_megatron(tmp_path, byte_pairs):
    write_base(tmp_path, "pairs", b"", byte_pairs)
    stored = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(tmp_path / "vocab.json")}
    stored |= {"merge_file": str(tmp_path / "merges.txt")}
    tokens = known_vocabulary(stored).tokens
    assert {token: number for number, token in tokens.items()} == byte_pairs["model"]["vocab"]


UNKNOWN = {
    "a pointer": ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}, "git lfs pull"),
    "no tokenizer": ({"tokenizer.json": "{"}, "tokenizer.json cannot be read by the tokenizers library"),
    "no JSON": ({"vocab.json": "{"}, "is not JSON"),
    "half a character": ({"vocab.json": '{"\\ud800": 0}'}, "holds what is no text"),
    "tekken, of which no reader knows": ({"tekken.json": "{}"}, "holds no tokenizer.json"),
    "no JSON in UTF-8": ({"vocab.json": b'{"\xff": 0}'}, "is not JSON"),
    "no text in UTF-8": ({"vocab.txt": b"\xff"}, "no text in UTF-8"),
    "two tokens, one number": ({"vocab.json": '{"a": 0, "b": 0}'}, "token 0 is both 'a' and 'b'"),
    "a hole that is filled": (
        {"vocab.json": '{"a": 0, "c": 2}', "added_tokens.json": '{"<x>": 3}'},
        "token 2 is both '<x>' and 'c'",
    ),
    "a number below zero": ({"vocab.json": '{"a": -1}'}, "-1 is no number"),
    "two models": ({"one.model": "", "two.model": ""}, "several tokenizers"),
    "a decoder of numbers": (
        {"vocab.json": '{"a": 0}', "tokenizer_config.json": '{"added_tokens_decoder": 3}'},
        "no obj",
    ),
}


@pytest.mark.parametrize("case", list(UNKNOWN))
def test_what_cannot_be_known_says_why(case, tmp_path):
    files, reason = UNKNOWN[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_vocabulary({"hf_folder": tmp_path}) is None
    with pytest.raises(UnknownVocabularyError, match=re.escape(reason)):
        known_vocabulary({"hf_folder": tmp_path})


def test_a_hub_name_is_no_file():
    stored = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "meta-llama/Llama-2-7b"}
    with pytest.raises(UnknownVocabularyError, match="meta-llama/Llama-2-7b cannot be found"):
        known_vocabulary(stored)
    with pytest.raises(UnknownVocabularyError, match="no tokenizer comes with it"):
        known_vocabulary({"tokenizer_type": "NullTokenizer", "vocab_size": 7})


# --- comparing ------------------------------------------------------------------------------------------------


def compare(tmp_path: Path, left: Mapping[str, Any], right: Mapping[str, Any], rows: int | None = None) -> None:
    """Two folders with these files, compared as the tokenizers of models with so many rows."""
    sources = {}
    for name, files in (("left", left), ("right", right)):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / name / file).write_bytes(text)
        sources[name] = {"hf_folder": tmp_path / name, "padded_vocab_size": rows}
    check_same_tokenizer(sources, "--remedy")


def test_a_refusal_names_tokens_and_counts(tmp_path):
    """Not hashes: the first numbers that differ, both tokens, how many."""
    left = {f"w{n}": n for n in range(20)}
    right = {f"w{n}" if n < 12 else f"v{n}": n for n in range(19)}
    with pytest.raises(InputError) as refusal:
        compare(tmp_path, {"vocab.json": left}, {"vocab.json": right})
    said = str(refusal.value)
    assert "token 12 is 'w12' in left and 'v12' in right" in said and "8 numbers differ" in said and "--remedy" in said


def test_tokens_without_a_row_are_no_tokens(tmp_path):
    """A pad token beyond the embedding, and what one file has beyond it, contradict nobody."""
    words = {f"w{n}": n for n in range(10)}
    left = {"vocab.json": words, "tokenizer_config.json": {"pad_token": "<pad>"}}
    right = {"vocab.json": words, "added_tokens.json": {"[PAD]": 10, "<more>": 11}}
    compare(tmp_path, left, right, rows=10)


def test_a_pad_token_that_has_a_row_is_a_token(tmp_path):
    words = {f"w{n}": n for n in range(10)}
    left = {"vocab.json": words, "tokenizer_config.json": {"pad_token": "<pad>"}}
    with pytest.raises(InputError, match="token 10 is '<pad>' in left and nobody's in right; 1 number differs"):
        compare(tmp_path, left, {"vocab.json": words}, rows=12)


def test_forms_of_one_tokenizer(tmp_path, byte_pairs):
    """tokenizer.json, its older spelling with other templates, and vocab.json with merges.txt are one tokenizer."""
    newer = {"tokenizer.json": byte_pairs, "tokenizer_config.json": PLAIN}
    model = byte_pairs["model"]
    older = byte_pairs | {"model": model | {"merges": [" ".join(merge) for merge in model["merges"]]}}
    older["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    compare(tmp_path, newer, {"tokenizer.json": older, "chat_template.jinja": {}})
    third = tmp_path / "third"
    third.mkdir()
    write_base(third, "pairs", b"", byte_pairs)
    check_same_tokenizer({"left": {"hf_folder": tmp_path / "left"}, "third": {"hf_folder": third}}, "--remedy")


def changed(byte_pairs: dict[str, Any], part: str) -> dict[str, Any]:
    model = byte_pairs["model"]
    if part == "merges":
        merges = list(model["merges"])
        merges[3], merges[4] = merges[4], merges[3]
        return byte_pairs | {"model": model | {"merges": merges}}
    if part == "normaliser":
        return byte_pairs | {"normalizer": {"type": "Lowercase"}}
    return byte_pairs | {"pre_tokenizer": {"type": "Whitespace"}}


@pytest.mark.parametrize("part", ["merges", "normaliser", "first cut into words"])
def test_one_table_that_cuts_otherwise(part, tmp_path, byte_pairs):
    """The same tokens, and other ids for a text."""
    other = changed(byte_pairs, part)
    with pytest.raises(InputError, match=f"have the same tokens and cut texts in other ways, because of their {part}"):
        compare(tmp_path, {"tokenizer.json": byte_pairs}, {"tokenizer.json": other})


def test_merges_beside_vocabularies(tmp_path, byte_pairs):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, content in (("a", byte_pairs), ("b", changed(byte_pairs, "merges"))):
        write_base(tmp_path / name, "pairs", b"", content)
    sources = {name: {"hf_folder": tmp_path / name} for name in "ab"}
    with pytest.raises(InputError, match="because of their merges .number 3 is"):
        check_same_tokenizer(sources, "--remedy")


def test_sentencepiece_models_of_one_table(tmp_path, pieces):
    """Trained twice: other bytes, one tokenizer. With another normaliser: another one."""
    from sentencepiece import sentencepiece_model_pb2

    again = sentencepiece_model_pb2.ModelProto()
    again.ParseFromString(pieces)
    again.trainer_spec.model_prefix = "elsewhere"
    compare(tmp_path, {"tokenizer.model": pieces}, {"tokenizer.model": again.SerializeToString()})
    again.normalizer_spec.add_dummy_prefix = False
    (tmp_path / "right" / "tokenizer.model").write_bytes(again.SerializeToString())
    sources = {name: {"hf_folder": tmp_path / name} for name in ("left", "right")}
    with pytest.raises(InputError, match="SentencePiece dummy prefix"):
        check_same_tokenizer(sources, "--remedy")


def test_scores_decide_ids(tmp_path):
    """Unigram: the likeliest cut."""
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["aa", -3.0]]}
    other = unigram | {"vocab": [["<unk>", 0.0], ["a", -2.0], ["aa", -1.0]]}
    with pytest.raises(InputError, match="their scores .number 1 is -1.0 and -2.0"):
        compare(tmp_path, {"tokenizer.json": {"model": unigram}}, {"tokenizer.json": {"model": other}})


def test_unigram_models_in_both_forms(tmp_path):
    """tokenizer.json made from a SentencePiece file: the same scores; those of special pieces do not matter."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_bytes(tmp_path, model_type="unigram", vocab_size=60)
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    vocab = [[piece.piece, piece.score if number > 2 else 7.0] for number, piece in enumerate(proto.pieces)]
    form = {"tokenizer.json": {"model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}}}
    compare(tmp_path, {"tokenizer.model": content}, form)
    vocab[9][1] -= 1.0
    (tmp_path / "right" / "tokenizer.json").write_text(json.dumps(form["tokenizer.json"]))
    sources = {name: {"hf_folder": tmp_path / name} for name in ("left", "right")}
    with pytest.raises(InputError, match="their scores .number 9 is"):
        check_same_tokenizer(sources, "--remedy")


@pytest.mark.parametrize("merges", [3, [3], [[]], ["a"], [["a", "b", "c"]], [["a", "b"]], None])
def test_merges_of_nonsense(merges, tmp_path):
    """Whatever stands there: equal to itself, another tokenizer than any other, and never a traceback."""
    vocab = {"a": 0, "b": 1}
    left = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    right = {"model": {"type": "BPE", "vocab": vocab, "merges": []}}
    with pytest.raises(InputError, match="left: .* cannot be read by the tokenizers library"):
        compare(tmp_path, {"tokenizer.json": left}, {"tokenizer.json": right})
    (tmp_path / "right" / "tokenizer.json").write_text(json.dumps(left))
    check_same_tokenizer({name: {"hf_folder": tmp_path / name} for name in ("left", "right")}, "--remedy")


def test_equal_pointers_are_no_tokenizer(tmp_path):
    """Two folders whose tokenizer was never fetched: equal bytes, and nothing known."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"
    with pytest.raises(InputError, match="left: .*tokenizer.json is a pointer of Git LFS .*git lfs pull"):
        compare(tmp_path, {"tokenizer.json": pointer}, {"tokenizer.json": pointer})
