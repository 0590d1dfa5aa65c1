"""What tokenizers put before and after a text: with one table and one way to cut, ids differ by it all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_btx.checkpoint.tokenizers.files import UnknownVocabularyError, read_object
from megatron_btx.checkpoint.tokenizers.vocabulary import tokenizer_files
from megatron_btx.ground.errors import InputError
from megatron_btx.mixing.sources import Source
from megatron_btx.mixing.tokenizer.proof import CONFIG_FILE, TOKENIZER_FILE, LoadedTokenizer, load_with_transformers

_SETTINGS = ("tokenizer_class", "auto_map", "add_bos_token", "add_eos_token", "bos_token", "eos_token", "legacy")


def differing_surroundings(sources: Sequence[Source]) -> dict[str, str]:
    """What the tokenizer of each source puts around a text, where some differ; empty where all do the same.

    A template says it, or a setting, or a class by itself: where their files differ, transformers is asked.
    """
    folders = {s.name: s.hf_folder for s in sources if s.hf_folder is not None and tokenizer_files(s.hf_folder)}
    said = list(map(_settings, folders.values()))
    found: dict[str, str] = {}
    for name, folder in folders.items():
        try:
            if any(settings != said[0] for settings in said):
                found[name] = _show(load_with_transformers(folder), read_object(folder / CONFIG_FILE))
        except InputError:  # said by whoever needs the tokenizer
            continue
    if len(set(found.values())) < 2:
        return {}
    return found


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
    try:
        named = read_object(folder / "special_tokens_map.json") | read_object(folder / CONFIG_FILE)
        template = read_object(folder / TOKENIZER_FILE).get("post_processor")
    except UnknownVocabularyError:
        return folder
    return template, (folder / TOKENIZER_FILE).is_file(), [named.get(key) for key in _SETTINGS]


def ids_around(loaded: LoadedTokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after a text."""
    bare = list(loaded("a", add_special_tokens=False)["input_ids"])
    whole = list(loaded("a", add_special_tokens=True)["input_ids"])
    starts = (at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare)
    start = next(starts, len(whole))
    return whole[:start], whole[start + len(bare) :]
