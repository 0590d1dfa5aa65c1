"""What a dataset says of its tokenizer, and which runs it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.data import preprocess
from megatron_btx.data.description import SUFFIX, Tokenizer, check_description, read_description
from megatron_btx.data.inputs import expand_inputs
from megatron_btx.data.tokenizers import TokenizerSettings
from megatron_btx.tokenizers.sentencepiece import convert

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
SIZE = 34


def train(file: Path, words: list[str], kind: str) -> Path:
    """A SentencePiece model of SIZE pieces."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(16)]),
        model_prefix=str(file.with_suffix("")),
        model_type=kind,
        vocab_size=SIZE,
        minloglevel=2,
    )
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SentencePiece models, and a dataset made with the first."""
    folder = tmp_path_factory.mktemp("described")
    for name, words in (("first", WORDS), ("second", [word[::-1] for word in WORDS])):
        train(folder / f"{name}.model", words, "unigram")
    tokenize(folder / "first.model", folder)
    return folder


def tokenize(model: Path, folder: Path) -> str:
    """The prefix of a dataset made with a model, beside another of a second key."""
    texts = [{"text": " ".join(WORDS[i:]), "other": WORDS[i]} for i in range(12)]
    file = folder / "in.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    settings, keys = TokenizerSettings("SentencePieceTokenizer", str(model)), ["text", "other"]
    preprocess.preprocess([str(file)], str(folder / "t"), settings, json_keys=keys, append_eod=True, quiet=True)
    return str(folder / "t_text_document")


def sentencepiece(model: Path) -> Tokenizer:
    return Tokenizer.of({"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)}, None)


def null(size: int) -> Tokenizer:
    return Tokenizer.of({"tokenizer_type": "NullTokenizer", "vocab_size": size}, None)


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A dataset of the NullTokenizer of 5001 tokens, numbers up to 4977 and the end of documents."""
    (tmp_path / "n.jsonl").write_text("".join(json.dumps({"text": str(i * 79)}) + "\n" for i in range(64)))
    settings = TokenizerSettings("NullTokenizer", vocab_size=5001)
    preprocess.preprocess([str(tmp_path / "n.jsonl")], str(tmp_path / "n"), settings, quiet=True)
    return str(tmp_path / "n_text_document")


