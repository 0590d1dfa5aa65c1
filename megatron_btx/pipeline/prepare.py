"""The stages around training: texts are made into datasets, given models imported, the finetuned mixture exported.

data (of texts)      import-seed, import-math, ...      finetune -> export
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_btx.pipeline.recipe.data import FOLDER, Data, Text
from megatron_btx.pipeline.recipe.flags import Flags, to_argv
from megatron_btx.pipeline.stage import Program, Stage

EXPORTED = "model"
"""The exported model's folder, in that of its stage."""


def import_stage(name: str, source: Path) -> Stage:
    """The stage that makes a Megatron checkpoint of a given model that Megatron cannot start from as it is."""
    words = ("--method", "copy", "--expert", f"model={source}", "--output", f"{name}/checkpoint", "--verify")
    return Stage(
        name,
        Program("megatron_btx.mixing.cli", words),
        inputs=(source,),
        product="checkpoint",
        settings={"model": source},
    )


def export_stage(name: str, checkpoint: str, parents: tuple[str, ...], settings: dict[str, Any]) -> Stage:
    """The stage that writes a checkpoint as a Hugging Face model folder with its tokenizer, and reads it back.

    Args:
        settings: which checkpoint it is, for a stage's identity.
    """
    words = ("export", "--checkpoint", checkpoint, "--output", f"{name}/{EXPORTED}", "--verify")
    return Stage(name, Program("megatron_btx.mixing.convert_hf", words), parents, product=EXPORTED, settings=settings)


def data_stage(data: Data) -> Stage:
    """The stage that makes the run's data: the quickstart's corpora, or datasets of given texts."""
    if data.corpora:
        program = Program("megatron_btx.data.corpora.build", ("--output", FOLDER, *to_argv(data.corpora)))
        settings: dict[str, Any] = {name: value for name, value in data.corpora.items() if name != "workers"}
        return Stage(FOLDER, program, product="corpora.json", processes=data.workers, settings=settings)
    description = {
        "tokenizer": _plain(data.tokenizer),
        "domains": {name: _describe(text) for name, text in data.texts.items()},
        "seed": data.seed,
    }
    words = ("--output", FOLDER, "--workers", str(data.workers), "--description", json.dumps(description))
    program = Program("megatron_btx.data.datasets", words)
    inputs = [Path(path) for text in data.texts.values() for files in text.files.values() for path in files]
    settings = {"seed": data.seed, **_tokenizer_settings(data.tokenizer)}
    for name, text in data.texts.items():
        settings[f"domain {name}"] = [f"{split} {share:g}" for split, share in text.shares.items()]
        for split, files in text.files.items():
            settings[f"domain {name} {split}"] = [Path(path) for path in files]
    return Stage(
        FOLDER, program, inputs=tuple(inputs), product="datasets.json", processes=data.workers, settings=settings
    )


def _describe(text: Text) -> dict[str, Any]:
    """A domain in the description of datasets to be made."""
    described: dict[str, Any] = {split: list(files) for split, files in text.files.items()}
    if text.shares:
        described["shares"] = dict(text.shares)
    return described


def _plain(flags: Flags) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}


def _tokenizer_settings(flags: Flags) -> dict[str, Any]:
    """The tokenizer's flags; files from outside the run count by their content."""
    settings = _plain(flags)
    model = flags.get("tokenizer-model")
    if isinstance(model, str) and Path(model).is_absolute():
        settings["tokenizer-model"] = Path(model)
    return settings
