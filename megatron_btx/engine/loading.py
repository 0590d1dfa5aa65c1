"""Weights of a checkpoint into a model that is built, by Megatron's own loader."""

from __future__ import annotations

import pickle
from typing import Any


def load_weights(model: list[Any], path: str) -> None:
    """Load a checkpoint's weights with Megatron's own loader, from its root or one iteration folder."""
    from megatron.training import get_args
    from megatron.training.checkpointing import load_checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_btx.checkpoint.iterations import resolve_iteration
    from megatron_btx.engine.restricted_loading import cause_of, loading_failed

    folder = resolve_iteration(path)
    args = get_args()
    args.load, args.finetune, args.no_load_optim, args.no_load_rng = str(folder.parent), True, True, True
    args.ckpt_step = int(folder.name.removeprefix("iter_")) if folder.name.startswith("iter_") else None
    try:
        load_checkpoint(model, None, None)
    except (CheckpointException, pickle.UnpicklingError) as failure:
        raise loading_failed(path, failure) from cause_of(failure)