def test_it_says_what_the_dataset_holds(folder):
    """Counted from the ids that were written; one for each key."""
    for key in ("text", "other"):
        prefix = str(folder / f"t_{key}_document")
        said = read_description(prefix, "--data-path")
        ids = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
        assert said is not None
        assert (said.sequences, said.tokens, said.largest_id) == (12, len(ids), ids.max())
        assert (said.tokenizer_type, said.vocabulary_size) == ("SentencePieceTokenizer", SIZE)
        assert said.tokenizer_model == "first.model"
    assert not [file.name for file in expand_inputs([str(folder)]).files if file.name.endswith(SUFFIX)]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_tokenizer_in_any_form_passes(kind, tmp_path):
    """A copy under another name, and the tokenizer.json that stands for the model in Hugging Face's libraries."""
    model = train(tmp_path / "own.model", WORDS, kind)
    prefix = tokenize(model, tmp_path)
    copy = tmp_path / "renamed.model"
    copy.write_bytes(model.read_bytes())
    other = tmp_path / "other"
    other.mkdir()
    convert(model.read_bytes()).tokenizer.save(str(other / "tokenizer.json"))
    as_json = Tokenizer.of({"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(other)}, None)
    said = read_description(prefix, "--data-path")
    assert said is not None and said.table == as_json.table(said.largest_id)
    shared = as_json.rules().keys() & said.rules.keys()
    assert shared == {"kind"}
    for tokenizer in (sentencepiece(copy), as_json):
        check_description(prefix, "--data-path", tokenizer, 384, allowed=False)


def test_added_tokens_that_the_dataset_does_not_use_pass(folder, tmp_path):
    """Its numbers mean the same."""
    import dataclasses

    own = sentencepiece(folder / "first.model")
    assert own.vocabulary is not None
    more = dataclasses.replace(own.vocabulary, tokens={**own.vocabulary.tokens, SIZE: "<pad>"})
    tokenizer = dataclasses.replace(own, vocabulary=more, size=SIZE + 1)
    check_description(str(folder / "t_text_document"), "--data-path", tokenizer, 384, allowed=False)


def test_another_tokenizer_is_refused_by_name(folder):
    """Both are named, and the word that lets it pass."""
    prefix = str(folder / "t_text_document")
    for other in (sentencepiece(folder / "second.model"), null(SIZE)):
        with pytest.raises(InputError) as refusal:
            check_description(prefix, "--data-path", other, 384, allowed=False)
        for part in (f"--data-path {prefix}:", " first.model ", "--btx-allow-change dataset_tokenizer"):
            assert part in str(refusal.value)
        check_description(prefix, "--data-path", other, 384, allowed=True)
    with pytest.raises(InputError, match="second.model of 34 tokens: some of the tokens 0 to"):
        check_description(prefix, "--data-path", sentencepiece(folder / "second.model"), 384, allowed=False)


def test_other_rules_for_the_same_table_are_refused(folder, tmp_path):
    """Texts are cut into other tokens."""
    from sentencepiece import sentencepiece_model_pb2

    model = vars(sentencepiece_model_pb2)["ModelProto"]()
    model.ParseFromString((folder / "first.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = not model.normalizer_spec.add_dummy_prefix
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"cut texts in other ways \(SentencePiece dummy prefix\)"):
        check_description(
            str(folder / "t_text_document"), "--data-path", sentencepiece(tmp_path / "other.model"), 384, False
        )


@pytest.mark.parametrize("allowed", [False, True])
def test_ids_beyond_the_vocabulary_are_refused(allowed, numbers):
    """Whatever is allowed: there is no row for them. Rows of padding are rows, and belong to no token."""
    with pytest.raises(InputError, match="token ids up to 4977, and the vocabulary of this run ends at (95|127)"):
        check_description(numbers, "--train-data-path", null(96), 128, allowed)
    if allowed:
        check_description(numbers, "--train-data-path", null(96), 5120, allowed)
    else:
        with pytest.raises(InputError, match="ends at 95 "):
            check_description(numbers, "--train-data-path", null(96), 5120, allowed)
        with pytest.raises(InputError, match="other numbers of tokens"):
            check_description(numbers, "--train-data-path", null(5002), 5120, allowed)
    check_description(numbers, "--train-data-path", null(5001), 5120, allowed)


def _rewritten(file: Path) -> None:
    Path(str(file).replace(SUFFIX, ".bin")).write_bytes(b"0" * 7)


def _cut(file: Path) -> None:
    file.write_text(file.read_text()[:40])


def _newer(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))


def _deep(file: Path) -> None:
    file.write_text("[" * 100_000)


def _other(file: Path) -> None:
    file.write_text(json.dumps({"format": 1, "sequences": 2}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_rewritten, "describes another dataset, .* found 7 and"),
        (_cut, "is no description of a dataset"),
        (_newer, "has the format 2, expected 1"),
        (_other, "is no description of a dataset"),
        (_deep, "is no description of a dataset"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(damage, said, numbers):
    """Never believed, never passed over: one line with what to do."""
    damage(Path(numbers + SUFFIX))
    with pytest.raises(InputError, match=f"--data-path {numbers}: .*{said}.*or remove n_text_document{SUFFIX}"):
        check_description(numbers, "--data-path", null(5001), 5120, allowed=False)


def test_a_dataset_without_a_description_passes(numbers):
    """It was made by other means; its batches are looked at as they come."""
    Path(numbers + SUFFIX).unlink()
    check_description(numbers, "--data-path", null(96), 128, allowed=False)
