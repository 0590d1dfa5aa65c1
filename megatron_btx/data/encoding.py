"""Units of text into token ids: what every worker does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError
from megatron_btx.data import readers, tokenizers
from megatron_btx.data.description import Tokenizer as DescribedTokenizer
from megatron_btx.data.records import BadRecord, Tally
from megatron_btx.data.tokenizers import DocumentEncoder, TokenizerSettings

if TYPE_CHECKING:
    import numpy

_DRAW_BYTES = 6
"""Of a hash; a float holds whole numbers of this size exactly."""


@dataclass
class EncodedUnit:
    """The documents of one unit, by JSON key."""

    ids: dict[str, numpy.ndarray[Any, Any]]
    """Token ids of all documents, one after the other."""
    lengths: dict[str, list[int]]
    """Tokens of each document."""
    draws: dict[str, list[float]]
    """A number from 0 up to 1 for each document; empty unless the encoder has a seed."""
    empty_documents: int = 0
    """Documents left out because they hold no token."""
    bad_records: Tally = field(default_factory=Tally)
    input_bytes: int = 0


@dataclass(frozen=True)
class Encoder:
    """All that turns a unit into tokens; each worker holds one."""

    document_ids: DocumentEncoder
    keys: tuple[str, ...]
    vocab_size: int
    dtype: type[numpy.number[Any]]
    refuse_record: Callable[[BadRecord], None] | None
    """Raises for a record that cannot be read; None where such records are counted and left out."""
    described: DescribedTokenizer
    draw_seed: int | None
    """Draws a number for each document, see :func:`draw`; None where nobody wants any."""

    def encode(self, unit: readers.Unit) -> EncodedUnit:
        """Tokenize the documents of a unit; InputError names the document that cannot be."""
        import numpy

        ids: dict[str, list[int]] = {key: [] for key in self.keys}
        lengths: dict[str, list[int]] = {key: [] for key in self.keys}
        draws: dict[str, list[float]] = {key: [] for key in self.keys}
        encoded = EncodedUnit({}, lengths, draws, input_bytes=unit.input_bytes)
        for document in readers.parse(unit, self.keys, self.refuse_record or encoded.bad_records.add):
            for key in self.keys:
                tokens = self._tokens(document, key)
                if not tokens:
                    encoded.empty_documents += 1
                    continue
                ids[key] += tokens
                lengths[key].append(len(tokens))
                if self.draw_seed is not None:
                    draws[key].append(draw(document.texts[key], self.draw_seed))
        for key in self.keys:
            encoded.ids[key] = numpy.array(ids[key], dtype=self.dtype)
        return encoded

    def _tokens(self, document: readers.Document, key: str) -> list[int]:
        try:
            tokens = self.document_ids.ids(document.texts[key])
        except ValueError as error:  # words where the NullTokenizer wants numbers
            raise InputError(f"{document.where}: {key!r} cannot be tokenized: {error}") from error
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            span = f"{min(tokens)} to {max(tokens)}"
            raise InputError(f"{document.where}: token ids {span} leave the vocabulary of {self.vocab_size}")
        return tokens


def draw(text: str, seed: int) -> float:
    """A number from 0 up to 1 that a text and a seed decide, and nothing else: a hash of both."""
    hashed = blake2b(f"{seed}\n{text}".encode(), digest_size=_DRAW_BYTES).digest()
    return int.from_bytes(hashed) / 2 ** (8 * _DRAW_BYTES)


def make_encoder(
    settings: TokenizerSettings,
    keys: tuple[str, ...] = (readers.TEXT_KEY,),
    *,
    append_eod: bool,
    refuse_record: Callable[[BadRecord], None] | None = readers.refuse,
    draw_seed: int | None = None,
) -> Encoder:
    """Load a tokenizer, and choose how its numbers are stored.

    Raises:
        InputError: the tokenizer cannot be read, or has no end-of-document token where one is asked for.
    """
    tokenizer = tokenizers.load(settings)
    eod = None
    if append_eod:
        eod = tokenizers.end_of_document(tokenizer, settings)
    from megatron_btx.data.indexed import choose_dtype

    size = tokenizers.count_numbers(tokenizer)
    return Encoder(
        document_ids=DocumentEncoder.of(tokenizer, eod),
        keys=keys,
        vocab_size=size,
        dtype=choose_dtype(size),
        refuse_record=refuse_record,
        described=DescribedTokenizer.of(dataclasses.asdict(settings), size),
        draw_seed=draw_seed,
    )
