"""A stage that trains: its flags, its budget, its checks, and what decides its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_btx.plan.sources import DataPaths, Model, deciding_settings
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.budgets import batch_tokens, padded_vocabulary, training_flops, training_steps
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
from megatron_btx.recipe.names import (
    CHECKPOINT_FOLDER,
    DATA_CACHE_FOLDER,
    METRICS_FILE,
    TRACKER_FILE,
    TRAIN_SPLIT,
    VALID_SPLIT,
)
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.recipe.sections import SettingsSection

TRAINING_PROGRAM = "megatron_btx.pretrain"
WARMUP_FRACTION = 0.05
"""Share of a stage's steps in which the learning rate rises, where the recipe does not say it."""


@dataclass(frozen=True)
class TrainingJob:
    """What is to be trained."""

    name: str
    part: Training
    start: Model | None = None
    """The model that it starts from; None for one with drawn weights."""
    model_flags: Flags = field(default_factory=dict)
    """Flags of the model beside the recipe's."""
    last_flags: Flags = field(default_factory=dict)
    """Flags that win over all others."""
    after: tuple[str, ...] = ()
    """Stages whose files it reads, which only bound its first step."""
    cluster: str = "finetune"
    """Its section of the recipe's ``cluster``."""


def plan_training(recipe: Recipe, job: TrainingJob) -> Stage:
    """The stage of ``job``. Raises InputError for a budget or a layout that does not fit."""
    data, part = DataPaths(recipe.data), job.part
    given = merge_given_flags(recipe, part, job.model_flags, job.last_flags)
    steps = training_steps(job.name, part.tokens, given)
    _check_training(job, given)
    flags = merged(
        given,
        _schedule_flags(given, steps),
        _data_flags(data, part.blend, given),
        _folder_flags(job),
    )
    tokens = steps * batch_tokens(flags)
    starts = [job.start] if job.start is not None else []
    parents, inputs = data.origins(starts, part.blend, (TRAIN_SPLIT, VALID_SPLIT))
    return Stage(
        job.name,
        Program(TRAINING_PROGRAM, tuple(to_argv(flags)), is_distributed=True),
        parents,
        job.after,
        inputs,
        settings=deciding_settings(flags, data.deciding_blend(part.blend)),
        product=TRACKER_FILE,
        processes=part.layout.processes,
        threads=part.layout.threads,
        on_gpu=True,
        resumable=True,
        cluster=job.cluster,
        iterations=steps,
        tokens=tokens,
        flops=_estimate_flops(recipe, flags, tokens),
        config={"flags": _writable(flags)},
    )


def merge_given_flags(
    recipe: Recipe, part: Training | SettingsSection, model_flags: Flags, last_flags: Flags
) -> dict[str, FlagValue]:
    """The flags that the recipe states for a stage that trains or evaluates; a later section wins."""
    return merged(
        recipe.model,
        recipe.data.tokenizer,
        model_flags,
        recipe.training,
        part.layout.flags(),
        part.megatron,
        {"seed": recipe.random_seed},
        last_flags,
    )


def _check_training(job: TrainingJob, flags: Flags) -> None:
    processes = job.part.layout.processes
    check_layout(job.name, processes, flags)
    check_saving(job.name, flags)
    if "btx-valid-tokens" in flags:
        check_measured(job.name, number(flags, "btx-valid-tokens"), processes, flags)


def _schedule_flags(given: Flags, steps: int) -> Flags:
    """How long a stage trains, and the schedule of its learning rate where the recipe does not state it."""
    flags: dict[str, FlagValue] = {"train-iters": steps}
    if "lr-decay-iters" not in given and "lr-decay-samples" not in given:
        flags["lr-decay-iters"] = steps
    if not any(name.startswith("lr-warmup-") and name != "lr-warmup-init" for name in given):
        flags["lr-warmup-fraction"] = WARMUP_FRACTION
    return flags


def _data_flags(data: DataPaths, blend: Mapping[str, float], given: Flags) -> Flags:
    flags: dict[str, FlagValue] = {"train-data-path": data.blend_words(blend, TRAIN_SPLIT)}
    if given.get("eval-iters") != 0:  # Megatron refuses a validation set of which it needs no sample
        flags["valid-data-path"] = data.blend_words(blend, VALID_SPLIT)
    return flags


def _folder_flags(job: TrainingJob) -> Flags:
    """Where a stage reads and writes."""
    checkpoint = f"{job.name}/{CHECKPOINT_FOLDER}"
    flags: dict[str, FlagValue] = {"data-cache-path": f"{job.name}/{DATA_CACHE_FOLDER}"}
    flags |= {"save": checkpoint, "load": checkpoint}
    if job.start is not None:
        flags["pretrained-checkpoint"] = job.start.path
    flags["btx-metrics"] = f"{job.name}/{METRICS_FILE}"
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
