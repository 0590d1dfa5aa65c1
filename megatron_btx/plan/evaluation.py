"""A stage that evaluates models: the loss of each on every domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.plan.sources import Model, data_origins, deciding_settings, locate, model_of
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.flags import (
    Flags,
    FlagValue,
    check_layout,
    check_measured,
    measured_batch,
    to_argv,
)
from megatron_btx.recipe.models import ModelSpec
from megatron_btx.recipe.names import EVALUATION_FILE
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.recipe.sections import EvaluateSection

EVALUATION_PROGRAM = "megatron_btx.evaluate"
_EXPERT_LAYOUT_FLAGS = ("expert-model-parallel-size", "expert-tensor-parallel-size")
"""Of mixtures alone."""


def plan_evaluation(recipe: Recipe, name: str, rows: Sequence[ModelSpec], how: EvaluateSection) -> Stage:
    """The stage ``name``, which evaluates the models of ``rows``, which have one architecture.

    Raises:
        InputError: a layout that does not fit, or fewer tokens than one batch.
    """
    data, layout = recipe.data, how.layout
    models = {row.name: model_of(row) for row in rows}
    model_flags = rows[0].flags
    without: dict[str, FlagValue] = {} if "num-experts" in model_flags else dict.fromkeys(_EXPERT_LAYOUT_FLAGS)
    flags = recipe.merge_flags(layout, how.megatron, model_flags, without)
    check_layout(name, layout.processes, flags)
    check_measured(name, how.tokens, layout.processes, flags)
    parents, inputs = data_origins(data, models.values(), recipe.domains, (how.split,))
    sets = {domain: data.evaluation_prefix(domain, how.split) for domain in recipe.domains}
    words = [*to_argv(flags), *_evaluation_words(name, models, sets, how.tokens)]
    return Stage(
        name,
        Program(EVALUATION_PROGRAM, tuple(words), is_distributed=True),
        parents,
        inputs=inputs,
        settings=_deciding(flags, models, sets, how),
        product=EVALUATION_FILE,
        processes=layout.processes,
        threads=layout.threads,
        on_gpu=True,
        kind="evaluate",
    )


def _evaluation_words(name: str, models: Mapping[str, Model], sets: Mapping[str, str], tokens: int) -> list[str]:
    words: list[str] = []
    for model_name, model in models.items():
        words += ["--btx-eval-model", f"{model_name}={model.path}"]
    for domain, prefix in sets.items():
        words += ["--btx-eval-data", f"{domain}={prefix}"]
    return [*words, "--btx-eval-tokens", str(tokens), "--btx-eval-output", f"{name}/{EVALUATION_FILE}"]


def _deciding(
    flags: Flags, models: Mapping[str, Model], sets: Mapping[str, str], how: EvaluateSection
) -> dict[str, Any]:
    """What decides the losses; of the tokens only whole batches are measured."""
    batch = measured_batch(how.layout.processes, flags)
    settings = deciding_settings({**flags, "btx-eval-tokens": how.tokens // batch * batch}, [])
    settings["models"] = list(models)
    for model_name, model in models.items():
        settings[f"model {model_name}"] = model.identity()
    for domain, prefix in sets.items():
        settings[f"data {domain}"] = locate(prefix)
    return settings
