"""A planned run: a recipe, its stages, and what would happen to each of them in a run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.common.table import render
from megatron_btx.plan.checks import check_with_megatron
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.names import MODELS_FILE, PLAN_FILE, RECIPE_FILE
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.runner.decisions import RERUN, RUN, SKIP, Action, check_kept, list_kept
from megatron_btx.runner.local import Machine, execute_stages
from megatron_btx.runner.scripts import one_line
from megatron_btx.runner.tables import Reporter, describe_repeats, describe_total, make_plan_table


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
            named = "; ".join(f"{name}: {one_line(why)}" for name, why in kept.items())
            meaning = "made otherwise, so btx run would stop; name them in --rerun, or give another --output"
            lines.append(f"keep: {meaning} ({named})")
        lines.append(describe_total(stages, actions))
        repeats = describe_repeats(stages, self.recipe.data.texts)
        if repeats:
            lines.append(repeats)
        return "\n".join(lines)


def list_planned(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What a run's plan says of each stage. The fingerprint tells its report what is of the recipe, and what is not."""
    known = identities(stages)
    entries: list[dict[str, Any]] = []
    for stage in stages:
        fingerprint = None if stage.only_shows else known[stage.name].fingerprint
        entry = {"stage": stage.name, "steps": stage.iterations, "tokens": stage.tokens, "fingerprint": fingerprint}
        entries.append(entry)
    return entries
