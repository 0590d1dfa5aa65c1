"""``btx plan`` and ``btx run``, behind what the command line says; ``btx submit`` plans as they do."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_btx.common.errors import InputError
from megatron_btx.common.table import render
from megatron_btx.recipe.names import REPORT_STAGE
from megatron_btx.runner.api import ChangedStagesError, PlannedRun, plan_run
from megatron_btx.runner.decisions import SKIP, list_kept
from megatron_btx.runner.scripts import as_comment, one_line, shell_script
from megatron_btx.runner.tables import (
    Progress,
    describe_repeats,
    describe_total,
    make_plan_table,
)


def plan(arguments: argparse.Namespace) -> int:
    """``btx plan``: the stages of a recipe as a table."""
    planned = plan_as_asked(arguments, check=False)
    print(describe_plan(planned))
    return 0


def run(arguments: argparse.Namespace, show_report: Callable[[Path], None]) -> int:
    """``btx run``: plan the recipe, check it, and run it or print its commands; at the end its report is shown."""
    planned = plan_as_asked(arguments)
    if arguments.dry_run:
        table = as_comment(describe_plan(planned))
        script = shell_script(planned.chosen_stages(), planned.actions, planned.directory)
        print(table, script, table, sep="\n")  # on a terminal the first scrolls away
        return 0
    with Progress(planned.directory, planned.stages) as progress:
        outcome = planned.execute(progress)
    if outcome.failure:
        print(f"error: {outcome.failure}", file=sys.stderr, flush=True)
    has_report = any(stage.name == REPORT_STAGE for stage in planned.stages)
    if outcome.status == 0 and has_report and not arguments.only:
        show_report(planned.directory)
    return outcome.status


def plan_as_asked(arguments: argparse.Namespace, check: bool = True) -> PlannedRun:
    """The run that the command line asks for; what was read otherwise than it is written is said."""
    planned = plan_run(
        arguments.recipe,
        arguments.output,
        changes=arguments.set,
        only=arguments.only,
        rerun=arguments.rerun,
        use_gpus=not arguments.cpu,
    )
    for note in planned.notes:
        print(f"# note: {one_line(note)}", flush=True)
    try:
        if check:
            planned.check()
    except ChangedStagesError as error:
        _refuse_changes(arguments, planned, error)
    return planned


def describe_plan(planned: PlannedRun) -> str:
    """The table of a plan, the stages that are finished or have to be kept, and the estimate of the rest."""
    stages, actions = planned.chosen_stages(), planned.actions
    lines = [render(make_plan_table(stages, actions, str(planned.directory)))]
    finished = [stage.name for stage in stages if actions[stage.name].verb == SKIP]
    if finished:
        lines.append(f"finished: {', '.join(finished)}")
    kept = list_kept(actions, [stage.name for stage in stages])
    if kept:
        named = "; ".join(f"{name}: {one_line(why)}" for name, why in kept.items())
        meaning = "made otherwise, so btx run would stop; name them in --rerun, or give another --output"
        lines.append(f"keep: {meaning} ({named})")
    lines.append(describe_total(stages, actions))
    repeats = describe_repeats(stages, planned.recipe.data.texts)
    if repeats:
        lines.append(repeats)
    return "\n".join(lines)


def _refuse_changes(arguments: argparse.Namespace, planned: PlannedRun, error: ChangedStagesError) -> NoReturn:
    """Say what changed in which stage, and the command that would run them again. Always raises InputError."""
    for name, why in error.changed.items():
        print(f"{name}: {one_line(why)}", file=sys.stderr, flush=True)
    again = list(dict.fromkeys([*arguments.rerun, *error.changed]))
    command = ["btx", arguments.command, str(arguments.recipe), "--output", str(planned.directory)]
    for flag, words in (("--set", arguments.set), ("--only", arguments.only), ("--rerun", again)):
        if words:
            command += [flag, *words]
    if arguments.cpu:
        command.append("--cpu")
    raise InputError(
        f"{planned.directory}: what was made otherwise (above: {len(error.changed)}) is kept, and nothing was run; "
        f"take another --output, or to run them again beside their old folders: {shlex.join(command)}"
    )
