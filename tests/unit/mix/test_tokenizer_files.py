"""What stands in the files of a written tokenizer, and what does not."""

from __future__ import annotations

import json

from megatron_btx.mix import tokenizer_files as written

ROWS = 400
TOKENIZER = {
    "added_tokens": [{"id": 0, "content": "<s>"}, {"id": 399, "content": "</s>"}, {"id": 400, "content": "[PAD]"}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True},
    "model": {"type": "BPE", "vocab": {"a": 1}},
    "truncation": {"max_length": 8},
}


def test_no_file_is_left_that_a_reader_takes_in_place_of_these():
    """What they said stands in tokenizer.json; a reader of another version would go by them all the same."""
    source = {name: b"{}" for name in ("added_tokens.json", "special_tokens_map.json", "tekken.json", "notes.txt")}
    files = written.written_files(source, TOKENIZER, {"tokenizer_class": written.CLASS})
    assert files.keys() == {"notes.txt", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads(files["tokenizer.json"]) == TOKENIZER


def test_tokens_without_a_row_are_left_out():
    """Their text would become an id that the model cannot read; and no text is cut short."""
    content = written.without_rowless(TOKENIZER, ROWS)
    assert [entry["id"] for entry in content["added_tokens"]] == [0, 399]
    assert content["truncation"] is None and content["model"] == TOKENIZER["model"]


def test_special_ids_have_rows():
    """A pad token beyond the embedding is no id of the model."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "[PAD]"}
    files = {"tokenizer.json": json.dumps(TOKENIZER).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    assert written.special_ids(files, ROWS) == {"bos_token_id": 0, "eos_token_id": 399}
    assert written.special_ids(files, ROWS + 1)["pad_token_id"] == 400


def test_the_blank_before_a_text_is_said():
    """Where it is not, transformers 4.57 turns it off in the tokenizer."""
    for prefix in (False, True):
        tokenizer = TOKENIZER | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": prefix}}
        assert written.written_config({}, tokenizer, {}, None)["add_prefix_space"] is prefix
    assert "add_prefix_space" not in written.written_config({}, {"pre_tokenizer": None}, {}, None)
