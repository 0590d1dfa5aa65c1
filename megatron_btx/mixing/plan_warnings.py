"""What differs between sources, changes no number of the result and is taken from one of them: said, with the owner."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_btx.checkpoint import safetensors
from megatron_btx.checkpoint.huggingface.config_writing import PASSED_THROUGH
from megatron_btx.mixing.compatible import vocabulary_source
from megatron_btx.mixing.overrides import TRAINING_ARGUMENTS
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.sources import Source
from megatron_btx.tokenizers.comparison import differing_readings
from megatron_btx.tokenizers.vocabulary import CONFIG_FILE
from megatron_btx.tokenizers.written_files import object_in, travelling_files

_NUMBERS = 4096
"""Of each matrix, to see whether models resemble each other."""
_UNRELATED = 0.1
"""A smaller cosine means nothing: that of random numbers is below 0.03 for all but the smallest models."""
_SAID_AS_ARGUMENT = ("initializer_range", "attention_dropout")


def remarks(plan: Plan, stand_ins: Sequence[str] = ()) -> list[str]:
    """One line for each value of sources that differs and nobody has decided about; of stand-ins, no likeness."""
    lines = []
    if len(plan.sources) > 1 and not any(source.has_tokenizer for source in plan.sources):
        lines.append("no source has a tokenizer's files: the sizes of the vocabularies alone are compared")
    first = plan.sources[0].name
    owner = vocabulary_source(plan.sources, plan.request).name
    for name in TRAINING_ARGUMENTS:
        values = {source.name: source.arguments.get(name) for source in plan.sources}
        if _differ(values) and name not in plan.request.take:
            lines.append(
                f"{_list_values(name, values)}; the result has that of {first} (--take {name}=NAME for another)"
            )
    configs = {source.name: _config_of(source) for source in plan.sources}
    for key in PASSED_THROUGH:
        values = {}
        for name, config in configs.items():
            if key in config:
                values[name] = config[key]
        if key not in _SAID_AS_ARGUMENT and _differ(values):
            lines.append(f"{_list_values(key, values)}; the result has that of {owner}, whose tokenizer it gets")
    if plan.request.allow_other_tokenizer:  # else it was refused, or somebody has chosen
        differing = differing_readings([source.tokenizer for source in plan.sources])
        if differing:
            lines.append(f"{_list_values(*differing)}; the result has that of {owner}")
    if _differ({source.name: _chat_templates(source) for source in plan.sources if source.hf_folder}):
        lines.append(f"chat templates differ between sources; the result has those of {owner}")
    return [*lines, *_likeness([source for source in plan.sources if source.name not in stand_ins])]


def _chat_templates(source: Source) -> object:
    """A folder's chat templates, wherever they stand."""
    files = travelling_files(source.hf_folder or source.root)
    inside = object_in(files.get(CONFIG_FILE, b"")).get("chat_template")
    return inside, {name: content for name, content in files.items() if "chat_template" in name}


def _likeness(sources: Sequence[Source]) -> Iterator[str]:
    """A line for each pair whose weights are the same, or have nothing to do with each other.

    Branches of one seed keep its directions: their matrices have a cosine far from 0, however long they were trained.
    It is 0 for models that began from other random numbers. The first rows of each matrix show it.
    """
    import torch

    if len(sources) < 2:
        return
    rows = {}
    for source in sources:
        found = []
        for name, held in source.pieces.items():
            if name.startswith("layers.") and len(held.shape) == 2:
                count = min(held.shape[0], max(1, _NUMBERS // held.shape[1]))
                found.append(source.read(name, 0, count).reshape(-1))
        rows[source.name] = torch.cat(found).double()
    for (left, one), (right, other) in itertools.combinations(rows.items(), 2):
        cosine = float(one @ other / (one.norm() * other.norm()))
        if torch.equal(one, other):
            yield f"{left} and {right} have the same first rows in every matrix: is one model given twice?"
        elif abs(cosine) < _UNRELATED:
            yield (
                f"{left} and {right} do not resemble each other: the first rows of their matrices have a cosine of "
                f"{cosine:.3f}, those of one seed's branches are far from 0; of other bases no mean is a model"
            )


def _config_of(source: Source) -> Mapping[str, Any]:
    folder = source.hf_folder
    if folder is None:
        return {}
    return safetensors.read_json(folder / safetensors.CONFIG)


def _differ(values: Mapping[str, Any]) -> bool:
    given = [value for value in values.values() if value is not None]
    return any(value != given[0] for value in given)


def _list_values(name: str, values: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{value!r} in {source}" for source, value in values.items())
    return f"{name} differs: {listed}"
