"""A recipe under the checks of those who will carry it out: Megatron, the converter, the reader of texts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.data.domains import check_description
from megatron_btx.data.inputs import find_files
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe.flags import Flags, to_argv
from megatron_btx.recipe.from_checkpoint import ask
from megatron_btx.recipe.models import Given
from megatron_btx.recipe.names import DATA_STAGE, EXPORT_STAGE, MIX_STAGE, place_of
from megatron_btx.recipe.options import option_words, say_keys
from megatron_btx.recipe.recipe import Recipe

_CONVERTER = "megatron_btx.mixing.cli"


def check_with_megatron(
    file: str, sections: Mapping[str, Flags], stages: Iterable[Stage] = (), use_gpus: bool = True
) -> None:
    """Refuse what the installed Megatron does not know, and what the programs of ``stages`` would refuse themselves.

    Importing Megatron takes some 10 s and 500 MB, which would stay in this process.

    Args:
        sections: place in ``file`` -> flags.
        stages: those that train or evaluate.
        use_gpus: False where they run on the CPU, whatever the machine has.
    """
    programs: dict[str, tuple[int, tuple[str, ...]]] = {}
    for stage in stages:
        assert isinstance(stage.program, Program)
        programs[stage.name] = (stage.processes, stage.program.words)
    asked = {"sections": {where: to_argv(flags) for where, flags in sections.items()}, "stages": programs}
    environment = os.environ if use_gpus else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ask("megatron_btx.training.check_stages", asked, environment, f"{file}: ")


def check_inputs(recipe: Recipe, stages: Sequence[Stage], due: Sequence[str]) -> list[str]:
    """Refuse models and texts of which a stage that is ``due`` could make nothing; returns the converter's warnings.

    Raises:
        InputError: everything that is wrong, each with its place in the recipe.
    """
    refused: dict[str, list[str]] = {}
    if DATA_STAGE in due:
        description = next(stage for stage in stages if stage.name == DATA_STAGE).config["description"]
        try:
            find_files(check_description(description), "data.")
        except InputError as error:
            refused[str(error)] = [DATA_STAGE]
    requests = {name: request for name, request in _list_requests(recipe, stages).items() if name in due}
    answer: dict[str, Any] = {"refused": {}, "said": {}}
    if requests:
        answer = json.loads(ask("megatron_btx.mixing.dry_runs", requests, place=f"{recipe.file}: "))
    for name, why in answer["refused"].items():
        refused.setdefault(say_keys(why, place_of(name)), []).append(name)
    if refused:
        listed = [f"stage {', '.join(names)}: {why}" for why, names in refused.items()]
        raise InputError(f"{recipe.file}: {'; '.join(listed)}")
    said: dict[str, list[str]] = {}
    for name, lines in answer["said"].items():
        for line in lines:
            said.setdefault(say_keys(line, place_of(name)), []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in said.items()]


def _list_requests(recipe: Recipe, stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """Stage -> what it asks of the converter; of the export, what it would ask if finetuning changed no shape."""
    words: dict[str, list[str]] = {}
    for stage in stages:
        if isinstance(stage.program, Program) and stage.program.module == _CONVERTER:
            words[stage.name] = list(stage.program.words)
    arguments: dict[str, Any] = {}
    mix, btx = recipe.find_role("mix"), recipe.find_role("btx")
    if recipe.sections.export and btx is not None and mix is not None:
        given = btx.make if isinstance(btx.make, Given) else mix.make
        if isinstance(given, Given):
            words[EXPORT_STAGE] = ["--method=copy", "--expert", f"model={given.path}", "--output", EXPORT_STAGE]
        elif MIX_STAGE in words:
            words[EXPORT_STAGE] = list(words[MIX_STAGE])
            arguments = {"moe_router_pre_softmax": bool(mix.flags.get("moe-router-pre-softmax"))}
        words[EXPORT_STAGE] += ["--output-format", "hf", *option_words(recipe.sections.export)]
    tokenizer = {flag.replace("-", "_"): value for flag, value in recipe.data.tokenizer.items()}
    may_differ = any("tokenizer_model" in str(flags.get("btx-allow-change")) for flags in recipe.flag_sections.values())
    loaded = {parent for stage in stages if stage.on_gpu and not may_differ for parent in stage.parents}
    requests: dict[str, dict[str, Any]] = {}
    for name, said in words.items():
        stand_ins = _put_given_models(said)
        if stand_ins is not None:
            requests[name] = {"words": said, "arguments": {}, "stand_ins": stand_ins}
            requests[name]["tokenizer"] = tokenizer if name in loaded else None
    if EXPORT_STAGE in requests:
        requests[EXPORT_STAGE]["arguments"] = arguments
    return requests


def _put_given_models(words: list[str]) -> list[str] | None:
    """Put a given model for each that the run makes, its equal; returns their names, None for none on this disk."""
    experts = {number + 1: words[number + 1].partition("=") for number, word in enumerate(words) if word == "--expert"}
    given = [path for _, _, path in experts.values() if Path(path).is_dir()]
    if not given:
        return None
    if "--base" in words and not Path(words[words.index("--base") + 1]).is_dir():
        words[words.index("--base") + 1] = given[0]
    stand_ins = {name: number for number, (name, _, path) in experts.items() if path not in given}
    for name, number in stand_ins.items():
        words[number] = f"{name}={given[0]}"
    return list(stand_ins)
