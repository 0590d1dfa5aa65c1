"""The tokenizers of Megatron, built without Megatron's argument parser.

Token ids and the end-of-document id must be exactly those that training will use. Megatron calls SentencePiece with
nothing of its own in between, and the tokenizer of numbers has no library: these two are built here, at once, and a
test compares them with Megatron's. A Hugging Face tokenizer comes from the function that Megatron's training calls,
which takes seconds to import. It needs a namespace of settings: all but the flags below keep Megatron's defaults.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_btx.checkpoint.unsupported import refuse_placeholders
from megatron_btx.common.errors import InputError, bare_exceptions_as

TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer")


class Tokenizer(Protocol):
    """The part of Megatron's tokenizers that is used here."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, before Megatron pads the embedding."""

    @property
    def eod(self) -> int | None:
        """End of document: SentencePiece's eos id (-1 when it has none), Hugging Face's eos token, or None."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; ValueError for one that it does not take."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Megatron's tokenizer flags, spelled as Megatron spells them."""

    tokenizer_type: str
    """One of TOKENIZER_TYPES."""
    tokenizer_model: str | None = None
    """A SentencePiece model file, or a Hugging Face folder or name."""
    vocab_size: int | None = None
    """Only for NullTokenizer, whose texts are numbers: the number of token ids, the last of which ends documents."""
    tokenizer_hf_no_include_special_tokens: bool = False
    """Hugging Face only: leave out what the tokenizer itself would add at the start and end of a text."""

    def check(self) -> None:
        """Refuse what can be seen without loading anything."""
        if self.tokenizer_type not in TOKENIZER_TYPES:
            expected = ", ".join(TOKENIZER_TYPES)
            raise InputError(f"--tokenizer-type {self.tokenizer_type}: unknown; expected one of {expected}")
        if self.tokenizer_type == "NullTokenizer":
            if self.vocab_size is None or self.vocab_size < 2:
                raise InputError(f"--vocab-size {self.vocab_size}: NullTokenizer needs a vocabulary of at least 2")
        elif self.tokenizer_model is None:
            raise InputError(f"--tokenizer-model is missing: {self.tokenizer_type} needs a model")
        elif self.tokenizer_type == "SentencePieceTokenizer" and not Path(self.tokenizer_model).is_file():
            raise InputError(f"--tokenizer-model {self.tokenizer_model}: no such file; expected a SentencePiece model")
        if self.tokenizer_model is not None:
            refuse_placeholders(Path(self.tokenizer_model))


class NumberTokenizer:
    """Megatron's NullTokenizer: texts are numbers with a blank between them, and the last one ends documents."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split(" ")]


class PieceTokenizer:
    """A SentencePiece model as Megatron calls it, unless ``--tokenizer-sentencepiece-legacy`` is given."""

    def __init__(self, model: str) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.Load(model)
        self.vocab_size = int(self._processor.get_piece_size())
        self.eod = int(self._processor.eos_id())

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode_as_ids(text)
        return ids


def count_numbers(tokenizer: Any) -> int:
    """The highest number of Megatron's tokenizer plus one; where numbers have holes, Megatron counts too few."""
    numbers = getattr(_library_of(tokenizer), "get_vocab", None)
    return int(tokenizer.vocab_size) if numbers is None else max(numbers().values(), default=-1) + 1


def _library_of(tokenizer: Any) -> Any:
    """The tokenizer of transformers that is inside, or None."""
    return getattr(getattr(tokenizer, "_tokenizer", tokenizer), "tokenizer", None)


def _refuse_chance(tokenizer: Any) -> None:
    """Refuse a tokenizer that draws how it cuts a text: each time another dataset, or another loss."""
    library = _library_of(tokenizer)
    model = getattr(getattr(library, "backend_tokenizer", None), "model", None)
    sampling = (getattr(library, "sp_model_kwargs", None) or {}).get("enable_sampling")
    for name, value in (("dropout", getattr(model, "dropout", None)), ("enable_sampling", sampling)):
        if value:
            raise InputError(
                f"--tokenizer-model {library.name_or_path}: cuts texts at random ({name} {value:g}), each time anew; "
                f"set {name} to null in its tokenizer.json or tokenizer_config.json"
            )


