"""What of which dataset a run trains on and evaluates on, cut as Megatron cuts it, before Megatron does.

Megatron fills a split by repeating its tokens until there are enough. Where a split has none it repeats them for ever,
even when nothing is wanted of it; where an evaluation has no data at all, or a blend without weights has too little,
the run ends in a traceback, after the training that it belongs to. All of this follows from the command line and the
lengths in the indices (``core/datasets/blended_megatron_dataset_builder.py`` and ``gpt_dataset.py``).
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import _IndexReader
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_btx.common.errors import InputError

_SHARES = re.compile(r"[\d.,:;/\s()\[\]]*", re.ASCII)
"""Plain numbers, parted in any usual way."""
Blend = tuple[list[str], list[float] | None]
"""Prefixes of datasets, and their weights where they are given."""
Range = tuple[float, float]
"""The share of a dataset's sequences that a split takes: from, to."""

NAMES = ("train", "valid", "test")
LEGACY_SPLIT = "969, 30, 1"
"""What Megatron takes for --data-path without --split (``training/arguments.py``)."""
_WORDS = {"train": "training", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Split:
    """The data of training, validation or test."""

    name: str
    """One of NAMES."""
    flag: str
    """The flag or file that names the datasets."""
    blend: Blend
    part: Range = (0.0, 1.0)
    shares: str = ""
    """The flag that says what part of the datasets it is, with its value."""

    @property
    def where(self) -> str:
        """All flags that made this split what it is."""
        if not self.shares:
            return self.flag
        return f"{self.flag} with {self.shares}"


@dataclass(frozen=True)
class Dataset:
    """A dataset's prefix, and the lengths of its sequences in tokens."""

    prefix: str
    lengths: np.ndarray
    index: Any = None
    """The open index that the lengths lie in: it would take them along when it goes."""

    def sequences(self, part: Range) -> tuple[int, int]:
        """The first sequence of a part, and the one after its last, rounded as Megatron rounds."""
        count = float(len(self.lengths))
        return round(part[0] * count), round(part[1] * count)

    def tokens(self, part: Range) -> int:
        """The tokens of a part."""
        first, end = self.sequences(part)
        return int(self.lengths[first:end].sum(dtype=np.int64))


def splits_of(args: argparse.Namespace) -> list[Split]:
    """The splits that Megatron will build, in the order of NAMES; one that has no data is not among them.

    Raises:
        InputError: a file of data arguments that cannot be read, shares that are none, or shares that are missing.
    """
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, AssertionError) as error:
        file = args.data_args_path or args.per_split_data_args_path or "the data paths"
        raise InputError(
            f"{file}: cannot be read as lists of datasets ({error or type(error).__name__}); expected prefixes, or a "
            'weight before each; for --per-split-data-args-path {"train": [...], "valid": [...], "test": [...]}'
        ) from error
    if blend is None:
        splits = []
        for name, given in zip(NAMES, per_split or (), strict=False):
            flag = f"--{name}-data-path"
            if args.per_split_data_args_path:
                flag = f"--per-split-data-args-path {args.per_split_data_args_path}, {name}"
            if given is not None:
                splits.append(Split(name, flag, given))
        return splits
    flag = "--data-path" if args.data_path else f"--data-args-path {args.data_args_path}"
    if args.split is None:
        raise InputError(f"{flag}: --split is missing; give the shares of training, validation and test, as 98,1,1")
    shares = f"--split {args.split}"
    try:
        if not _SHARES.fullmatch(args.split):
            raise ValueError("Megatron would take the digits of it and pass over signs, letters and exponents")
        with np.errstate(invalid="ignore"):  # no share above 0
            vector = parse_and_normalize_split(args.split)
        matrix = convert_split_vector_to_split_matrix(vector)
    except (AssertionError, ValueError):
        vector = []
    if not vector or not math.isfinite(sum(vector)):
        raise InputError(f"{shares}: expected up to three shares, as 98,1,1 for training, validation and test")
    return [
        Split(name, flag, blend, part, shares) for name, part in zip(NAMES, matrix, strict=True) if part is not None
    ]


