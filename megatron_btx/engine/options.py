"""Our flags by what they mean, resolved once; programs carry them beside Megatron's arguments.

Not on the arguments: Megatron stores those in every checkpoint, and reads no class of ours back. What our routers do is
resolved with the model, in :mod:`megatron_btx.model.routers`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.common.cli_args import read_pairs
from megatron_btx.common.errors import InputError
from megatron_btx.model.groups import TrainedGroups, resolve_groups


@dataclass(frozen=True)
class Options:
    """What the flags ``--btx-...`` of a training run ask for."""

    groups: TrainedGroups
    """Which parameters train, and at what rates."""
    keep_last: int | None
    """How many whole checkpoints stay; None for all."""
    keep_every: int | None
    """Beside them those whose step is a multiple of this."""
    skip_bad_steps: bool
    """Steps of NaN change nothing; else Megatron stops at them."""
    spike_sigma: float | None
    """How many standard deviations above the last steps' mean is a bad step, too."""
    metrics: Path | None
    """File that gets a line for every step."""
    valid_texts: Mapping[str, str]
    """Domain -> prefix of a dataset, or a text file, whose loss is taken while training."""
    valid_tokens: int
    """Tokens of each of them."""
    first_loss_bound: float | Path | None
    """Largest sound loss of a mixture's first step, in nats; or the evaluation of the experts that bounds it."""


def resolve_options(args: argparse.Namespace) -> Options:
    """The options of parsed arguments.

    Raises:
        InputError: names the flag, what was found and what was expected.
    """
    return Options(
        groups=resolve_groups(vars(args)),
        keep_last=args.btx_keep_last,
        keep_every=args.btx_keep_every,
        skip_bad_steps=args.btx_skip_bad_steps,
        spike_sigma=args.btx_spike_sigma,
        metrics=args.btx_metrics and Path(args.btx_metrics),
        valid_texts=read_pairs(args.btx_valid_data, "--btx-valid-data"),
        valid_tokens=args.btx_valid_tokens,
        first_loss_bound=_read_bound(args.btx_first_loss_bound),
    )


def _read_bound(text: str | None) -> float | Path | None:
    """A number of nats, or the file that it comes from."""
    if text is None:
        return None
    bound = math.nan
    try:
        bound = float(text)
    except ValueError:
        if text:
            return Path(text)
    if not 0 < bound < math.inf:
        raise InputError(
            f"--btx-first-loss-bound {text}: expected a loss above 0 in nats per token, or a file of "
            "megatron_btx.evaluate"
        )
    return bound
