"""The SentencePiece tokenizer of the quickstart."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_btx.common.errors import InputError

MIN_VOCABULARY = 512
"""256 byte pieces, the three special ones, the characters of the text, and room for some words."""


def train(documents: Iterable[str], path: Path, vocab_size: int) -> None:
    """Train a BPE model that gives back every text exactly, and write it.

    Digits stay apart, so that numbers of any length look alike; unknown characters become bytes; spaces and line
    breaks are kept, because indentation is meaning in Python. Ids: unknown 0, beginning 1, end of document 2; there
    is no padding token, for which Megatron then uses -1, so that no real token is ever masked.

    Raises:
        InputError: the vocabulary is too small for the method, or too large for the text.
    """
    import sentencepiece

    if vocab_size < MIN_VOCABULARY:
        raise InputError(f"--vocab-size {vocab_size}: expected at least {MIN_VOCABULARY}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"--vocab-size {vocab_size}: SentencePiece cannot train it on these corpora: {error}"
        ) from error
    path.write_bytes(model.getvalue())


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """SentencePiece learns from lines; line breaks are a token of their own."""
    for document in documents:
        yield from filter(None, document.split("\n"))
