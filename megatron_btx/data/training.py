"""From indexed datasets to the batches of a training step, as Megatron's own GPT training does it.

Which tokens make a sequence, and which sequence comes when, Megatron draws once and keeps in files
(``core/datasets/gpt_dataset.py``). It knows them by the dataset's path, writes them in place, and reads what it finds:
the order of an older dataset of that name, or half of one. Here their name is a hash of all that they are made from.
They are written aside and renamed, and read only if they are what was written. Else the order is made anew, on each
rank that needs it; the numbers are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import _IndexReader
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import hash_file, refuse_unwritable, write_json
from megatron_btx.common.log import say
from megatron_btx.data.description import ALLOWANCE, SUFFIX, Tokenizer, check_description
from megatron_btx.data.splits import splits_of
from megatron_btx.distributed.abort import Stopping

_SHOWN = 3
_OWN_TOKENIZER = (
    "Make the dataset with this run's tokenizer (tools/preprocess_data.py), or give the tokenizer it was made with"
)
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


BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens", "max_seqlen")


def datasets_for(stopping: Stopping) -> Any:
    """The function that gives ``megatron.training.pretrain`` the blended datasets of a run.

    Args:
        stopping: begins to watch when the function is called: by every rank, before one of them can wait for a batch.
    """

    def train_valid_test_datasets(sample_counts: list[int | None], vp_stage: int | None = None) -> Any:
        """The datasets, for the numbers of sequences that are wanted for training, validation and test."""
        stopping.watch()
        args = get_args()
        blend, blend_per_split = get_blend_and_blend_per_split(args)
        config = TextDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=blend_per_split,
            split=args.split if blend is not None else None,
            multiple_validation_sets=args.multiple_validation_sets,
            full_validation=args.full_validation,
            num_dataset_builder_threads=args.num_dataset_builder_threads,
            order_folder=args.data_cache_path,
            mmap_bin_files=args.mmap_bin_files,
            tokenizer=DatasetTokenizer(get_tokenizer().eod),
            reset_position_ids=args.reset_position_ids,
            reset_attention_mask=args.reset_attention_mask,
            eod_mask_loss=args.eod_mask_loss,
            create_attention_mask=args.create_attention_mask_in_dataloader,
            context_parallel_size=args.context_parallel_size,
        )
        return BlendedMegatronDatasetBuilder(TextDataset, sample_counts, reads_batches, config).build()

    # Every rank calls the provider; reads_batches says which of them build.
    train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]
    return train_valid_test_datasets


def check_data_files(args: argparse.Namespace) -> None:
    """Refuse, before any process group exists, a run without data, or with missing, empty or damaged datasets."""
    if args.data_cache_path:
        refuse_unwritable(args.data_cache_path, f"--data-cache-path {args.data_cache_path}")
    flags = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    if not any(getattr(args, flag) for flag in flags) and not args.data_args_path and not args.per_split_data_args_path:
        raise InputError("no training data: give --data-path, or --train-data-path (and --valid-data-path)")
    named: dict[str, str] = {}
    for split in splits_of(args):
        for prefix in split.blend[0]:
            named.setdefault(prefix, split.flag)
    for prefix, flag in named.items():
        check_indexed_dataset(prefix, flag)
    check_descriptions(named, args)


def check_descriptions(named: Mapping[str, str], args: argparse.Namespace) -> None:
    """Refuse datasets (prefix -> flag) that say that they are of another tokenizer, or beyond the run's vocabulary."""
    if not any(Path(prefix + SUFFIX).is_file() for prefix in named):
        return  # reading the tokenizer's files can take seconds
    tokenizer = Tokenizer.of(vars(args), get_tokenizer().vocab_size)
    for prefix, flag in named.items():
        check_description(prefix, flag, tokenizer, args.padded_vocab_size, ALLOWANCE in args.btx_allow_change)


def check_indexed_dataset(prefix: str, where: str) -> None:
    """Refuse a dataset whose .bin or .idx is missing, empty, cut off or of another kind."""
    again = "make it again with tools/preprocess_data.py"
    for suffix in (".bin", ".idx"):
        file = Path(prefix + suffix)
        if not file.is_file():
            raise InputError(
                f"{where} {prefix}: {file} does not exist; make it with tools/preprocess_data.py, "
                "or give the prefix without .bin"
            )
        if file.stat().st_size == 0:
            raise InputError(f"{where} {prefix}: {file} is empty; {again}")
    try:
        # Not IndexedDataset, whose destructor prints a traceback when its index could not be read.
        index = _IndexReader(f"{prefix}.idx", multimodal=False)
        end_bytes = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
        whole = int(index.document_indices[-1]) == len(index)
    except (AssertionError, IndexError, ValueError, struct.error) as error:
        # Megatron asserts what it expects of the header, and lets numpy and struct find the rest.
        raise InputError(
            f"{where} {prefix}: {prefix}.idx is no index of a dataset, or was cut off ({error}); {again}"
        ) from error
    found_bytes = Path(f"{prefix}.bin").stat().st_size
    if not whole or found_bytes < end_bytes:
        raise InputError(
            f"{where} {prefix}: {prefix}.bin has {found_bytes} bytes and its index {len(index)} sequences that end at "
            f"{end_bytes}: one of them was cut off; {again}"
        )


