"""From a recipe to its graph of stages: a stage for every model that is made, and for every group that is measured.

    data -> seed -> expert-* -> mix              -> finetune -> evaluate-moe -> report
                             -> evaluate-experts -> finetune    (bounds its first loss)
                 -> dense-domains -> dense       -> evaluate-dense

A model that is given has no stage: its children read the given path, or its import.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_btx.plan.convert import plan_data, plan_export, plan_import, plan_mix
from megatron_btx.plan.evaluation import plan_evaluation
from megatron_btx.plan.sources import import_stage, model_of
from megatron_btx.plan.stage import Program, Stage, sort_stages
from megatron_btx.plan.training import plan_training
from megatron_btx.recipe.models import Given, Mix, ModelSpec, Train
from megatron_btx.recipe.names import ABLATION_REPORT_FILE, REPORT_FILE, REPORT_STAGE
from megatron_btx.recipe.options import option_words
from megatron_btx.recipe.recipe import Recipe


def plan_stages(recipe: Recipe) -> list[Stage]:
    """The stages of ``recipe``, parents first. Raises InputError for budgets and layouts that do not fit."""
    stages = [plan_data(recipe.data)] if recipe.data.are_made() else []
    stages += _evaluations(recipe)
    for row in recipe.models.values():
        if isinstance(row.make, Train):
            stages.append(plan_training(recipe, row))
        elif isinstance(row.make, Mix):
            stages.append(plan_mix(recipe, row))
    exported, export = recipe.find_role("btx"), recipe.sections.export
    if export and exported is not None:
        stages.append(plan_export(model_of(exported), export.format, option_words(export)))
    measured = _measured(recipe)
    if measured:
        page = ABLATION_REPORT_FILE if recipe.sections.ablation else REPORT_FILE
        program = Program("megatron_btx.report.build", (".",))
        stages.append(Stage(REPORT_STAGE, program, measured, product=page, settings={}, only_shows=True, kind="report"))
    return sort_stages([*_imports(recipe, stages), *stages])


def _evaluations(recipe: Recipe) -> list[Stage]:
    """A stage for every group of models that is measured together."""
    if recipe.evaluation is None:
        return []
    groups: dict[str, list[ModelSpec]] = {}
    for row in recipe.models.values():
        if row.evaluated_in:
            groups.setdefault(row.evaluated_in, []).append(row)
    return [plan_evaluation(recipe, name, rows, recipe.evaluation) for name, rows in groups.items()]


def _measured(recipe: Recipe) -> tuple[str, ...]:
    """The stages whose measurements the report shows: evaluations, and finetunings that are variants."""
    if recipe.evaluation is None:
        return ()
    rows = recipe.models.values()
    variants = [row.stage for row in rows if row.variant]
    return tuple(variants or dict.fromkeys(row.evaluated_in for row in rows if row.evaluated_in))


def _imports(recipe: Recipe, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that import those given models that one of ``stages`` loads."""
    loaded: set[str] = set()
    for stage in stages:
        loaded.update(stage.parents)
    imports = []
    for row in recipe.models.values():
        if isinstance(row.make, Given) and import_stage(row) in loaded:
            imports.append(plan_import(import_stage(row), row.make.path, row.make.options))
    return imports
