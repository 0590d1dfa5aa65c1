"""A stage that trains: its flags, its budget, its checks, and what decides its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_btx.plan.sources import Model, data_origins, deciding_blend, deciding_settings, model_of
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.budgets import batch_tokens, padded_vocabulary, training_flops, training_steps
from megatron_btx.recipe.data import Data
from megatron_btx.recipe.flags import (
    Flags,
    FlagValue,
    check_layout,
    check_measured,
    check_saving,
    merged,
    number,
    to_argv,
)
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

TRAINING_PROGRAM = "megatron_btx.pretrain"
WARMUP_FRACTION = 0.05
"""Share of a stage's steps in which the learning rate rises, where the recipe does not say it."""


def plan_training(recipe: Recipe, row: ModelSpec) -> Stage:
    """The stage that trains ``row``. Raises InputError for a budget or a layout that does not fit."""
    train, budget, data = row.make, row.budget, recipe.data
    assert isinstance(train, Train) and budget is not None
    model_flags = {**row.flags, **_watching_flags(recipe, train)}
    given = recipe.merge_flags(train.layout, train.megatron, model_flags, train.last_flags)
    steps = training_steps(row.stage, budget.tokens, given)
    _check_training(row.stage, train, given)
    start = model_of(recipe.models[train.start]) if train.start is not None else None
    flags = merged(
        given,
        _schedule_flags(given, steps),
        _data_flags(data, budget.blend, given),
        _folder_flags(row.stage, start),
    )
    tokens = steps * batch_tokens(flags)
    starts = [start] if start is not None else []
    parents, inputs = data_origins(data, starts, budget.blend, (TRAIN_SPLIT, VALID_SPLIT))
    return Stage(
        row.stage,
        Program(TRAINING_PROGRAM, tuple(to_argv(flags)), is_distributed=True),
        parents,
        (EVALUATE_EXPERTS_STAGE,) if train.watch is not None else (),
        inputs,
        settings=deciding_settings(flags, deciding_blend(data, budget.blend)),
        product=TRACKER_FILE,
        processes=train.layout.processes,
        threads=train.layout.threads,
        on_gpu=True,
        resumable=True,
        cluster=train.cluster,
        model=row.name,
        iterations=steps,
        tokens=tokens,
        flops=_estimate_flops(recipe, flags, tokens),
        config={"flags": _writable(flags)},
    )


def _watching_flags(recipe: Recipe, train: Train) -> Flags:
    """Loss per domain meanwhile, on the text that the experts are evaluated on, and the bound of the first."""
    if train.watch is None:
        return {}
    words = tuple(f"{domain}={recipe.data.evaluation_prefix(domain, train.watch.split)}" for domain in recipe.domains)
    bound = f"{EVALUATE_EXPERTS_STAGE}/{EVALUATION_FILE}"
    flags: dict[str, FlagValue] = {"btx-valid-data": words, "btx-valid-tokens": train.watch.tokens}
    flags["btx-first-loss-bound"] = bound
    if train.watch_interval is not None:
        flags["eval-interval"] = train.watch_interval
    return flags


def _check_training(stage: str, train: Train, flags: Flags) -> None:
    check_layout(stage, train.layout.processes, flags)
    check_saving(stage, flags)
    if "btx-valid-tokens" in flags:
        check_measured(stage, number(flags, "btx-valid-tokens"), train.layout.processes, flags)


def _schedule_flags(given: Flags, steps: int) -> Flags:
    """How long a stage trains, and the schedule of its learning rate where the recipe does not state it."""
    flags: dict[str, FlagValue] = {"train-iters": steps}
    if "lr-decay-iters" not in given and "lr-decay-samples" not in given:
        flags["lr-decay-iters"] = steps
    if not any(name.startswith("lr-warmup-") and name != "lr-warmup-init" for name in given):
        flags["lr-warmup-fraction"] = WARMUP_FRACTION
    return flags


def _data_flags(data: Data, blend: Mapping[str, float], given: Flags) -> Flags:
    flags: dict[str, FlagValue] = {"train-data-path": data.blend_words(blend, TRAIN_SPLIT)}
    if given.get("eval-iters") != 0:  # Megatron refuses a validation set of which it needs no sample
        flags["valid-data-path"] = data.blend_words(blend, VALID_SPLIT)
    return flags


def _folder_flags(stage: str, start: Model | None) -> Flags:
    """Where a stage reads and writes."""
    checkpoint = f"{stage}/{CHECKPOINT_FOLDER}"
    flags: dict[str, FlagValue] = {"data-cache-path": f"{stage}/{DATA_CACHE_FOLDER}"}
    flags |= {"save": checkpoint, "load": checkpoint}
    if start is not None:
        flags["pretrained-checkpoint"] = start.path
    flags["btx-metrics"] = f"{stage}/{METRICS_FILE}"
    return flags


def _estimate_flops(recipe: Recipe, flags: Flags, tokens: int) -> float | None:
    """FLOPs of a stage; None where nothing says how wide its output layer is."""
    vocabulary = padded_vocabulary(flags, recipe.data.vocabulary_size)
    if vocabulary is None:
        return None
    return training_flops(flags, tokens, vocabulary)


def _writable(flags: Flags) -> dict[str, Any]:
    """``flags`` as config.yaml keeps them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