def reads_batches() -> bool:
    """Whether this rank reads from the datasets: tensor-parallel rank 0 of the first and the last pipeline stage."""
    at_an_end = mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
    return bool(at_an_end and mpu.get_tensor_model_parallel_rank() == 0)


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    vp_stage: int | None,
    micro_batch_size: int,
    training: bool = False,
) -> dict[str, Any]:
    """The micro-batch of this rank.

    Args:
        micro_batch_size: its sequences, which tensor-parallel ranks that do not read them must know.
        training: whether it is of the training data, which a refusal then names.

    Returns:
        tokens, labels, position_ids: [B, S] int64; loss_mask: [B, S] float; each None where this pipeline stage does
        not need it.

    Raises:
        ForeignIdError: an id is beyond the vocabulary; on the ranks that read it alone.
    """
    args = get_args()
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not first and not last:
        return dict.fromkeys(BATCH_KEYS)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        if data_iterator is None:
            raise RuntimeError("a rank that reads batches has no data iterator")
        sample = next(data_iterator)
        check_batch(sample, args, training)
        for key in BATCH_KEYS:
            value = sample.get(key)
            batch[key] = value.cuda(non_blocking=True) if value is not None else None
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())


# --- ids that no token of the run has ----------------------------------------------------------------------------


class ForeignIdError(InputError):
    """A batch holds an id beyond the vocabulary."""


def vocabulary_end(args: argparse.Namespace) -> int:
    """The first id that no token has; rows of padding count where another tokenizer's datasets are allowed."""
    rows, tokens = args.padded_vocab_size, get_tokenizer().vocab_size
    if tokens is None or ALLOWANCE in args.btx_allow_change:
        return int(rows)
    return int(min(rows, tokens))


def check_batch(batch: Mapping[str, Any], args: argparse.Namespace, training: bool) -> None:
    """Refuse a micro-batch with an id beyond the vocabulary, while it still lies in the host's memory.

    Past that point one process ends in an index error of its embedding; tensor-parallel ranks give such an id a row of
    zeros and train on, without a word. The look costs some 5 microseconds per sequence of 4096.

    Args:
        batch: as Megatron's loader gives it: tokens and labels [B, S], and for blends dataset_id [B].

    Raises:
        ForeignIdError: names id, dataset and place.
    """
    end = vocabulary_end(args)
    for ids_BS in (batch.get("tokens"), batch.get("labels")):
        if ids_BS is None:
            continue
        smallest, largest = torch.aminmax(ids_BS)
        if smallest >= 0 and largest < end:
            continue
        row, column = torch.nonzero((ids_BS < 0) | (ids_BS >= end))[0].tolist()
        names: list[str] = []
        for split in splits_of(args):
            if (split.name == "train") == training:
                names += split.blend[0]
        names = list(dict.fromkeys(names))
        dataset_B = batch.get("dataset_id")
        if training and dataset_B is not None:
            names = [names[int(dataset_B[row])]]
        shown = ", ".join(names[:_SHOWN])
        if len(names) > _SHOWN:
            shown += ", ..."
        when = f"the evaluation after step {args.curr_iteration}"
        if training:
            when = f"step {args.curr_iteration + 1}"
        raise ForeignIdError(
            f"{shown}: token {column} of a sequence in {when} has the id {int(ids_BS[row, column])}, and the "
            f"vocabulary of this run ends at {end - 1}; all ranks stop and nothing more is saved. {_OWN_TOKENIZER}"
        )


def check_text(ids: Any, where: str, args: argparse.Namespace) -> None:
    """Refuse a text of ids that is measured, as :func:`check_batch` does; every rank sees all of it."""
    end = vocabulary_end(args)
    if len(ids) and not 0 <= ids.min() <= ids.max() < end:
        foreign = ids.min() if ids.min() < 0 else ids.max()
        raise ForeignIdError(
            f"{where}: holds the token id {int(foreign)}, and the vocabulary of this run ends at {end - 1}. "
            f"{_OWN_TOKENIZER}"
        )