def check_splits(args: argparse.Namespace, is_there: Callable[[str], object] = lambda prefix: True) -> None:
    """Refuse data with which Megatron would not come to its first step, or not past its last.

    The datasets themselves have been checked (:func:`megatron_btx.data.training.check_data_files`).

    Args:
        is_there: says of a prefix whether its dataset has been made; of others nothing is known yet.

    Raises:
        InputError: nothing to train on, an evaluation without data, a split without tokens, weights that are none, or
            a blend without weights that holds fewer sequences than are asked for.
    """
    splits = splits_of(args)
    _check_presence(args, {split.name for split in splits})
    wanted = wanted_sequences(args)

    @functools.cache
    def dataset_of(prefix: str) -> Dataset:
        index = _IndexReader(f"{prefix}.idx", multimodal=False)
        return Dataset(prefix, index.sequence_lengths, index)

    for split in splits:
        prefixes, weights = split.blend
        for weight in weights or ():
            if not 0 < weight < math.inf:
                has = f"a dataset has the weight {weight:g}"
                raise InputError(f"{split.where}: {has}; expected above 0, or leave the dataset out")
        present = [prefix for prefix in prefixes if is_there(prefix)]
        for dataset in map(dataset_of, present):
            if dataset.tokens(split.part) > 0:
                continue
            first, end = dataset.sequences(split.part)
            why = f", of which {first} to {end} hold no token"
            if first == end:
                why = f" and leaves none to {_WORDS[split.name]}"
            raise InputError(
                f"{split.where}: {dataset.prefix} has {len(dataset.lengths)} sequences (documents){why}; Megatron "
                "would look for some for ever. Give this split a larger share, or 0 to leave it out, or use "
                "--train-data-path (and --valid-data-path) with datasets of their own"
            )
        if weights is not None and split.name != "train":
            _check_weighted(split, wanted[split.name])
        if weights is None and len(prefixes) > 1 and present == prefixes:
            _check_unweighted(split, list(map(dataset_of, prefixes)), args, wanted[split.name])


def _check_presence(args: argparse.Namespace, names: set[str]) -> None:
    """Training and validation need data where they are asked for; a test without data is left out by Megatron."""
    if "train" not in names and not args.skip_train:
        given = f" with --split {args.split}" if args.data_path else ""
        raise InputError(
            f"the data paths{given}: nothing to train on; give --train-data-path, or a share of --data-path"
        )
    if "valid" not in names and (args.eval_iters or args.full_validation):
        asked = "--full-validation" if args.full_validation else f"--eval-iters {args.eval_iters}"
        raise InputError(
            f"{asked}: there is no validation data, and the evaluation after the last step would fail; give "
            "--valid-data-path (or a share of --split), or --eval-iters 0"
        )


def _check_weighted(split: Split, wanted: int | None) -> None:
    """A blend with weights is made for a number of sequences above 0."""
    if wanted is None:
        raise InputError(f"{split.where}: --full-validation reads every dataset once; leave the weights out")
    is_blend = len(split.blend[0]) > 1 or bool(split.shares)
    if is_blend and wanted == 0:
        raise InputError(
            f"{split.where}: nothing of the {_WORDS[split.name]} part is asked for (--eval-iters 0), and Megatron "
            "makes no such blend with weights; leave that part out, or give --eval-iters"
        )


def _check_unweighted(split: Split, datasets: list[Dataset], args: argparse.Namespace, wanted: int | None) -> None:
    """A blend without weights is read once: it must fill what is asked for, and every dataset one sequence."""
    length = args.seq_length
    counts = [(dataset.tokens(split.part) - 1) // length for dataset in datasets]
    for dataset, count in zip(datasets, counts, strict=True):
        if count == 0:
            raise InputError(
                f"{split.where}: the {_WORDS[split.name]} part of {dataset.prefix} has {dataset.tokens(split.part)} "
                f"tokens, no sequence of {length} (--seq-length); leave it out, or give every dataset a weight, with "
                "which it is repeated"
            )
    if wanted is not None and sum(counts) < wanted and args.dataloader_type == "single":
        raise InputError(
            f"{split.where}: a blend without weights is read once and has {sum(counts)} sequences of {length} for "
            f"{_WORDS[split.name]}, where {wanted} are asked for; give every dataset a weight, with which it is "
            "repeated, or ask for less"
        )


def wanted_sequences(args: argparse.Namespace) -> dict[str, int | None]:
    """How many sequences Megatron asks of each split; None where it takes all once (``training/training.py``)."""
    batch = args.global_batch_size
    eval_batch = args.eval_global_batch_size or batch
    eval_iters = args.eval_iters or 0
    steps = args.train_iters or (args.train_samples or 0) // batch
    evaluations = steps // args.eval_interval + 1
    if args.start_eval_at_iter is not None:
        evaluations = max(0, evaluations - args.start_eval_at_iter // args.eval_interval)
    if args.skip_train:
        evaluations = 1
    return {
        "train": 0 if args.skip_train else args.train_samples or steps * batch,
        "valid": None if args.full_validation else evaluations * eval_iters * eval_batch,
        "test": eval_iters * eval_batch,
    }