def load(settings: TokenizerSettings) -> Tokenizer:
    """The tokenizer that Megatron's training would build from the same flags; raises InputError where there is none."""
    settings.check()
    try:
        with bare_exceptions_as(lambda error: ValueError(str(error))):
            if settings.vocab_size is not None and settings.tokenizer_type == "NullTokenizer":
                return NumberTokenizer(settings.vocab_size)
            if settings.tokenizer_model is not None and settings.tokenizer_type == "SentencePieceTokenizer":
                return PieceTokenizer(settings.tokenizer_model)
            return _build_by_megatron(settings)
    except (ValueError, RuntimeError, OSError) as error:
        what = f"--tokenizer-model {settings.tokenizer_model}: not a readable {settings.tokenizer_type}"
        raise InputError(f"{what}: {error}") from error


def _build_by_megatron(settings: TokenizerSettings) -> Tokenizer:
    """Import Megatron, some seconds, once, and without its warnings: they would bury the one line of a refusal.

    They are about Transformer Engine, apex and a missing GPU, none of which matters here.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    tokenizer: Tokenizer = build_tokenizer(_namespace(settings))
    return tokenizer


def _namespace(settings: TokenizerSettings) -> argparse.Namespace:
    return argparse.Namespace(
        **asdict(settings),
        tokenizer_hf_no_use_fast=False,
        tokenizer_sentencepiece_legacy=False,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        trust_remote_code=False,
        metadata_path=None,
        special_tokens=None,
        chat_template=None,
        vocab_file=None,
        merge_file=None,
        pad_vocab_size=False,
        null_tokenizer_eod_id=None,
        null_tokenizer_pad_id=-1,
    )


@dataclass(frozen=True)
class DocumentEncoder:
    """Texts into the token ids of documents, the same wherever documents are made or measured.

    Some Hugging Face tokenizers put tokens of their own around every text: ``<s>``, ``[CLS]``, ``[SEP]``. They stay,
    because the model was trained with them and training and serving have to agree; Megatron's flag
    ``--tokenizer-hf-no-include-special-tokens`` leaves them out. But they are no text, they are not doubled where the
    text itself begins or ends with them, and an end token of theirs is the end of the document.
    """

    tokenizer: Tokenizer
    eod: int | None
    """Ends every document, or None."""
    before: tuple[int, ...]
    """What the tokenizer puts before a text."""
    after: tuple[int, ...]
    """What it puts behind one."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, eod: int | None) -> DocumentEncoder:
        """Look at what the tokenizer makes of an empty text. Raises InputError where it cuts at random."""
        _refuse_chance(tokenizer)
        try:
            frame, framed = _tokenized(tokenizer, ""), _tokenized(tokenizer, "a")
        except ValueError:  # the NullTokenizer takes numbers alone
            return cls(tokenizer, eod, (), ())
        split = 0
        while split < min(len(frame), len(framed)) and frame[split] == framed[split]:
            split += 1
        return cls(tokenizer, eod, tuple(frame[:split]), tuple(frame[split:]))

    def ids(self, text: str) -> list[int]:
        """Token ids of a document, none for a text that holds no token; ValueError for one that cannot be taken."""
        body = _tokenized(self.tokenizer, text) if text else []
        while self.before and tuple(body[: len(self.before)]) == self.before:
            body = body[len(self.before) :]
        while self.after and tuple(body[-len(self.after) :]) == self.after:
            body = body[: -len(self.after)]
        if not body:
            return []
        document = [*self.before, *body, *self.after]
        if self.eod is not None and document[-1] != self.eod:
            document.append(self.eod)
        return document


def _tokenized(tokenizer: Tokenizer, text: str) -> list[int]:
    with bare_exceptions_as(lambda error: ValueError(str(error))):  # a word without a token, for instance
        return tokenizer.tokenize(text)
