"""Megatron's format of indexed datasets, written with numpy alone.

``.bin`` holds the tokens, ``.idx`` says where documents begin. Importing Megatron for its own writer takes five seconds
and more, which is most of the time that a small text needs. Little-endian, as Megatron writes it
(``core/datasets/indexed_dataset.py``):

    header, 9 bytes | version u64 | type of the tokens u8 | sequences u64 | boundaries of documents u64
    | tokens of each sequence i32 | byte at which each begins i64 | boundaries of documents, as numbers of sequences i64

Here every document is one sequence.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.data.description import SUFFIX, Tokenizer, describe

if TYPE_CHECKING:
    import numpy

_HEADER = b"MMIDIDX\x00\x00"
_VERSION = 1
_TYPE_CODES = {"int32": 4, "uint16": 8}
_SMALL_VOCABULARY = 65500
"""Below it Megatron stores tokens in two bytes."""


def choose_dtype(vocab_size: int) -> type[numpy.number[Any]]:
    """The type in which Megatron stores the tokens of a vocabulary."""
    import numpy

    if vocab_size < _SMALL_VOCABULARY:
        return numpy.uint16
    return numpy.int32


class Sink:
    """One indexed dataset in the making, under temporary names until it is whole."""

    def __init__(self, prefix: str, dtype: type[numpy.number[Any]]) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._temporary = {suffix: f"{prefix}{suffix}.tmp{os.getpid()}" for suffix in (".bin", SUFFIX, ".idx")}
        self._lengths = array("i")
        self.documents = 0
        self.tokens = 0
        self.hash = hashlib.sha256()
        """Of the bytes of the .bin file so far."""
        self._largest_id = -1

    def __enter__(self) -> Sink:
        Path(self._prefix).parent.mkdir(parents=True, exist_ok=True)
        self._data = open(self._temporary[".bin"], "wb")  # closed by __exit__
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # closing writes the rest of the buffer, which a full disk refuses again
            self._data.close()
        for name in self._temporary.values():
            Path(name).unlink(missing_ok=True)

    def add(self, ids: numpy.ndarray[Any, Any], lengths: Sequence[int]) -> None:
        """Append documents: their token ids one after the other, and the length of each in tokens."""
        content = ids.astype(self._dtype, copy=False).tobytes()
        self._data.write(content)
        self.hash.update(content)
        self._lengths.extend(lengths)
        self.documents += len(lengths)
        self.tokens += len(ids)
        self._largest_id = max(self._largest_id, int(ids.max(initial=0)))

    def write_index(self, tokenizer: Tokenizer) -> None:
        """Close the data, write the index and the description, all still under temporary names."""
        import numpy

        self._data.close()
        lengths_D = numpy.array(self._lengths, dtype="<i4")
        starts_D = numpy.zeros(self.documents, dtype="<i8")
        numpy.cumsum(lengths_D[:-1], out=starts_D[1:], dtype="<i8")
        boundaries = numpy.arange(self.documents + 1, dtype="<i8")
        with open(self._temporary[".idx"], "wb") as file:
            file.write(_HEADER)
            code = _TYPE_CODES[self._dtype.__name__]
            file.write(struct.pack("<QBQQ", _VERSION, code, self.documents, self.documents + 1))
            file.write(lengths_D.tobytes())
            file.write((starts_D * numpy.dtype(self._dtype).itemsize).tobytes())
            file.write(boundaries.tobytes())
        text = describe(tokenizer, self._largest_id, self.documents, self.tokens, self._temporary)
        Path(self._temporary[SUFFIX]).write_text(text, encoding="utf-8")

    def publish(self) -> None:
        """Give the files their names, the index last: without it nothing loads."""
        Path(f"{self._prefix}.idx").unlink(missing_ok=True)
        for suffix, name in self._temporary.items():
            os.replace(name, f"{self._prefix}{suffix}")


def publish_all(sinks: Collection[Sink], tokenizer: Tokenizer, replaces: Path | None = None) -> None:
    """Finish several datasets, and only when all are whole give them their names.

    ``replaces``, a record of the datasets that these replace, goes before the first of them does.
    """
    for sink in sinks:
        sink.write_index(tokenizer)
    if replaces is not None:
        replaces.unlink(missing_ok=True)
    for sink in sinks:
        sink.publish()
