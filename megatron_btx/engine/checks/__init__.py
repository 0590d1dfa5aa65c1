"""What a command line, a layout, a checkpoint or a resume may not be, in one line before any rank trains."""

from __future__ import annotations

import argparse

from megatron_btx.engine.checks.layout import check_checkpoint_format, check_layout
from megatron_btx.engine.checks.routing import check_finetuning
from megatron_btx.engine.checks.useless_flags import check_flags

CHECKS = (check_flags, check_checkpoint_format, check_layout, check_finetuning)
"""Checks of the parsed arguments alone, in the order in which they are made."""


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what makes no sense, before a run costs anything.

    Raises:
        InputError: one line that names the flag, what was found and the remedy.
    """
    for check in CHECKS:
        check(args)
