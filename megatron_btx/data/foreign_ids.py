"""Token ids that no token of the run has: looked for in every batch while it still lies in the host's memory.

Past that point they do harm. One process ends in an index error of its embedding; tensor-parallel ranks give such an
id a row of zeros and train on, without a word. The look costs some 5 microseconds per sequence of 4096.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from megatron.training import get_tokenizer

from megatron_btx.common.errors import InputError
from megatron_btx.data.description import ALLOWANCE
from megatron_btx.data.splits import splits_of

_SHOWN = 3


class ForeignIdError(InputError):
    """A batch holds an id beyond the vocabulary."""


def vocabulary_end(args: argparse.Namespace) -> int:
    """The first id that no token has; rows of padding count where another tokenizer's datasets are allowed."""
    rows, tokens = args.padded_vocab_size, get_tokenizer().vocab_size
    if tokens is None or ALLOWANCE in args.btx_allow_change:
        return int(rows)
    return int(min(rows, tokens))


def check_batch(batch: Mapping[str, Any], args: argparse.Namespace, training: bool) -> None:
    """Refuse a micro-batch with an id beyond the vocabulary.

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
        if smallest < 0 or largest >= end:
            raise ForeignIdError(_refusal(ids_BS, batch.get("dataset_id"), end, args, training))


def _refusal(
    ids_BS: torch.Tensor, dataset_B: torch.Tensor | None, end: int, args: argparse.Namespace, training: bool
) -> str:
    row, column = torch.nonzero((ids_BS < 0) | (ids_BS >= end))[0].tolist()
    found: dict[str, None] = {}
    for split in splits_of(args):
        if (split.name == "train") == training:
            found |= dict.fromkeys(split.blend[0])
    names = list(found)
    if training and dataset_B is not None:
        names = [names[int(dataset_B[row])]]
    shown = ", ".join(names[:_SHOWN])
    if len(names) > _SHOWN:
        shown += ", ..."
    when = f"the evaluation after step {args.curr_iteration}"
    if training:
        when = f"step {args.curr_iteration + 1}"
    return (
        f"{shown}: token {column} of a sequence in {when} has the id {int(ids_BS[row, column])}, and the vocabulary of "
        f"this run ends at {end - 1}; all ranks stop and nothing more is saved. Make the dataset with this run's "
        "tokenizer (tools/preprocess_data.py), or give the tokenizer it was made with"
    )


def check_text(ids: Any, where: str, args: argparse.Namespace) -> None:
    """Refuse a text of ids that is measured, as :func:`check_batch` does; every rank sees all of it."""
    end = vocabulary_end(args)
    if len(ids) and not 0 <= ids.min() <= ids.max() < end:
        foreign = ids.min() if ids.min() < 0 else ids.max()
        raise ForeignIdError(
            f"{where}: holds the token id {int(foreign)}, and the vocabulary of this run ends at {end - 1}; make it "
            "with this run's tokenizer (tools/preprocess_data.py), or give the tokenizer it was made with"
        )
