"""Megatron's dataset of texts, read as it was tokenized, in an order that is kept whole or made anew.

Which tokens make a sequence, and which sequence comes when, Megatron draws once and keeps in files
(``core/datasets/gpt_dataset.py``). It knows them by the dataset's path, writes them in place, and reads what it finds:
the order of an older dataset of that name, or half of one. Here their name is a hash of all that they are made from.
They are written aside and renamed, and read only if they are what was written. Else the order is made anew, on each
rank that needs it; the numbers are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import blended_dataset, gpt_dataset

from megatron_btx.ground.files import hash_file, write_json
from megatron_btx.ground.log import say

_FILES = ("document_index.npy", "sample_index.npy", "shuffle_index.npy")
_DESCRIPTION = "description.txt"


@dataclass(frozen=True)
class DatasetTokenizer:
    """All that Megatron's datasets may know of a tokenizer.

    They would take a token that pads for padding wherever a text holds it: no loss, and token 0 in its place. Datasets
    hold texts and no padding, so no number stands for it, -1 neither, which a text may hold by mistake.
    """

    eod: int | None
    pad: int = int(np.iinfo(np.int64).min)
    vocab_size: None = None
    """Datasets say by themselves how many bytes a token has."""
    unique_identifiers: dict[str, str] = field(default_factory=dict)
    """Of the order of sequences, which follows from their lengths."""


@dataclass
class TextDatasetConfig(gpt_dataset.GPTDatasetConfig):
    """Megatron's configuration, without its own cache."""

    path_to_cache: str | None = ""
    order_folder: str | None = None
    """Where the order of sequences is kept; beside each dataset by default."""


class TextDataset(gpt_dataset.GPTDataset):
    """One dataset, or a part of it, as sequences."""

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, ...]:
        lengths = hashlib.sha256(self.dataset.sequence_lengths[self.indices]).hexdigest()
        made_from = f"{version('megatron-core')} {lengths} {self.unique_description}"
        beside = os.path.join(self.dataset.path_prefix, "cache", "GPTDataset_indices")
        name = hashlib.sha256(made_from.encode()).hexdigest()[:32]
        start = os.path.join(self.config.order_folder or beside, f"{name}-GPTDataset-{self.index_split.name}-")
        kept = read_order(start)
        if kept is not None:
            return kept
        made: tuple[Any, ...] = super()._build_document_sample_shuffle_indices()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            keep_order(start, made, made_from)
        return made


def read_order(start: str) -> tuple[Any, ...] | None:
    """The arrays, mapped; None where a file is missing, or is not what was written."""
    files = [Path(start + file) for file in _FILES]
    try:
        if json.loads(Path(start + _DESCRIPTION).read_bytes())["sha256"] != [hash_file(file) for file in files]:
            return None
        return tuple(np.load(file, mmap_mode="r") for file in files)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def keep_order(start: str, made: tuple[Any, ...], made_from: str) -> None:
    """Write the arrays and, last, what they are; where that fails the run goes on with what it has in memory."""
    folder, hashes = os.path.dirname(start), []
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as aside:
            for file, array in zip(_FILES, made, strict=True):
                np.save(os.path.join(aside, file), array)
                hashes.append(hash_file(Path(aside, file)))
                os.replace(os.path.join(aside, file), start + file)
        write_json(Path(start + _DESCRIPTION), {"sha256": hashes, "made_from": made_from})
    except OSError as error:
        say(f"{folder}: the order of sequences cannot be kept there ({error}), and every start makes it anew")


def _is_about_keeping(record: logging.LogRecord) -> bool:
    return "because path_to_cache is None" in record.getMessage()


for _module in (gpt_dataset, blended_dataset):
    # Megatron warns that it keeps nothing itself.
    logging.getLogger(_module.__name__).addFilter(lambda record: not _is_about_keeping(record))
