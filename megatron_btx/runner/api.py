"""Run a recipe: ``megatron_btx.run`` from Python, and what the commands that take a recipe do."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.common.errors import InputError, printable
from megatron_btx.common.table import render
from megatron_btx.plan.checks import check_inputs, check_with_megatron
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.flags import MissingFlagError
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.names import MODELS_FILE, PLAN_FILE, RECIPE_FILE, REPORT_STAGE
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.runner.decisions import (
    RERUN,
    RUN,
    SKIP,
    Action,
    ChangedStagesError,
    check_chosen,
    check_kept,
    decide,
    list_kept,
)
from megatron_btx.runner.local import Machine, RunError, execute_stages
from megatron_btx.runner.run_dir import check_run, read_stage_manifest
from megatron_btx.runner.schemas import StageManifest
from megatron_btx.runner.scripts import as_comment, shell_script
from megatron_btx.runner.tables import Progress, Reporter, describe_repeats, describe_total, make_plan_table


@dataclass(frozen=True)
class PlannedRun:
    """What a run would do. Nothing of it is written yet."""

    recipe: Recipe
    stages: list[Stage]
    directory: Path
    actions: Mapping[str, Action]
    chosen: list[str]
    rerun: Sequence[str]
    use_gpus: bool
    notes: tuple[str, ...] = ()
    """What was read otherwise than it is written, and what the converter warns of."""

    def chosen_stages(self) -> list[Stage]:
        """The stages that are to run, or are finished already."""
        return [stage for stage in self.stages if stage.name in self.chosen]

    def check(self) -> None:
        """Refuse what would stop the run, with Megatron's own checks of what trains and evaluates.

        Raises:
            ChangedStagesError: stages of other settings lie there.
            InputError: the place in the recipe or the stage, and what the programs would refuse.
        """
        check_kept(self.directory, self.actions, self.chosen)
        due = [stage for stage in self.stages if stage.on_gpu and self.actions[stage.name].verb in (RUN, RERUN)]
        if due:
            check_with_megatron(self.recipe.file, self.recipe.flag_sections, due, self.use_gpus)

    def execute(self, reporter: Reporter) -> None:
        """Run the stages; see :func:`execute_stages`."""
        machine = Machine.found(self.use_gpus)
        execute_stages(self.stages, self.directory, machine, reporter, self.chosen, self.records(), self.rerun)

    def records(self) -> dict[str, str]:
        """Name -> text of the files that say what the run is planned to be."""
        return {
            PLAN_FILE: json.dumps(list_planned(self.stages), indent=1) + "\n",
            MODELS_FILE: json.dumps([row.describe() for row in self.recipe.models.values()], indent=1) + "\n",
            RECIPE_FILE: yaml.safe_dump(self.recipe.tree, sort_keys=False),
        }

    def describe(self) -> str:
        """A table of the plan, the stages that are finished or have to be kept, and the estimate of the rest."""
        stages, actions = self.chosen_stages(), self.actions
        lines = [render(make_plan_table(stages, actions, str(self.directory)))]
        finished = [stage.name for stage in stages if actions[stage.name].verb == SKIP]
        if finished:
            lines.append(f"finished: {', '.join(finished)}")
        kept = list_kept(actions, self.chosen)
        if kept:
            named = "; ".join(f"{name}: {printable(why)}" for name, why in kept.items())
            meaning = "made otherwise, so btx run would stop; name them in --rerun, or give another --output"
            lines.append(f"keep: {meaning} ({named})")
        lines += [describe_total(stages, actions), describe_repeats(stages, self.recipe.data.texts)]
        return "\n".join(filter(None, lines))


def list_planned(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What a run's plan says of each stage. The fingerprint tells its report what is of the recipe, and what is not."""
    known = identities(stages)
    entries: list[dict[str, Any]] = []
    for stage in stages:
        fingerprint = None if stage.only_shows else known[stage.name].fingerprint
        entry = {"stage": stage.name, "steps": stage.iterations, "tokens": stage.tokens, "fingerprint": fingerprint}
        entries.append(entry)
    return entries


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
    directory = Path(output or Path("runs", read.name)).resolve()
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
    silent = contextlib.nullcontext(Reporter())
    with Progress(planned.directory, planned.stages) if show_progress else silent as reporter:
        planned.execute(reporter)
    manifests = {stage.name: read_stage_manifest(planned.directory / stage.name) for stage in planned.chosen_stages()}
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
        print(f"# note: {printable(note)}", flush=True)
    if arguments.command == "plan":
        return planned
    try:
        planned.check()
    except ChangedStagesError as error:
        for name, why in error.changed.items():
            print(f"{name}: {printable(why)}", file=sys.stderr, flush=True)
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
