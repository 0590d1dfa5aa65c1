"""The stages around training: texts become datasets, given models are imported, models mixed, the mixture exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_btx.plan.fingerprint import locate
from megatron_btx.plan.sources import Model, mixed_model_of, origins_of
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.data import Data
from megatron_btx.recipe.flags import merged
from megatron_btx.recipe.models import Mix, ModelSpec
from megatron_btx.recipe.names import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    DATA_STAGE,
    DATASETS_FILE,
    EXPORT_STAGE,
    EXPORTED_FOLDER,
    SEED_MODEL,
)
from megatron_btx.recipe.options import takes_base
from megatron_btx.recipe.recipe import Recipe


def plan_import(name: str, source: Path, options: tuple[str, ...] = ()) -> Stage:
    """The stage that makes a Megatron checkpoint of a given model that Megatron cannot start from as it is."""
    output = f"{name}/{CHECKPOINT_FOLDER}"
    words = ("--method", "copy", "--expert", f"model={source}", "--output", output, *options, "--verify")
    program = Program("megatron_btx.mixing.cli", words)
    settings: dict[str, Any] = {"model": source}
    if options:
        settings["options"] = list(options)
    return Stage(
        name, program, inputs=(source,), product=CHECKPOINT_FOLDER, settings=settings, kind="import", cluster="mix"
    )


def plan_mix(recipe: Recipe, row: ModelSpec) -> Stage:
    """The stage that mixes or averages the models of ``row``, and reads the result back."""
    assert isinstance(row.make, Mix)
    models = {name: mixed_model_of(recipe.models[source]) for name, source in row.make.sources.items()}
    options = list(row.make.words)
    words: list[str] = []
    settings: dict[str, Any] = {"options": options, "experts": list(models)}
    for name, model in models.items():
        words += ["--expert", f"{name}={model.path}"]
        settings[f"expert {name}"] = model.identity()
    if takes_base(options):
        models["base"] = mixed_model_of(recipe.models[SEED_MODEL])
        settings["base"] = models["base"].identity()
        words += ["--base", models["base"].path]
    words += ["--output", f"{row.stage}/{CHECKPOINT_FOLDER}", *options, "--verify"]
    parents, inputs = origins_of(models.values())
    for number, option in enumerate(options):
        flag, _, path = option.partition("=")
        if path.startswith("/"):  # the routers' rows count by their content
            settings |= {"options": [*options[:number], flag, *options[number + 1 :]], flag: Path(path)}
            inputs = (*inputs, Path(path))
    return Stage(
        row.stage,
        Program("megatron_btx.mixing.cli", tuple(words)),
        parents,
        inputs=inputs,
        product=CHECKPOINT_FOLDER,
        settings=settings,
        kind="mix",
        model=row.name,
    )


def plan_export(model: Model, form: str, options: tuple[str, ...] = ()) -> Stage:
    """The stage that writes a model as a Hugging Face folder with its tokenizer, and reads it back."""
    parents, inputs = origins_of([model])
    output = f"{EXPORT_STAGE}/{EXPORTED_FOLDER}"
    words = ("export", "--checkpoint", model.path, "--output", output, *options, "--verify")
    settings: dict[str, Any] = {"model": model.identity(), "form": form}
    if options:
        settings["options"] = list(options)
    return Stage(
        EXPORT_STAGE,
        Program("megatron_btx.mixing.convert_hf", words),
        parents,
        inputs=inputs,
        product=EXPORTED_FOLDER,
        settings=settings,
        kind="export",
    )


def plan_data(data: Data) -> Stage:
    """The stage that makes datasets of the given texts, which count by their content, as a tokenizer does."""
    domains = {name: text.model_dump(by_alias=True, exclude_unset=True) for name, text in data.texts.items()}
    description = {"tokenizer": merged(data.tokenizer), "domains": domains, "seed": data.seed}
    words = ("--output", DATA_STAGE, "--workers", str(data.workers), "--description", f"{DATA_STAGE}/{CONFIG_FILE}")
    settings: dict[str, Any] = {"seed": data.seed, **merged(data.tokenizer)}
    model = data.tokenizer.get("tokenizer-model")
    if isinstance(model, str):
        settings["tokenizer-model"] = locate(model)
    inputs: list[Path] = []
    for name, text in data.texts.items():
        settings[f"domain {name}"] = [f"{split} {share:g}" for split, share in (text.shares or {}).items()]
        reading = text.model_dump(by_alias=True, exclude_unset=True, include={"json_key", "on_bad_record"})
        if reading:
            settings[f"domain {name} reading"] = [f"{key} {value}" for key, value in reading.items()]
        for split, files in text.sources().items():
            settings[f"domain {name} {split}"] = [Path(path) for path in files]
            inputs += settings[f"domain {name} {split}"]
    return Stage(
        DATA_STAGE,
        Program("megatron_btx.data.datasets", words),
        inputs=tuple(inputs),
        product=DATASETS_FILE,
        processes=data.workers,
        kind="data",
        settings=settings,
        config={"description": description},  # a file, because thousands of texts fill more than a word may hold
    )
