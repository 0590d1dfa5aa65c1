"""Names of folders: letters of every script, and nothing that ends a word or a path."""

from __future__ import annotations

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.common.names import check_name
from megatron_btx.data.domains import check_description


@pytest.mark.parametrize("name", ["math", "v1.0_a-b", "_x", "9", "Überblick", "数学", "हिन्दी", "a\u0308", "x" * 80])
def test_names_of_every_script_are_taken(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".a",
        "-a",
        "a b",
        "a/b",
        "a\\b",
        "a:b",
        "a=b",
        "a\n",
        "a\u200b",
        "\u0308a",
        "a*",
        "数" * 27,
        "x" * 81,
        "\ud800",
    ],
)
def test_what_ends_a_word_or_a_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name; expected letters, digits, dots, dashes and underscores, at most"):
        check_name(name)


def test_a_description_of_texts_keeps_to_the_same_rule() -> None:
    said = {"tokenizer": {"tokenizer-type": "NullTokenizer", "vocab-size": 9}, "seed": 1}
    check_description({**said, "domains": {"数学": {"train": ["a.jsonl"]}}})
    with pytest.raises(InputError, match="a b: not a name; expected letters"):
        check_description({**said, "domains": {"a b": {"train": ["a.jsonl"]}}})
