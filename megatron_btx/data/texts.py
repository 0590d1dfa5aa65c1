"""Text to measure on: an indexed dataset, or a JSONL, text or Parquet file that is tokenized as it is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.data import readers
from megatron_btx.data.training import check_indexed_dataset
from megatron_btx.errors import InputError

if TYPE_CHECKING:
    import numpy as np

_KEYS = (readers.TEXT_KEY,)


def check_documents(path: str, where: str) -> None:
    """Refuse what :func:`documents_of` cannot read, as far as its first document.

    Args:
        where: the flag that gave the path.

    Raises:
        InputError: a dataset or file that does not exist, is empty or not of its kind.
    """
    if not path.endswith(readers.KNOWN_SUFFIXES):
        check_indexed_dataset(path, where)
        return
    if not Path(path).is_file():
        raise InputError(f"{where}{path}: does not exist; give a text file, or the prefix of an indexed dataset")
    if next(_texts_of(path), None) is None:
        raise InputError(f"{where}{path}: holds no text; expected documents under the key {readers.TEXT_KEY!r}")


def documents_of(path: str) -> Iterator[np.ndarray]:
    """The documents of a dataset or file in their order, as int64 token ids.

    A file's are tokenized with the run's tokenizer and end in its end-of-document token where it has one, as
    ``tools/preprocess_data.py --append-eod`` writes them.
    """
    import numpy as np

    if not path.endswith(readers.KNOWN_SUFFIXES):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(path)
        for number in range(len(dataset)):
            yield dataset[number].astype(np.int64)
        return
    from megatron.training import get_tokenizer

    tokenizer = get_tokenizer()
    end = [tokenizer.eod] if tokenizer.eod is not None and tokenizer.eod >= 0 else []
    for text in _texts_of(path):
        yield np.array([*tokenizer.tokenize(text), *end], dtype=np.int64)


def start_of(path: str, tokens: int) -> np.ndarray:
    """The first ``tokens`` tokens of a dataset or file and the one after them, as int64."""
    import numpy as np

    parts, have = [], 0
    for document in documents_of(path):
        parts.append(document)
        have += len(document)
        if have > tokens:
            break
    return np.concatenate(parts)[: tokens + 1]


def first_documents(path: str, count: int) -> list[np.ndarray]:
    """The first ``count`` documents, or as many as there are."""
    return list(itertools.islice(documents_of(path), count))


def _texts_of(path: str) -> Iterator[str]:
    for unit in readers.cut(Path(path), _KEYS):
        for document in readers.parse(unit, _KEYS):
            if text := document.texts[readers.TEXT_KEY]:
                yield text
