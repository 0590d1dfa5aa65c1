"""From a recipe to its graph of stages: a stage for every model that is made, and for every group that is measured.

    data -> seed -> expert-* -> mix              -> finetune -> evaluate-moe -> report
                             -> evaluate-experts -> finetune    (bounds its first loss)
                 -> dense-domains -> dense       -> evaluate-dense

A model that is given has no stage: its children read the given path, or its import.
"""

from __future__ import annotations

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
    rows = recipe.models.values()
    measured: dict[str, list[ModelSpec]] = {}
    if recipe.evaluation is not None:
        for row in rows:
            if row.evaluated_in:
                measured.setdefault(row.evaluated_in, []).append(row)
        for name, group in measured.items():
            stages.append(plan_evaluation(recipe, name, group, recipe.evaluation))
    for row in rows:
        if isinstance(row.make, Train):
            stages.append(plan_training(recipe, row))
        elif isinstance(row.make, Mix):
            stages.append(plan_mix(recipe, row))
    exported, export = recipe.find_role("btx"), recipe.sections.export
    if export and exported is not None:
        stages.append(plan_export(model_of(exported), export.format, option_words(export)))
    variants = [row.stage for row in rows if row.variant]  # measured while they are finetuned
    if recipe.evaluation is not None and (variants or measured):
        page = ABLATION_REPORT_FILE if recipe.sections.ablation else REPORT_FILE
        program, shown = Program("megatron_btx.report.build", (".",)), tuple(variants or measured)
        stages.append(Stage(REPORT_STAGE, program, shown, product=page, settings={}, only_shows=True, kind="report"))
    loaded = {parent for stage in stages for parent in stage.parents}
    imports = []
    for row in rows:
        if isinstance(row.make, Given) and import_stage(row) in loaded:
            imports.append(plan_import(import_stage(row), row.make.path, row.make.options))
    return sort_stages([*imports, *stages])
