"""Run a recipe: ``megatron_btx.run`` from Python, and ``btx plan`` and ``btx run`` behind their command lines."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_btx.common.errors import BTXError, InputError
from megatron_btx.common.table import render
from megatron_btx.plan.checks import check_inputs, check_with_megatron
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.flags import MissingFlagError
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.names import MODELS_FILE, PLAN_FILE, RECIPE_FILE, REPORT_STAGE
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.runner.decisions import RERUN, RUN, SKIP, Action, check_chosen, decide, list_kept
from megatron_btx.runner.local import Machine, Outcome, execute_stages
from megatron_btx.runner.run_dir import check_run, read_stage_manifest
from megatron_btx.runner.schemas import StageManifest
from megatron_btx.runner.scripts import as_comment, one_line, shell_script
from megatron_btx.runner.tables import (
    Progress,
    Reporter,
    describe_repeats,
    describe_total,
    make_plan_table,
)

RUNS_FOLDER = Path("runs")
"""Where a run goes whose directory is not given."""


class ChangedStagesError(InputError):
    """Stages were made with other settings than the recipe has now. They are kept, and nothing was run."""

    def __init__(self, directory: Path, changed: Mapping[str, str]) -> None:
        self.changed = dict(changed)
        """Stage -> what changed."""
        listed = "; ".join(f"{name}: {why}" for name, why in changed.items())
        super().__init__(f"{directory}: made otherwise: {listed}; name them in rerun, or give another output")


class RunError(BTXError):
    """A stage failed, or a signal stopped the run."""

    def __init__(self, outcome: Outcome) -> None:
        self.status = outcome.status
        """Exit status: 1 or 2 (bad input) after a failed stage, 128 + n after signal n."""
        super().__init__(outcome.failure)


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
        if page.is_file():
            return page
        return None


@dataclass(frozen=True)
class PlannedRun:
    """A recipe, its stages, and what would happen to each of them in a run directory."""

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
        changed = list_kept(self.actions, self.chosen)
        if changed:
            raise ChangedStagesError(self.directory, changed)
        due = [stage for stage in self.stages if stage.on_gpu and self.actions[stage.name].verb in (RUN, RERUN)]
        if due:
            check_with_megatron(self.recipe.file, self.recipe.flag_sections, due, self.use_gpus)

    def execute(self, reporter: Reporter) -> Outcome:
        """Run the stages. Raises InputError where jobs of Slurm are at work on them."""
        machine = Machine.found(self.use_gpus)
        return execute_stages(
            self.stages, self.directory, machine, reporter, self.chosen, records=self.records(), rerun=self.rerun
        )

    def records(self) -> dict[str, str]:
        """Name -> text of the files that say what the run is planned to be."""
        return {
            PLAN_FILE: json.dumps(list_planned(self.stages), indent=1) + "\n",
            MODELS_FILE: json.dumps([row.describe() for row in self.recipe.models.values()], indent=1) + "\n",
            RECIPE_FILE: yaml.safe_dump(self.recipe.tree, sort_keys=False),
        }


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
            outcome = planned.execute(progress)
    else:
        outcome = planned.execute(Reporter())
    if outcome.status:
        raise RunError(outcome)
    manifests = {}
    for stage in planned.chosen_stages():
        manifests[stage.name] = read_stage_manifest(planned.directory / stage.name) or StageManifest()
    return RunResult(planned.directory, manifests)


def list_planned(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What a run's plan says of each stage. The fingerprint tells its report what is of the recipe, and what is not."""
    known = identities(stages)
    entries: list[dict[str, Any]] = []
    for stage in stages:
        fingerprint = None if stage.only_shows else known[stage.name].fingerprint
        entry = {"stage": stage.name, "steps": stage.iterations, "tokens": stage.tokens, "fingerprint": fingerprint}
        entries.append(entry)
    return entries


def plan_command(arguments: argparse.Namespace) -> int:
    """``btx plan``: the stages of a recipe as a table."""
    planned = plan_as_asked(arguments, check=False)
    print(describe_plan(planned))
    return 0


def run_command(arguments: argparse.Namespace, show_report: Callable[[Path], None]) -> int:
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
