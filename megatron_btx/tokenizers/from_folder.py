"""The tokenizer of a Hugging Face folder: its files where they say it all, else what transformers makes of them."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.tokenizers import written_files as tokenizer_files
from megatron_btx.tokenizers.around import ids_around
from megatron_btx.tokenizers.outcome import FLAG, ResultTokenizer, accept, prove
from megatron_btx.tokenizers.texts import texts as texts_with
from megatron_btx.tokenizers.verify import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Difference,
    LoadedTokenizer,
    Oracle,
    encode_with_transformers,
    load_with_transformers,
    read_tokenizer,
)
from megatron_btx.tokenizers.vocabulary import ModelTokenizer, unknown_reason

_BUILDS_ITS_OWN = ("qwen2",)
"""Model types for which transformers 5 takes the class of its own table, whatever the tokenizer's files say."""
_NAMED = ("unk_token", "bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")


def config_to_ask(model_config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A model's configuration where transformers takes a class by it; else None."""
    if model_config.get("model_type") in _BUILDS_ITS_OWN:
        return model_config
    return None


def transformers_name(loaded: LoadedTokenizer) -> str:
    """The class that reads a tokenizer, with the version of transformers."""
    return f"{type(loaded).__name__} of transformers {importlib.metadata.version('transformers')}"


def folder_tokenizer(
    source: ModelTokenizer, place: Path, model_config: Mapping[str, Any], allow_other_ids: bool
) -> ResultTokenizer:
    """Make and prove the tokenizer of a folder.

    Raises:
        InputError: it cannot be read, or what can be written gives a text other ids.
    """
    why = unknown_reason(source.arguments)
    if why:
        raise InputError(f"its vocabulary cannot be read: {why}; {FLAG} carries the files as they are")
    files, rows = tokenizer_files.travelling_files(place), source.rows
    if tokenizer_files.has_written_form(files, rows) and config_to_ask(model_config) is None:
        return _carried(files, place, rows, allow_other_ids)
    return _made(source, files, place, model_config, allow_other_ids)


def _carried(files: Mapping[str, bytes], folder: Path, rows: int, allow_other_ids: bool) -> ResultTokenizer:
    """The folder's own tokenizer.json, which every reader understands alike."""
    form = f"tokenizer.json of {folder} as it is"
    config = json.loads(files[CONFIG_FILE])
    encode = read_tokenizer(files[TOKENIZER_FILE].decode(), bool(config.get("split_special_tokens")))
    special = [tokenizer_files.text_of(config[name]) for name in _NAMED if config.get(name)]
    outcome = prove(Oracle("the same file", encode), files, rows, None, texts_with(special), form)
    return accept(outcome, files, rows, form, allow_other_ids)


def _made(
    source: ModelTokenizer,
    files: Mapping[str, bytes],
    folder: Path,
    model_config: Mapping[str, Any],
    allow_other_ids: bool,
) -> ResultTokenizer:
    """The first candidate that gives the ids of what the installed transformers makes of the folder."""
    loaded, rows = load_with_transformers(folder), source.rows
    _check_table(source, loaded, folder)
    oracle = Oracle(transformers_name(loaded), encode_with_transformers(loaded))
    texts = texts_with([*loaded.all_special_tokens, *loaded.get_added_vocab()])
    failures: list[tuple[Difference, dict[str, bytes], str]] = []
    for form, tokenizer in _candidates(loaded, files, folder, rows):
        config = _config_of(loaded, files, tokenizer, rows)
        candidate = tokenizer_files.make_files(files, tokenizer, config)
        outcome = prove(oracle, candidate, rows, model_config, texts, form)
        if isinstance(outcome, ResultTokenizer):
            return outcome
        failures.append((outcome, candidate, form))
    difference, candidate, form = failures[0]
    return accept(difference, candidate, rows, form, allow_other_ids)


def _check_table(source: ModelTokenizer, loaded: LoadedTokenizer, folder: Path) -> None:
    """Some classes make a tokenizer of nothing where they find no file that they know."""
    if source.tokens is None or source.vocabulary is None:
        return
    numbers = loaded.get_vocab()
    lost = [number for number, token in source.tokens.items() if numbers.get(token) != number]
    if not lost:
        return
    token = source.tokens[lost[0]]
    found = "no token"
    if token in numbers:
        found = f"token {numbers[token]}"
    raise InputError(
        f"{transformers_name(loaded)} reads {folder} without {len(lost)} tokens of "
        f"{source.vocabulary.base.name}: token {lost[0]} is {token!r}, there it is {found}; put a tokenizer.json "
        f"into the folder, or {FLAG} carries the files as they are"
    )


def _candidates(
    loaded: LoadedTokenizer, files: Mapping[str, bytes], folder: Path, rows: int
) -> list[tuple[str, dict[str, Any]]]:
    """What may be written, the nearest to the source first."""
    backend = getattr(loaded, "backend_tokenizer", None)
    found = []
    if TOKENIZER_FILE in files:
        own = json.loads(files[TOKENIZER_FILE])
        found.append((f"tokenizer.json of {folder}", tokenizer_files.drop_rowless_tokens(own, rows)))
    if backend is not None and hasattr(backend, "to_str"):
        made = json.loads(backend.to_str())
        form = f"tokenizer.json made of what {transformers_name(loaded)} reads in {folder}"
        if TOKENIZER_FILE in files:
            form += ", which gives other ids than the tokenizer.json there: another version may give others again"
        found.append((form, tokenizer_files.drop_rowless_tokens(made, rows)))
    if not found:
        raise InputError(
            f"{transformers_name(loaded)} reads {folder} and has no tokenizer.json for it; save one with a fast "
            f"tokenizer, or {FLAG} carries the files as they are"
        )
    return found


def _config_of(
    loaded: LoadedTokenizer, files: Mapping[str, bytes], tokenizer: Mapping[str, Any], rows: int
) -> dict[str, Any]:
    """The tokenizer_config.json to write beside a tokenizer.json."""
    tokens = {}
    for name in _NAMED:
        token = getattr(loaded, name, None)
        if token is None:
            continue
        number = tokenizer_files.number_of_token(tokenizer, str(token))
        if number is not None and number < rows:
            tokens[name] = str(token)
    source = json.loads(files.get(CONFIG_FILE, b"{}"))
    if loaded.padding_side != "right":  # some classes pad on the left without saying so
        source["padding_side"] = loaded.padding_side
    adds = None
    if "add_bos_token" in source or "add_eos_token" in source:
        adds = _added_around(loaded, tokens)
    return tokenizer_files.make_config(source, tokenizer, tokens, adds, loaded.all_special_tokens)


def _added_around(loaded: LoadedTokenizer, tokens: Mapping[str, str]) -> tuple[bool, bool] | None:
    """Whether bos stands before and eos after a text; None where something else does."""
    before, after = ids_around(loaded)
    if before and ("bos_token" not in tokens or before != [loaded.bos_token_id]):
        return None
    if after and ("eos_token" not in tokens or after != [loaded.eos_token_id]):
        return None
    return bool(before), bool(after)
