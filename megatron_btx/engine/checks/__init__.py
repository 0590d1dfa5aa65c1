"""What a command line, a layout, a checkpoint or a resume may not be, in one line before any rank trains."""

from __future__ import annotations

import argparse

from megatron_btx.engine.checks.arguments import (
    check_bias,
    check_budget,
    check_checkpoint_format,
    check_evaluation_interval,
    check_layout,
    check_retention,
    check_seed,
)
from megatron_btx.engine.checks.routing import check_routing
from megatron_btx.engine.checks.unsupported_flags import check_flags
from megatron_btx.engine.options import Options, resolve_options

CHECKS = (check_checkpoint_format, check_layout, check_routing, check_flags)
"""Checks of the parsed arguments alone that every program makes, in their order."""
TRAINING_CHECKS = (check_budget, check_evaluation_interval, check_seed, check_bias, check_retention)
"""Those that training makes after them."""


def check_arguments(args: argparse.Namespace, trains: bool = False) -> Options:
    """Refuse what makes no sense, before a run costs anything.

    Args:
        trains: of the training program.

    Returns:
        What our flags ask for.

    Raises:
        InputError: one line that names the flag, what was found and the remedy.
    """
    options = resolve_options(args)
    for check in CHECKS:
        check(args)
    if trains:
        for check in TRAINING_CHECKS:
            check(args)
    return options
