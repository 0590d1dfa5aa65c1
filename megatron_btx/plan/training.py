"""A stage that trains: its flags, its budget, its checks, and what decides its result."""

from __future__ import annotations

from megatron_btx.plan.fingerprint import deciding_settings
from megatron_btx.plan.sources import data_origins, model_of
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.budgets import batch_tokens, padded_vocabulary, training_flops, training_steps
from megatron_btx.recipe.flags import FlagValue, check_layout, check_measured, check_saving, merged, to_argv
from megatron_btx.recipe.models import ModelSpec, Train
from megatron_btx.recipe.names import (
    CHECKPOINT_FOLDER,
    DATA_CACHE_FOLDER,
    EVALUATE_EXPERTS_STAGE,
    EVALUATION_FILE,
    METRICS_FILE,
    TRACKER_FILE,
    TRAIN_SPLIT,
    VALID_SPLIT,
)
from megatron_btx.recipe.recipe import Recipe

_WARMUP_FRACTION = 0.05
"""Share of a stage's steps in which the learning rate rises, where the recipe does not say it."""


def plan_training(recipe: Recipe, row: ModelSpec) -> Stage:
    """The stage that trains ``row``. Raises InputError for a budget or a layout that does not fit."""
    train, budget, data = row.make, row.budget, recipe.data
    assert isinstance(train, Train) and budget is not None
    processes = train.layout.processes
    watching: dict[str, FlagValue] = {}
    if train.watch is not None:  # on the text that the experts are evaluated on, whose loss bounds the first
        split = train.watch.split
        watching["btx-valid-data"] = tuple(f"{name}={data.evaluation_prefix(name, split)}" for name in recipe.domains)
        watching["btx-valid-tokens"] = train.watch.tokens
        watching["btx-first-loss-bound"] = f"{EVALUATE_EXPERTS_STAGE}/{EVALUATION_FILE}"
        if train.watch_interval is not None:
            watching["eval-interval"] = train.watch_interval
    given = recipe.merge_flags(train.layout, train.megatron, {**row.flags, **watching}, train.last_flags)
    steps = training_steps(row.stage, budget.tokens, given)
    check_layout(row.stage, processes, given)
    check_saving(row.stage, given)
    if train.watch is not None:
        check_measured(row.stage, train.watch.tokens, processes, given)

    own: dict[str, FlagValue] = {"train-iters": steps}
    if "lr-decay-iters" not in given and "lr-decay-samples" not in given:
        own["lr-decay-iters"] = steps
    if not any(name.startswith("lr-warmup-") and name != "lr-warmup-init" for name in given):
        own["lr-warmup-fraction"] = _WARMUP_FRACTION
    own["train-data-path"] = data.blend_words(budget.blend, TRAIN_SPLIT)
    if given.get("eval-iters") != 0:  # Megatron refuses a validation set of which it needs no sample
        own["valid-data-path"] = data.blend_words(budget.blend, VALID_SPLIT)
    own["data-cache-path"] = f"{row.stage}/{DATA_CACHE_FOLDER}"
    own["save"] = own["load"] = f"{row.stage}/{CHECKPOINT_FOLDER}"
    starts = []
    if train.start is not None:
        starts.append(model_of(recipe.models[train.start]))
        own["pretrained-checkpoint"] = starts[0].path
    own["btx-metrics"] = f"{row.stage}/{METRICS_FILE}"
    flags = merged(given, own)

    tokens = steps * batch_tokens(flags)
    vocabulary = padded_vocabulary(flags, data.vocabulary_size)
    parents, inputs = data_origins(data, starts, budget.blend, (TRAIN_SPLIT, VALID_SPLIT))
    return Stage(
        row.stage,
        Program("megatron_btx.pretrain", tuple(to_argv(flags)), is_distributed=True),
        parents,
        (EVALUATE_EXPERTS_STAGE,) if train.watch is not None else (),
        inputs,
        settings=deciding_settings(flags),
        product=TRACKER_FILE,
        processes=processes,
        threads=train.layout.threads,
        on_gpu=True,
        resumable=True,
        cluster=train.cluster,
        model=row.name,
        iterations=steps,
        tokens=tokens,
        flops=training_flops(flags, tokens, vocabulary) if vocabulary is not None else None,
        config={"flags": {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}},
    )
