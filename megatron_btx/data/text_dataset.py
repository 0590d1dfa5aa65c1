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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import blended_dataset, gpt_dataset

from megatron_btx.common.files import hash_file, write_json
from megatron_btx.common.log import say

_FILES = ("document_index.npy", "sample_index.npy", "shuffle_index.npy")

for _module in (gpt_dataset, blended_dataset):  # they warn that they keep nothing themselves
    logging.getLogger(_module.__name__).addFilter(lambda record: "path_to_cache is None" not in record.getMessage())


@dataclass(frozen=True)
class DatasetTokenizer:
    """All that Megatron's datasets may know of a tokenizer.

    They would take a token that pads for padding wherever a text holds it: no loss, and token 0 in its place. Datasets
    hold texts and no padding, so no number stands for it, -1 neither, which a text may hold by mistake.
    """

    eod: int | None
    pad: int = -(2**63)
    vocab_size: None = None
    unique_identifiers: str = ""


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
        name = f"{hashlib.sha256(made_from.encode()).hexdigest()[:32]}-GPTDataset-{self.index_split.name}-"
        folder = self.config.order_folder or f"{self.dataset.path_prefix}/cache/GPTDataset_indices"
        order = read_order(f"{folder}/{name}")
        if order is None:
            order = super()._build_document_sample_shuffle_indices()
            if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
                keep_order(f"{folder}/{name}", order, made_from)
        return order


def read_order(start: str) -> tuple[Any, ...] | None:
    """The arrays, mapped; None where a file is missing, or is not what was written."""
    try:
        hashes = json.loads(Path(f"{start}description.txt").read_bytes())["sha256"]
        if hashes == [hash_file(Path(start + file)) for file in _FILES]:
            return tuple(np.load(start + file, mmap_mode="r") for file in _FILES)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def keep_order(start: str, order: tuple[Any, ...], made_from: str) -> None:
    """Write the arrays and, last, what they are; where that fails the run goes on with what it has in memory."""
    folder, hashes = Path(start).parent, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as aside:
            for file, array in zip(_FILES, order, strict=True):
                np.save(f"{aside}/{file}", array)
                hashes.append(hash_file(Path(aside, file)))
                os.replace(f"{aside}/{file}", start + file)
        write_json(Path(f"{start}description.txt"), {"sha256": hashes, "made_from": made_from})
    except OSError as error:
        say(f"{folder}: the order of sequences cannot be kept there ({error}), and every start makes it anew")
