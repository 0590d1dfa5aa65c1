"""Text to measure on: an indexed dataset, or a JSONL, text or Parquet file that is tokenized as it is read."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.common.errors import InputError
from megatron_btx.data import readers
from megatron_btx.data.inputs import form_of
from megatron_btx.data.tokenizers import DocumentEncoder
from megatron_btx.data.training import check_descriptions, check_indexed_dataset

if TYPE_CHECKING:
    import numpy as np

_KEYS = (readers.TEXT_KEY,)


def tokens_of_a_batch(args: argparse.Namespace) -> int:
    """The fewest tokens that can be measured: one micro-batch for every data-parallel rank and pipeline stage.

    Interleaved pipelines take micro-batches in groups of the pipeline's size.
    """
    ranks, stages = args.data_parallel_size, args.pipeline_model_parallel_size
    return int(args.seq_length * args.micro_batch_size * ranks * stages)


def check_texts(texts: Mapping[str, str], flag: str, tokens: int, tokens_flag: str, args: argparse.Namespace) -> None:
    """Refuse, before any process group exists, what evaluation could make no batch of.

    Args:
        texts: name -> path, as ``flag`` gave them.
        tokens: how many are to be measured of each, as ``tokens_flag`` says.

    Raises:
        InputError: names the flag, what was found and what fills a batch.
    """
    least = tokens_of_a_batch(args)
    if tokens < least:
        raise InputError(
            f"{tokens_flag} {tokens}: fewer than one batch, expected at least {least}: --seq-length {args.seq_length} "
            f"x --micro-batch-size {args.micro_batch_size} x {args.data_parallel_size} data-parallel ranks x "
            f"{args.pipeline_model_parallel_size} pipeline stages; give more, or make the batch smaller"
        )
    for name, path in texts.items():
        check_documents(path, f"{flag} {name}=")
        found = len(start_of(path, tokens))
        if found <= least:
            raise InputError(
                f"{flag} {name}={path}: holds {found} tokens, fewer than one batch for every data-parallel rank and "
                f"pipeline stage, expected at least {least + 1}; give a longer text, or make the batch smaller"
            )
    check_descriptions({path: f"{flag} {name}=" for name, path in texts.items()}, args)


def check_documents(path: str, where: str, documents: int = 1) -> None:
    """Refuse a dataset or file of which :func:`documents_of` cannot read the first documents, or that holds none.

    Args:
        where: the flag that gave the path.
        documents: how many will be read of a text file, if it holds as many.
    """
    if not _is_text(path):
        check_indexed_dataset(path, where)
    elif not Path(path).is_file():
        raise InputError(f"{where}{path}: does not exist; give a text file, or the prefix of an indexed dataset")
    elif not sum(1 for _ in itertools.islice(_texts_of(path), documents)):
        raise InputError(f"{where}{path}: holds no text; expected documents under the key {readers.TEXT_KEY!r}")


def documents_of(path: str) -> Iterator[np.ndarray]:
    """The documents of a dataset or file in their order, as int64 token ids.

    A file's are tokenized with the run's tokenizer and end in its end-of-document token where it has one, as
    ``tools/preprocess_data.py --append-eod`` writes them.
    """
    import numpy as np

    if not _is_text(path):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(path)
        for number in range(len(dataset)):
            yield dataset[number].astype(np.int64)
        return
    from megatron.training import get_tokenizer

    tokenizer = get_tokenizer()
    has_end = tokenizer.eod is not None and tokenizer.eod >= 0
    encoder = DocumentEncoder.of(tokenizer, tokenizer.eod if has_end else None)
    for text in _texts_of(path):
        try:
            ids = encoder.ids(text)
        except ValueError as error:  # the NullTokenizer takes numbers alone
            raise InputError(
                f"{path}: the run's tokenizer does not take its text ({error}); give one that does"
            ) from error
        if ids:
            yield np.array(ids, dtype=np.int64)


def start_of(path: str, tokens: int) -> np.ndarray:
    """The first ``tokens`` tokens of a dataset or file and the one after them, as int64."""
    import numpy as np

    parts: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    have = 0
    for document in documents_of(path):
        parts.append(document)
        have += len(document)
        if have > tokens:
            break
    return np.concatenate(parts)[: tokens + 1]


def count_bytes(ids: np.ndarray, args: argparse.Namespace) -> int | None:
    """Bytes of UTF-8 that the tokens stand for whose loss is measured when ``ids`` are read from their beginning.

    All but the first token of all, and, under ``--eod-mask-loss``, but the first of each document. An end of a document
    has no bytes. None where the tokenizer cannot say: the ids of a NullTokenizer are no text.
    """
    import numpy as np
    from megatron.training import get_tokenizer

    if str(args.tokenizer_type).startswith("Null"):
        return None
    tokenizer = get_tokenizer()
    has_end = tokenizer.eod is not None and tokenizer.eod >= 0
    ends = np.flatnonzero(ids == tokenizer.eod) if has_end else np.empty(0, dtype=np.int64)
    total = 0
    for number, document in enumerate(np.split(ids, ends)):
        text = document[1:] if number else document  # each but the first begins with the end of the one before
        unmeasured = text[:1] if args.eod_mask_loss or not number else text[:0]
        for sign, part in ((1, text), (-1, unmeasured)):
            if len(part):
                total += sign * len(tokenizer.detokenize(part.tolist()).encode())
    return total


def spread_documents(path: str, count: int) -> list[np.ndarray]:
    """At most ``count`` documents, evenly spread over an indexed dataset, or the first ones of a file."""
    if _is_text(path):
        return list(itertools.islice(documents_of(path), count))
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(path)
    numbers = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=np.int64)
    return [dataset[int(number)].astype(np.int64) for number in numbers]


def _is_text(path: str) -> bool:
    return form_of(path) is not None and not Path(f"{path}.idx").exists()


def _texts_of(path: str) -> Iterator[str]:
    for unit in readers.cut(Path(path), _KEYS):
        for _, texts in readers.parse(unit, _KEYS, readers.refuse):
            if text := texts[readers.TEXT_KEY]:
                yield text
