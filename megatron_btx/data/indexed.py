"""Megatron's format of indexed datasets, written with numpy alone.

``.bin`` holds the tokens, ``.idx`` says where documents begin. Importing Megatron for its own writer takes five seconds
and more, which is most of the time that a small text needs. Little-endian, as Megatron writes it
(``core/datasets/indexed_dataset.py``):

    header, 9 bytes | version u64 | type of the tokens u8 | sequences u64 | boundaries of documents u64
    | tokens of each sequence i32 | byte at which each begins i64 | boundaries of documents, as numbers of sequences i64

Here every document is one sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy

_HEADER = b"MMIDIDX\x00\x00"
_VERSION = 1
_TYPE_CODES = {numpy.dtype(numpy.int32): 4, numpy.dtype(numpy.uint16): 8}
_SMALL_VOCABULARY = 65500
"""Below it Megatron stores tokens in two bytes."""


def choose_dtype(vocab_size: int) -> type[numpy.number[Any]]:
    """The type in which Megatron stores the tokens of a vocabulary."""
    if vocab_size < _SMALL_VOCABULARY:
        return numpy.uint16
    return numpy.int32


def write_index(file: IO[bytes], lengths: Sequence[int], dtype: type[numpy.number[Any]]) -> None:
    """Write the index of documents of these lengths.

    Args:
        lengths: tokens of each document.
        dtype: type of the tokens in the ``.bin`` file.
    """
    lengths_D = numpy.array(lengths, dtype="<i4")
    token_bytes = numpy.dtype(dtype).itemsize
    starts_D = numpy.zeros(len(lengths), dtype="<i8")
    numpy.cumsum(lengths_D[:-1], out=starts_D[1:], dtype="<i8")
    file.write(_HEADER)
    file.write(struct.pack("<QBQQ", _VERSION, _TYPE_CODES[numpy.dtype(dtype)], len(lengths), len(lengths) + 1))
    file.write(lengths_D.tobytes())
    file.write((starts_D * token_bytes).tobytes())
    file.write(numpy.arange(len(lengths) + 1, dtype="<i8").tobytes())
