"""Tokenizers that put tokens of their own around a text: empty stays empty, nothing is doubled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.data import preprocess, tokenizers
from megatron_btx.data.tokenizers import DocumentEncoder, TokenizerSettings

BOS, EOS, A, B, UNKNOWN = range(5)
WORDS = {"<s>": BOS, "</s>": EOS, "a": A, "b": B, "?": UNKNOWN}


def save(folder: Path, template: str | None, words: dict[str, int] = WORDS, unknown: str = "?") -> str:
    """A Hugging Face tokenizer of three words with a template around them."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if template:
        special = [("<s>", BOS), ("</s>", EOS)]
        pair = f"{template} {template.replace('A', 'B')}"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=special)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    whole.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("eod", [EOS, None])
@pytest.mark.parametrize(
    ("template", "before", "after"),
    [(None, [], []), ("<s> $A", [BOS], []), ("$A </s>", [], [EOS]), ("<s> $A </s>", [BOS], [EOS])],
)
def test_documents(template: str | None, before: list[int], after: list[int], eod: int | None, tmp_path: Path) -> None:
    settings = TokenizerSettings("HuggingFaceTokenizer", save(tmp_path / "t", template))
    encoder = DocumentEncoder.of(tokenizers.load(settings), eod)
    end = after or ([] if eod is None else [eod])
    assert encoder.ids("a b") == [*before, A, B, *end]
    assert [encoder.ids(text) for text in ("", "  ", "\n")] == [[], [], []]
    if before:
        assert encoder.ids("<s> a") == [BOS, A, *end]
        assert encoder.ids("<s>") == []
    if end:
        assert encoder.ids("a </s>") == [*before, A, *end]
        assert encoder.ids("a </s> b") == [*before, A, EOS, B, *end]


def test_megatrons_flag_leaves_them_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "t", "<s> $A </s>")
    settings = TokenizerSettings("HuggingFaceTokenizer", folder, tokenizer_hf_no_include_special_tokens=True)
    encoder = DocumentEncoder.of(tokenizers.load(settings), None)
    assert (encoder.ids("a b"), encoder.ids("")) == ([A, B], [])


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_datasets_and_texts_that_are_measured_agree(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_btx.data.texts import documents_of

    path = tmp_path / "a.jsonl"
    texts = ("a", "", "a b", " ", "<s> b </s>")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = TokenizerSettings("HuggingFaceTokenizer", save(tmp_path / "t", template))
    summary = preprocess.preprocess([str(path)], str(tmp_path / "o"), settings, append_eod=True)
    assert (summary.documents, summary.empty_documents) == (3, 2)
    dataset = IndexedDataset(summary.prefixes[0])
    written = [dataset[number].tolist() for number in range(len(dataset))]
    assert written == [[BOS, A, EOS], [BOS, A, B, EOS], [BOS, B, EOS]]
    monkeypatch.setattr("megatron.training.get_tokenizer", lambda: tokenizers.load(settings))
    assert [ids.tolist() for ids in documents_of(str(path))] == written


def test_a_text_that_the_tokenizer_does_not_take(tmp_path: Path) -> None:
    """Hugging Face's library raises a bare Exception; Megatron tries "x y" as it loads a tokenizer."""
    (tmp_path / "a.txt").write_text("a c")
    for words, said in (
        (WORDS, "--tokenizer-model .*: not a readable HuggingFaceTokenizer: WordLevel error: Missing"),
        (WORDS | {"x": 5, "y": 6}, "a.txt: 'text' cannot be tokenized: WordLevel error: Missing"),
    ):
        settings = TokenizerSettings("HuggingFaceTokenizer", save(tmp_path / "t", "<s> $A", words, "none"))
        with pytest.raises(InputError, match=said):
            preprocess.preprocess([str(tmp_path / "a.txt")], str(tmp_path / "o"), settings)


def test_an_empty_text_of_numbers_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "5"}\n{"text": ""}\n')
    settings = TokenizerSettings("NullTokenizer", vocab_size=9)
    summary = preprocess.preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "o"), settings, append_eod=True)
    assert (summary.documents, summary.empty_documents, summary.tokens) == (1, 1, 2)


def test_numbers_with_holes(tmp_path: Path) -> None:
    """A vocabulary is as large as its highest number plus one, for datasets and for the rows of a model."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from megatron_btx.engine.repairs import count_numbers_of_tokenizers

    words = {"?": 0, "a": 1, "b": 2, "<s>": 5, "</s>": 200}
    settings = TokenizerSettings("HuggingFaceTokenizer", save(tmp_path / "t", None, words))
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n')
    flags = ["--input", tmp_path / "t.jsonl", "--output-prefix", tmp_path / "o", "--append-eod"]
    kind = ["--tokenizer-type", settings.tokenizer_type, "--tokenizer-model", settings.tokenizer_model]
    assert preprocess.main([str(word) for word in (*flags, *kind)]) == 0
    assert (tmp_path / "o_text_document.bin").read_bytes() == b"\1\0\2\0\xc8\0"
    description = json.loads((tmp_path / "o_text_document.dataset.json").read_text())
    assert (description["vocabulary_size"], description["largest_id"]) == (201, 200)
    count_numbers_of_tokenizers()
    assert build_tokenizer(tokenizers._namespace(settings)).vocab_size == tokenizers.load(settings).vocab_size == 201


@pytest.mark.parametrize("dropout", [0.2, 1e-6, 0.0, None])
def test_a_tokenizer_that_cuts_at_random(dropout: float | None, tmp_path: Path) -> None:
    """Refused where datasets are made and where texts are measured; a setting without effect is none."""
    import transformers
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from tokenizers import Tokenizer, models

    model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = dropout
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = TokenizerSettings("HuggingFaceTokenizer", str(tmp_path))
    for tokenizer in (tokenizers.load(settings), build_tokenizer(tokenizers._namespace(settings))):
        if not dropout:
            assert DocumentEncoder.of(tokenizer, None).ids("ab") == [2]
            continue
        said = f"{tmp_path}: cuts texts at random \\(dropout .*; set dropout to null in its tokenizer.json"
        with pytest.raises(InputError, match=said):
            DocumentEncoder.of(tokenizer, None)


def test_pieces_that_are_sampled() -> None:
    """The setting that transformers keeps of SentencePiece."""

    class Sampled:
        name_or_path, sp_model_kwargs = "there", {"enable_sampling": True, "alpha": 0.1}

    tokenizer = tokenizers.NumberTokenizer(9)
    tokenizer.tokenizer = Sampled()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="there: cuts texts at random \\(enable_sampling 1\\)"):
        DocumentEncoder.of(tokenizer, None)
