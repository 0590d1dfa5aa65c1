"""A SentencePiece model as tokenizer.json: the ids of the sentencepiece library for every kind of model and text."""

from __future__ import annotations

import io
import itertools
import random
import unicodedata
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.tokenizers.sentencepiece import convert, read_model
from megatron_btx.tokenizers.texts import texts
from megatron_btx.tokenizers.verify import Reference

WORDS = [f"word {i} of {i * 7 % 13} letters {chr(97 + i % 26)} Hello World don't the one two" for i in range(200)]
KINDS = ("bpe", "unigram")
RULES = ("identity", "nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf")
OWN: tuple[tuple[str, ...], ...] = ((), ("\n",), ("\n", "<tool>"))
Settings = dict[str, Any]


def trained(**settings: object) -> bytes:
    """A SentencePiece model of some hundred pieces."""
    import sentencepiece

    made = io.BytesIO()
    given = {"model_type": "bpe", "vocab_size": 600} | settings
    lines = [line for line in [*WORDS, *texts([])] if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, minloglevel=2, hard_vocab_limit=False, **given
    )
    return made.getvalue()


def different(content: bytes, tried: list[str]) -> list[tuple[str, list[int], list[int]]]:
    """The texts that get other ids than SentencePiece gives; equally probable ways of Unigram are one."""
    import sentencepiece

    model, made = sentencepiece.SentencePieceProcessor(model_proto=content), convert(content).tokenizer
    proto = read_model(content)
    scored = [(piece.piece, piece.score) for piece in proto.pieces] if proto.trainer_spec.model_type == 1 else []
    reference = Reference("sentencepiece", lambda texts, _whole: model.encode(texts), scored)
    found = []
    for text in tried:
        expected, ids = model.encode(text), made.encode(text, add_special_tokens=False).ids
        if expected != ids and not reference.ties(expected, ids):
            found.append((text, expected, ids))
    return found


def settings_of(kind: str, rule: str, own: tuple[str, ...], number: int) -> Settings:
    """The other three switches go through their eight states along the cases."""
    return {
        "model_type": kind,
        "normalization_rule_name": rule,
        "user_defined_symbols": list(own),
        "byte_fallback": bool(number & 1),
        "add_dummy_prefix": bool(number & 2),
        "remove_extra_whitespaces": bool(number & 4),
    }


CASES = [settings_of(*case, number * 3) for number, case in enumerate(itertools.product(KINDS, RULES, OWN))]
CASES += [settings_of("bpe", "identity", OWN[2], number) for number in range(8)]


def name(settings: Settings) -> str:
    flags = ("byte_fallback", "add_dummy_prefix", "remove_extra_whitespaces")
    own = len(settings["user_defined_symbols"])
    said = [settings["model_type"], settings["normalization_rule_name"], f"{own}-own"]
    return "-".join([*said, *(flag for flag in flags if settings[flag])])


@pytest.mark.parametrize("settings", CASES, ids=name)
def test_the_same_ids(settings):
    """Of every text, also those that hold special tokens, bytes and the user's own pieces."""
    content = trained(**settings)
    own = settings["user_defined_symbols"]
    assert convert(content).inexpressible == ()
    assert different(content, texts(["<s>", "</s>", "<unk>", "<0x0A>", *own])) == []


@pytest.mark.parametrize("rule", RULES[1:])
def test_letters_of_all_scripts_are_normalised_alike(rule):
    """Composed and decomposed, Hangul, half-width: a map of characters has no letter of which the marks get lost."""
    content = trained(normalization_rule_name=rule, byte_fallback=True)
    letters = [chr(code) for code in range(0xA0, 0x2000, 3) if chr(code).isprintable()]
    tried = [unicodedata.normalize("NFD", letter) for letter in letters] + letters
    tried += [unicodedata.normalize("NFD", chr(code)) for code in range(0xAC00, 0xD7A3, 211)]
    tried += [chr(code) + mark for code in range(0xFF66, 0xFF9E) for mark in "\uff9e\uff9f"]
    assert different(content, tried) == []


def test_random_texts():
    """Letters, blanks, marks and pieces in any order."""
    content = trained(byte_fallback=True, user_defined_symbols=["\n", "<tool>"])
    draw = random.Random(3)
    parts = [
        "a",
        "wor",
        "d",
        " ",
        "  ",
        "\n",
        "<tool>",
        "<s>",
        "\t",
        "e\u0301",
        "\u2581",
        "1",
        "\U0001f600",
        ".",
        "\r\n",
    ]
    tried = ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(400)]
    assert different(content, tried) == []


def test_texts_come_back():
    """Decoding gives the text, its leading blank too."""
    tried = ["a b", "one  two\n", "\U0001f600 x"]
    for prefix in (True, False):
        made = convert(trained(byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
                               normalization_rule_name="identity"))  # fmt: skip
        assert [made.tokenizer.decode(made.tokenizer.encode(text).ids) for text in tried] == tried
        assert made.dummy_prefix is prefix


def test_special_tokens_have_their_names():
    """Numbers of -1 stand for none."""
    assert convert(trained()).named == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    other = trained(pad_id=3, pad_piece="[PAD]", bos_id=-1, eos_piece="<end>")
    assert convert(other).named == {"unk_token": "<unk>", "eos_token": "<end>", "pad_token": "[PAD]"}


def test_added_tokens_are_found_first():
    """Those that earlier versions of Megatron put after the pieces."""
    content = trained(byte_fallback=True)
    made = convert(content, ["<CLS>", "<EOD>"])
    size = len(read_model(content).pieces)
    assert made.tokenizer.encode("<EOD><CLS>", add_special_tokens=False).ids == [size + 1, size]


def test_what_cannot_be_said_is_told():
    assert "it writes blanks after words" in convert(trained(treat_whitespace_as_suffix=True)).inexpressible
    model = read_model(trained())
    model.pieces[-1].type = 5
    assert "it has unused pieces" in convert(model.SerializeToString()).inexpressible
    model = read_model(trained())
    model.pieces.add(piece="\u4e00\u4e01", score=-9999.0, type=1)
    assert any("is part of pieces and no piece itself" in r for r in convert(model.SerializeToString()).inexpressible)
    with pytest.raises(InputError, match="words or characters"):
        convert(trained(model_type="char"))
    with pytest.raises(InputError, match="no SentencePiece model"):
        convert(b"version https://git-lfs")
