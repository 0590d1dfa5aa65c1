"""What stands in the files of a written tokenizer, and what does not."""

from __future__ import annotations

import json

import pytest

from megatron_btx.tokenizers import written_files as tokenizer_files
from megatron_btx.tokenizers.verify import Reference, compare

ROWS = 400
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
WORDS = {"<s>": 0} | {f"w{number}": number for number in range(1, ROWS - 1)}
TOKENIZER = {
    "added_tokens": [
        {"id": n, "content": token, **FLAGS} for n, token in {0: "<s>", 399: "</s>", 400: "[PAD]"}.items()
    ],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    "model": {"type": "BPE", "vocab": WORDS, "merges": []},
    "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
}


def test_no_file_is_left_that_a_reader_takes_in_place_of_these():
    """What they said stands in tokenizer.json; a reader of another version would go by them all the same."""
    source = {name: b"{}" for name in ("added_tokens.json", "special_tokens_map.json", "tekken.json", "notes.txt")}
    files = tokenizer_files.make_files(source, TOKENIZER, {"tokenizer_class": tokenizer_files.CLASS})
    assert files.keys() == {"notes.txt", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads(files["tokenizer.json"]) == TOKENIZER


def test_tokens_without_a_row_are_left_out():
    """Their text would become an id that the model cannot read; and no text is cut short."""
    content = tokenizer_files.drop_rowless_tokens(TOKENIZER, ROWS)
    assert [entry["id"] for entry in content["added_tokens"]] == [0, 399]
    assert content["truncation"] is None and content["model"] == TOKENIZER["model"]


def test_special_ids_have_rows():
    """A pad token beyond the embedding is no id of the model."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "[PAD]"}
    files = {"tokenizer.json": json.dumps(TOKENIZER).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    assert tokenizer_files.special_ids(files, ROWS) == {"bos_token_id": 0, "eos_token_id": 399}
    assert tokenizer_files.special_ids(files, ROWS + 1)["pad_token_id"] == 400


def test_the_blank_before_a_text_is_said():
    """Where it is not, transformers 4.57 turns it off in the tokenizer."""
    for prefix in (False, True):
        tokenizer = TOKENIZER | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": prefix}}
        assert tokenizer_files.make_config({}, tokenizer, {}, None)["add_prefix_space"] is prefix
    assert "add_prefix_space" not in tokenizer_files.make_config({}, {"pre_tokenizer": None}, {}, None)


def test_ways_that_are_as_probable_are_one():
    """The text "abcab" is ab c ab or a bc ab: where both have one sum of scores, rounding decides which is found."""
    pieces = [("a", -1.0), ("b", -9.0), ("c", -2.0), ("ab", -3.0), ("bc", -4.0), ("d", -4.0)]
    expected, tie = [[3, 2, 3]], [[0, 4, 3]]
    for scored, found, is_tie in (
        (pieces, tie, True),
        (pieces, [[0, 1, 2, 3]], False),
        (pieces, [[0, 5, 3]], False),
        ((), tie, False),
    ):
        reference = Reference("a model", lambda _texts, _whole: expected, scored)
        difference, ties, compared = compare(reference, lambda _texts, _whole, ids=found: ids, ["abcab"], len(pieces))
        assert ((difference is None), ties, compared) == (is_tie, int(is_tie), 1)


def test_a_proof_counts_what_it_compared():
    """A text with a token that has no row is left out, and such a token around a text is none of the result."""
    rowless = {False: [[1, 9], [2], []], True: [[9, 1, 9], [9, 2], [9]]}
    for found, wrong in (([[], [2], []], 0), ([[], [9, 2], [9]], 2), ([[], [9, 2], []], 1)):
        reference = Reference("a model", lambda _texts, whole: rowless[whole])
        read = {False: [[], [2], []], True: found}
        difference, _, compared = compare(reference, lambda _texts, whole, ids=read: ids[whole], ["a", "b", "c"], 9)
        assert compared == 2 and (difference.count if difference else 0) == wrong


def test_of_several_ids_those_with_a_row_stay():
    """A model that stops at three tokens does not stop at one alone, because a fourth has no row."""
    given = {"eos_token_id": [3, 5, 99], "bos_token_id": [True, "2", None], "pad_token_id": 99, "other": 1}
    made = tokenizer_files.complete_ids(given, {"eos_token_id": 7, "pad_token_id": 7}, 32)
    assert made == {"eos_token_id": [3, 5], "pad_token_id": 7, "other": 1}
    assert tokenizer_files.complete_ids({"eos_token_id": []}, {"eos_token_id": 7}, 32) == {"eos_token_id": 7}
    assert tokenizer_files.complete_ids({"eos_token_id": [3]}, {}, 32) == {"eos_token_id": [3]}


@pytest.mark.parametrize("content", [b"[1]", b"{", b"[" * 100_000, b"\xff"])
def test_a_generation_config_that_is_none_is_made_anew(content):
    assert json.loads(tokenizer_files.generation_file({"generation_config.json": content}, {"eos_token_id": 2}, 9)) == {
        "eos_token_id": 2
    }
