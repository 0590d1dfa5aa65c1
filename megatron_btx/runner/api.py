"""Run a recipe: ``megatron_btx.run`` from Python, and what the commands that take a recipe do."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.common.errors import InputError
from megatron_btx.plan.checks import check_inputs, check_with_megatron
from megatron_btx.plan.planner import plan_stages
from megatron_btx.recipe.flags import MissingFlagError
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.names import REPORT_STAGE
from megatron_btx.runner.decisions import RERUN, RUN, ChangedStagesError, check_chosen, decide
from megatron_btx.runner.local import RunError
from megatron_btx.runner.planned import PlannedRun
from megatron_btx.runner.run_dir import check_run, read_stage_manifest
from megatron_btx.runner.schemas import StageManifest
from megatron_btx.runner.scripts import as_comment, one_line, shell_script
from megatron_btx.runner.tables import Progress, Reporter

RUNS_FOLDER = Path("runs")
"""Where a run goes whose directory is not given."""


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end."""

    directory: Path
    stages: Mapping[str, StageManifest]
    """Stage -> its manifest: settings, parents, steps, tokens, FLOPs, seconds."""

    @property
    def report(self) -> Path | None:
        """The report's page; None for a run that evaluates nothing."""
        page = self.directory / REPORT_STAGE / "index.html"
        return page if page.is_file() else None


def plan_run(
    recipe: str | Path,
    output: str | Path | None = None,
    *,
    changes: Sequence[str] = (),
    only: Sequence[str] = (),
    rerun: Sequence[str] = (),
    use_gpus: bool = True,
) -> PlannedRun:
    """What :func:`run` with the same arguments would do. Nothing is written.

    Raises:
        InputError: the recipe, its models and texts, the run directory, or the choice of stages.
    """
    read = load_recipe(recipe, changes)
    try:
        stages = plan_stages(read)
    except InputError as error:
        if isinstance(error, MissingFlagError):
            # What is missing may be there with a slip in its name, which says more.
            check_with_megatron(read.file, read.flag_sections, use_gpus=use_gpus)
        raise InputError(f"{read.file}: {error}") from None
    directory = Path(output or RUNS_FOLDER / read.name).resolve()
    check_run(directory)
    actions = decide(stages, directory, rerun)
    chosen = list(only) or list(actions)
    check_chosen(stages, actions, chosen)
    for name in rerun:
        if name not in chosen:
            raise InputError(f"--rerun {name}: not among the stages of --only; add it there")
    due = [name for name in chosen if actions[name].verb in (RUN, RERUN)]
    notes = (*read.notes, *check_inputs(read, stages, due))
    return PlannedRun(read, stages, directory, actions, chosen, rerun, use_gpus, notes)


def run(
    recipe: str | Path,
    output: str | Path | None = None,
    *,
    changes: Sequence[str] = (),
    only: Sequence[str] = (),
    rerun: Sequence[str] = (),
    use_gpus: bool = True,
    show_progress: bool = False,
) -> RunResult:
    """Run a recipe: train, mix, finetune, evaluate, report. Finished stages are skipped, stopped ones go on.

    Args:
        recipe: a YAML file, as examples/recipes/quickstart.yaml.
        output: the run directory; runs/NAME where none is given.
        changes: KEY=VALUE each, as "seed.tokens=1000".
        only: stages to run; all where none is named.
        rerun: stages that run again whatever is there; their old folders stay beside them, dated.
        use_gpus: False to stay on the CPU whatever the machine has.
        show_progress: print a table or lines while it goes on.

    Raises:
        InputError: the recipe, the run directory, the choice, or a setting that a program would refuse.
        ChangedStagesError: finished stages were made with other settings; nothing was run.
        RunError: a stage failed, or a signal stopped the run.
    """
    planned = plan_run(recipe, output, changes=changes, only=only, rerun=rerun, use_gpus=use_gpus)
    planned.check()
    if show_progress:
        with Progress(planned.directory, planned.stages) as progress:
            planned.execute(progress)
    else:
        planned.execute(Reporter())
    names = [stage.name for stage in planned.chosen_stages()]
    manifests = {name: read_stage_manifest(planned.directory / name) for name in names}
    return RunResult(planned.directory, manifests)


def plan_as_asked(arguments: argparse.Namespace) -> PlannedRun:
    """The run that a command line asks for; what was read otherwise than it is written is said.

    Megatron is asked by all commands but ``btx plan``. Where stages were made otherwise it is said what changed in
    which, and the command that would run them again.
    """
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
    if arguments.command == "plan":
        return planned
    try:
        planned.check()
    except ChangedStagesError as error:
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
        ) from None
    return planned


def run_planned(planned: PlannedRun, show_report: Callable[[Path], None]) -> int:
    """``btx run``: run all that is planned; when it ends well, the report is shown where all stages were chosen."""
    try:
        with Progress(planned.directory, planned.stages) as progress:
            planned.execute(progress)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status
    if REPORT_STAGE in planned.chosen and len(planned.chosen) == len(planned.stages):
        show_report(planned.directory)
    return 0


def print_commands(planned: PlannedRun) -> None:
    """``btx run --dry-run``: the plan, and a shell script that does it."""
    table = as_comment(planned.describe())
    script = shell_script(planned.chosen_stages(), planned.actions, planned.directory)
    print(table, script, table, sep="\n")  # on a terminal the first scrolls away
