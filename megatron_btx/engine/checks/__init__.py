"""What a command line, a layout, a checkpoint or a resume may not be, in one line before any rank trains."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from megatron_btx.common.errors import InputError
from megatron_btx.engine.checks import arguments
from megatron_btx.engine.checks.arguments import Refusal
from megatron_btx.engine.checks.routing import of_routing
from megatron_btx.model.groups import resolve_groups

ROWS = (
    arguments.of_formats,
    arguments.of_layout,
    of_routing,
    arguments.of_other_programs,
    arguments.of_the_schedule,
    arguments.of_rates,
    arguments.that_fail_late,
)
"""Refusals of the parsed arguments alone that every program makes, in their order."""
TRAINING_ROWS = (arguments.of_budget, arguments.of_training, arguments.of_retention)
"""Those that training makes after them."""


def check_arguments(args: argparse.Namespace, trains: bool = False) -> None:
    """Refuse what makes no sense, before a run costs anything; ``trains`` says that the training program asks.

    Raises:
        InputError: one line that names the flag, what was found and the remedy.
    """
    resolve_groups(vars(args))
    for rows in ROWS + (TRAINING_ROWS if trains else ()):
        refuse(rows(args))


def refuse(rows: Iterable[Refusal]) -> None:
    """Raise InputError for the first row that says so."""
    for given, is_wrong, why in rows:
        if is_wrong:
            raise InputError(f"{given}: {why}")
