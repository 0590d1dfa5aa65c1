"""A stage that evaluates models: the loss of each on every domain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched
from pathlib import Path

from megatron_btx.plan.fingerprint import deciding_settings, locate
from megatron_btx.plan.sources import data_origins, model_of
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.flags import FlagValue, check_layout, check_measured, measured_batch, to_argv
from megatron_btx.recipe.models import Ensemble, ModelSpec
from megatron_btx.recipe.names import EVALUATION_FILE, TRAIN_SPLIT
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.recipe.sections import EvaluateSection

_EXPERT_LAYOUT_FLAGS = ("expert-model-parallel-size", "expert-tensor-parallel-size")
"""Of mixtures alone."""


def plan_evaluation(recipe: Recipe, name: str, rows: Sequence[ModelSpec], how: EvaluateSection) -> Stage:
    """The stage ``name``, which evaluates the models of ``rows``, all of one architecture.

    Raises InputError for a layout that does not fit, or fewer tokens than one batch.
    """
    data, layout = recipe.data, how.layout
    models = {row.name: model_of(row) for row in rows if not isinstance(row.make, Ensemble)}
    ensembles = [row.make for row in rows if isinstance(row.make, Ensemble)]
    model_flags = rows[0].flags
    without: dict[str, FlagValue] = {} if "num-experts" in model_flags else dict.fromkeys(_EXPERT_LAYOUT_FLAGS)
    flags = recipe.merge_flags(layout, how.megatron, model_flags, without)
    check_layout(name, layout.processes, flags)
    check_measured(name, how.tokens, layout.processes, flags)
    batch = measured_batch(layout.processes, flags)  # of the tokens only whole batches are measured
    settings = deciding_settings({**flags, "btx-eval-tokens": how.tokens // batch * batch})
    settings["models"] = list(models)
    words = to_argv(flags)
    for model_name, model in models.items():
        words += ["--btx-eval-model", f"{model_name}={model.path}"]
        settings[f"model {model_name}"] = model.identity()
    for domain in recipe.domains:
        prefix = data.evaluation_prefix(domain, how.split)
        words += ["--btx-eval-data", f"{domain}={prefix}"]
        settings[f"data {domain}"] = locate(prefix)
    words += ["--btx-eval-tokens", str(how.tokens), "--btx-eval-output", f"{name}/{EVALUATION_FILE}"]
    parents, inputs = data_origins(data, models.values(), recipe.domains, (how.split,))
    if ensembles:
        chosen = ["--btx-btm-top-k", *map(str, dict.fromkeys(each.top_k for each in ensembles))]
        chosen += ["--btx-btm-weights", *dict.fromkeys(each.weights for each in ensembles)]
        settings["btm"] = chosen
        words += [*chosen, "--btx-btm-member"]
        for member, blend in ensembles[0].members.items():
            texts = data.blend_words(blend, TRAIN_SPLIT) or ()
            settings[f"btm {member}"] = [locate(word) for word in texts]
            words += [f"{member}={share}:{prefix}" for share, prefix in batched(texts, 2)]
            inputs = (*inputs, *(Path(prefix) for prefix in texts[1::2] if not data.is_made(prefix)))
    return Stage(
        name,
        Program("megatron_btx.evaluate", tuple(words), is_distributed=True),
        parents,
        inputs=inputs,
        settings=settings,
        product=EVALUATION_FILE,
        processes=layout.processes,
        threads=layout.threads,
        on_gpu=True,
        kind="evaluate",
    )
