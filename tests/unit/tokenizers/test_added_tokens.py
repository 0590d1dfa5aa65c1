"""Added tokens of a tokenizer.json: numbered as the tokenizers library does, whatever numbers the file says."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_btx.tokenizers.vocabulary import known_vocabulary
from megatron_btx.tokenizers.written_files import (
    drop_rowless_tokens,
    has_written_form,
    number_of_token,
    renumber_added_tokens,
    special_ids,
)

FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False) | {"special": True}
MODEL = {"type": "WordLevel", "unk_token": "a", "vocab": {token: number for number, token in enumerate("abcdefgh")}}
LISTS = {
    "out of order": [(9, "<x>"), (8, "<y>")],
    "gaps": [(15, "<x>"), (13, "<y>")],
    "one number twice": [(8, "<x>"), (8, "<y>")],
    "one token twice": [(8, "<x>"), (9, "<x>"), (10, "<y>")],
    "a number of the model": [(3, "<x>"), (8, "<y>")],
    "a token of the model": [(3, "d"), (20, "<y>")],
    "an empty token": [(8, ""), (9, "<y>")],
    "nothing new": [(7, "h")],
}


def content_of(listed: list[tuple[int, str]]) -> dict[str, Any]:
    """A tokenizer.json."""
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    added = [{"id": number, "content": token, **FLAGS} for number, token in listed]
    return {"version": "1.0", "added_tokens": added, "model": MODEL, **parts}


def random_list(seed: int) -> list[tuple[int, str]]:
    source = random.Random(seed)
    return [(source.randrange(20), source.choice(["", "a", "h", "<x>", "<y>", "<z>"])) for _ in range(5)]


@pytest.mark.parametrize("listed", [*LISTS.values(), *map(random_list, range(20))], ids=str)
def test_numbers_are_the_librarys(listed, tmp_path):
    content = content_of(listed)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = Tokenizer.from_str(json.dumps(content)).get_vocab()
    table = known_vocabulary({"hf_folder": tmp_path}).tokens
    assert {token: number for number, token in table.items()} == expected
    for written in (renumber_added_tokens(content), drop_rowless_tokens(content, 99)):
        assert Tokenizer.from_str(json.dumps(written)).get_vocab() == expected
        assert all(number_of_token(written, token) == number for token, number in expected.items())


def test_ids_of_special_tokens_are_the_librarys():
    """A file with other numbers is not carried as it is."""
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<x>"}).encode()
    for listed, is_plain in ((LISTS["out of order"], False), ([(8, "<x>"), (9, "<y>")], True)):
        content = content_of(listed)
        files = {"tokenizer_config.json": config, "tokenizer.json": json.dumps(content).encode()}
        assert has_written_form(files, 32) == is_plain
        files["tokenizer.json"] = json.dumps(drop_rowless_tokens(content, 32)).encode()
        assert special_ids(files, 32) == {"eos_token_id": 8}
