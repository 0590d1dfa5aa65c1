"""What differs between sources, changes no number of the result and is taken from one of them: said, with the owner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_btx.checkpoint import safetensors
from megatron_btx.checkpoint.huggingface.config_writing import PASSED_THROUGH
from megatron_btx.ground.errors import InputError, bare_exceptions_as
from megatron_btx.mixing.compatible import vocabulary_source
from megatron_btx.mixing.plan import Plan
from megatron_btx.mixing.sources import Source
from megatron_btx.mixing.takeable import TRAINING_ARGUMENTS
from megatron_btx.mixing.tokenizer.proof import TOKENIZER_FILE

_SAID_AS_ARGUMENT = ("initializer_range", "attention_dropout")


def remarks(plan: Plan) -> list[str]:
    """One line for each value that sources have in different ways and nobody has decided about."""
    lines = []
    first = plan.sources[0].name
    owner = vocabulary_source(plan.sources).name
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
    around = {source.name: _tokens_around_texts(source) for source in plan.sources}
    if _differ(around):
        lines.append(f"{_list_values('what a tokenizer puts around a text', around)}; the result has that of {owner}")
    return lines


def _tokens_around_texts(source: Source) -> str | None:
    """The tokens that a tokenizer.json makes of no text; None where there is none, or none that can be read."""
    folder = source.hf_folder
    if folder is None or not (folder / TOKENIZER_FILE).is_file():
        return None
    from tokenizers import Tokenizer

    try:
        with bare_exceptions_as(lambda error: InputError(str(error))):
            tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except InputError:  # said by whoever needs it
        return None
    return " ".join(tokenizer.encode("").tokens)


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
