"""Where tokenizers with one table and one way to cut, as their files say it, give a text other ids all the same."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_btx.common.errors import InputError, bare_exceptions_as
from megatron_btx.tokenizers.files import UnknownVocabularyError, read_object
from megatron_btx.tokenizers.texts import texts as texts_with
from megatron_btx.tokenizers.verify import CONFIG_FILE, LoadedTokenizer, load_with_transformers
from megatron_btx.tokenizers.vocabulary import ModelTokenizer, tokenizer_files

_NO_IDS = ("chat_template", "model_max_length", "padding_side", "truncation_side", "name_or_path", "processor_class")
"""Settings of a tokenizer_config.json that decide no id of a text."""
_SHOWN = 60


def differing_readings(tokenizers: Sequence[ModelTokenizer]) -> tuple[str, dict[str, str]] | None:
    """In what the tokenizers of models differ, in words, with what each does; None where all do the same.

    A template says it, a setting, a flag of a token, or a class by itself: where their files differ, transformers is
    asked, for what it puts around a text and for the ids of some hundred texts.
    """
    folders = {t: t.folder for t in tokenizers if t.folder is not None and tokenizer_files(t.folder)}
    said = list(map(_settings, folders.values()))
    loaded: dict[ModelTokenizer, LoadedTokenizer] = {}
    around: dict[str, str] = {}
    for tokenizer, folder in folders.items():
        with contextlib.suppress(InputError):  # said by whoever needs the tokenizer
            if any(settings != said[0] for settings in said):
                read = load_with_transformers(folder)
                around[tokenizer.model] = _show(read, read_object(folder / CONFIG_FILE))
                loaded[tokenizer] = read
    if len(set(around.values())) > 1:
        return "what they put around a text", around
    if len(loaded) > 1:
        return _first_text(loaded)
    return None


def _first_text(loaded: Mapping[ModelTokenizer, LoadedTokenizer]) -> tuple[str, dict[str, str]] | None:
    """The first text that some cut into other tokens, though all have each of these tokens."""
    marked: dict[str, None] = {}
    tables = []
    for tokenizer, read in loaded.items():
        marked |= dict.fromkeys([*read.all_special_tokens, *read.get_added_vocab()])
        tables.append(set(tokenizer.tokens or read.get_vocab().values()))
    common = set.intersection(*tables)
    for text in texts_with([*marked, *map(str.swapcase, marked)], at_most=2 * len(marked)):
        ids = {}
        for tokenizer, read in loaded.items():
            with contextlib.suppress(InputError), bare_exceptions_as(lambda error: InputError(str(error))):
                ids[tokenizer.model] = list(read(text, add_special_tokens=False)["input_ids"])
        if len(set(map(tuple, ids.values()))) > 1 and all(map(common.issuperset, ids.values())):
            return f"the ids of the text {text[:_SHOWN]!r}", {name: str(found)[:_SHOWN] for name, found in ids.items()}
    return None


def _show(loaded: LoadedTokenizer, config: Mapping[str, object]) -> str:
    """What stands around a text, and a setting that says otherwise: llama.cpp goes by it, transformers may not."""
    tokens = {number: token for token, number in loaded.get_vocab().items()}
    before, after = ids_around(loaded)
    shown = [*map(tokens.__getitem__, before), "TEXT", *map(tokens.__getitem__, after)]
    for setting, ids in (("add_bos_token", before), ("add_eos_token", after)):
        if bool(config.get(setting, ids)) != bool(ids):
            shown.append(f"({setting} is {config[setting]})")
    return " ".join(shown)


def _settings(folder: Path) -> object:
    """Whatever in a folder's files can decide it."""
    files = {file.name: file.read_bytes() for file in tokenizer_files(folder) if file.name != CONFIG_FILE}
    try:
        config, model = read_object(folder / CONFIG_FILE), read_object(folder / "config.json")
    except UnknownVocabularyError:
        return folder
    for name in _NO_IDS:
        config.pop(name, None)
    return files, config, model.get("model_type")


def ids_around(loaded: LoadedTokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after a text."""
    bare = list(loaded("a", add_special_tokens=False)["input_ids"])
    whole = list(loaded("a", add_special_tokens=True)["input_ids"])
    starts = (at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare)
    start = next(starts, len(whole))
    return whole[:start], whole[start + len(bare) :]
