"""The files of a written tokenizer: those that transformers 4.57 and 5, vLLM and llama.cpp's converter read alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.tokenizers.vocabulary import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FOLDER_FILES,
    load_tokenizer,
)

CLASS = "PreTrainedTokenizerFast"
"""Known to transformers 4.57 and 5, and adds nothing to tokenizer.json; others build a tokenizer of their own."""
NAMES = ("bos_token", "eos_token", "pad_token")
GENERATION = "generation_config.json"
ALL_NAMES = (*NAMES, "unk_token", "sep_token", "cls_token", "mask_token")
_SMALL_BYTES = 256 << 20
_OTHER_READINGS = ("added_tokens.json", "special_tokens_map.json", "tekken.json")
"""Files that a reader takes beside or in place of tokenizer.json; what they say stands in it."""
_OF_ANOTHER_CLASS = (
    "tokenizer_class", "auto_map", "add_bos_token", "add_eos_token", "added_tokens_decoder", "tokenizer_file",
    "name_or_path", "backend", "is_local", "local_files_only", "legacy", "sp_model_kwargs", "use_default_system_prompt",
    "extra_special_tokens", "add_prefix_space",
)  # fmt: skip


def travelling_files(folder: Path | None) -> dict[str, bytes]:
    """The files of a folder that make tokens and text, as they are; none where there is no folder."""
    if folder is None:
        return {}
    found: set[Path] = set()
    for pattern in (*TOKENIZER_FOLDER_FILES, GENERATION, "chat_template*", "additional_chat_templates/*.jinja"):
        found.update(folder.glob(pattern))
    contents = {}
    for file in sorted(found):
        if file.is_file() and file.suffix != ".safetensors" and file.stat().st_size < _SMALL_BYTES:
            contents[file.relative_to(folder).as_posix()] = file.read_bytes()
    return contents


def has_written_form(files: Mapping[str, bytes], rows: int) -> bool:
    """Whether files are what would be written: the class adds nothing, and every token has a row."""
    if CONFIG_FILE not in files or TOKENIZER_FILE not in files:
        return False
    if "tekken.json" in files or "added_tokens.json" in files or object_in(files.get("special_tokens_map.json", b"{}")):
        return False
    config = object_in(files[CONFIG_FILE])
    content = object_in(files[TOKENIZER_FILE])
    if config.get("tokenizer_class") != CLASS or renumber_added_tokens(content) != content:
        return False
    if {"auto_map", "extra_special_tokens"} & config.keys() or _without_rowless(content, rows) != content:
        return False
    if config.get("added_tokens_decoder", {}) != _added_beside(files, content):
        return False
    prefix = _prefix_space(content)
    if prefix is not None and bool(config.get("add_prefix_space", False)) != prefix:
        return False
    special = [config[name] for name in ALL_NAMES if config.get(name) is not None]
    special += config.get("additional_special_tokens") or []
    added = {str(entry.get("content")) for entry in content.get("added_tokens") or []}
    return added.issuperset(map(text_of, special))


def make_config(
    source: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    tokens: Mapping[str, str],
    adds: tuple[bool, bool] | None,
    special: Sequence[str] = (),
) -> dict[str, Any]:
    """A tokenizer_config.json.

    Args:
        source: the source's, whose other settings (chat template, longest text) are kept.
        tokenizer: the content of the written tokenizer.json.
        tokens: bos_token and so on, those that have a row.
        adds: whether bos stands before and eos after every text, where that is all that is added; else None.
        special: all special tokens, wherever the source lists them.
    """
    config = dict(source)
    for name in (*_OF_ANOTHER_CLASS, *ALL_NAMES):
        config.pop(name, None)
    config.pop("additional_special_tokens", None)
    listed = source.get("additional_special_tokens") or source.get("extra_special_tokens")
    if not isinstance(listed, list):
        listed = []
    texts = list(map(text_of, listed))
    texts += [text for text in special if text not in (*texts, *tokens.values())]
    known = {str(entry["content"]) for entry in tokenizer.get("added_tokens") or []}
    if known.intersection(texts):
        config["additional_special_tokens"] = [text for text in texts if text in known]
    config |= {"tokenizer_class": CLASS, **tokens}
    config.setdefault("clean_up_tokenization_spaces", False)
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # transformers 4 has a third for this class
    if adds is not None:
        config |= {"add_bos_token": adds[0], "add_eos_token": adds[1]}
    prefix = _prefix_space(tokenizer)
    if prefix is not None:
        config["add_prefix_space"] = prefix  # transformers 4.57 turns it off in the tokenizer where it is not given
    return config


def make_files(
    source: Mapping[str, bytes], tokenizer: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, bytes]:
    """All files of a tokenizer: the source's with these two, without those that could be read in their place."""
    files = {name: content for name, content in source.items() if name not in _OTHER_READINGS}
    if tokenizer != object_in(files.get(TOKENIZER_FILE, b"{}")):
        files[TOKENIZER_FILE] = json.dumps(tokenizer, ensure_ascii=False, indent=1).encode()
    beside = _added_beside(files, tokenizer)
    if beside:
        config = {**config, "added_tokens_decoder": beside}
    files[CONFIG_FILE] = as_json(config)
    return files


def _added_beside(files: Iterable[str], tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens, for readers of a file that lacks some: llama.cpp's converter goes by tokenizer.model.

    They stand in tokenizer_config.json as transformers 4 writes them; both its versions find nothing new there.
    """
    added = tokenizer.get("added_tokens") or []
    has_other_base = any(name.endswith(".model") or name in ("vocab.json", "vocab.txt") for name in files)
    if not has_other_base or {entry["content"] for entry in added} <= _tokens_of_model(tokenizer).keys():
        return {}
    return {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in added}


def drop_rowless_tokens(tokenizer: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A tokenizer.json without the tokens that have no row, which would become ids no model can read; cuts no text."""
    result = _without_rowless(renumber_added_tokens(tokenizer), rows)
    return result | {key: None for key in ("truncation", "padding") if key in result}


def _without_rowless(tokenizer: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A tokenizer.json without the added tokens that have no row, and without any such token around a text."""
    result = dict(tokenizer)
    if "added_tokens" in result:
        result["added_tokens"] = [entry for entry in result["added_tokens"] or [] if entry.get("id", 0) < rows]
    if result.get("post_processor"):
        result["post_processor"] = _without_rowless_around(result["post_processor"], rows)
    return result


def _without_rowless_around(processor: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A post-processor without the tokens that have no row; one of a kind without a template stays as it is."""
    result = dict(processor)
    if isinstance(processor.get("processors"), list):
        result["processors"] = [_without_rowless_around(part, rows) for part in processor["processors"]]
    if processor.get("type") == "TemplateProcessing":
        tokens = processor["special_tokens"]
        result["special_tokens"] = {name: tokens[name] for name in tokens if max(tokens[name]["ids"], default=0) < rows}
        for form in ("single", "pair"):
            kept = {None, *result["special_tokens"]}
            result[form] = [part for part in processor[form] if part.get("SpecialToken", {}).get("id") in kept]
    return result


def renumber_added_tokens(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose added tokens have the numbers that the tokenizers library gives them.

    It counts them in the order in which they are listed, whatever numbers the file says.
    """
    added = tokenizer.get("added_tokens") or []
    numbers = load_tokenizer(json.dumps(tokenizer)).get_vocab()
    entries = [entry | {"id": numbers[entry["content"]]} for entry in added if entry["content"]]
    if entries == added:
        return dict(tokenizer)
    return {**tokenizer, "added_tokens": entries}


def number_of_token(tokenizer: Mapping[str, Any], token: str) -> int | None:
    """The id of a token in a tokenizer.json; None where it has none."""
    for entry in tokenizer.get("added_tokens") or []:
        if entry.get("content") == token:
            return int(entry["id"])
    return _tokens_of_model(tokenizer).get(token)


def _tokens_of_model(tokenizer: Mapping[str, Any]) -> Mapping[str, int]:
    """The tokens that are not added."""
    tokens: Any = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(tokens, list):  # Unigram: [token, score] in the order of their numbers
        return {token: number for number, (token, _) in enumerate(tokens)}
    found: Mapping[str, int] = tokens
    return found


def special_ids(files: Mapping[str, bytes], rows: int) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id as the files of a tokenizer say them, those with a row."""
    if CONFIG_FILE not in files or TOKENIZER_FILE not in files:
        return {}
    config, tokenizer = object_in(files[CONFIG_FILE]), object_in(files[TOKENIZER_FILE])
    found = {}
    for name in NAMES:
        if not config.get(name):
            continue
        number = number_of_token(tokenizer, text_of(config[name]))
        if number is not None and number < rows:
            found[f"{name}_id"] = number
    return found


def complete_ids(config: Mapping[str, Any], ids: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A configuration whose ids of special tokens have rows: its own that have, else the tokenizer's."""
    result = dict(config)
    for token in NAMES:
        name = f"{token}_id"
        numbers = result.get(name)
        if not isinstance(numbers, list):
            numbers = [numbers]
        kept = [number for number in numbers if type(number) is int and 0 <= number < rows]
        if kept and kept != numbers:
            result[name] = kept
        elif not kept:
            result.pop(name, None)
            if name in ids:
                result[name] = ids[name]
    return result


def generation_file(files: Mapping[str, bytes], ids: Mapping[str, Any], rows: int) -> bytes | None:
    """generation_config.json with the ids of special tokens; None where there is nothing to say."""
    if GENERATION not in files:
        return as_json(ids) if ids else None
    given = object_in(files[GENERATION])
    made = complete_ids(given, ids, rows)
    return files[GENERATION] if made == given else as_json(made)


def text_of(token: object) -> str:
    """A token's text, given as such or as an object."""
    return str(token.get("content") if isinstance(token, dict) else token)


def as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def object_in(content: bytes) -> dict[str, Any]:
    """The JSON object that a file holds; an empty one where it holds none."""
    try:
        read = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _prefix_space(tokenizer: Mapping[str, Any]) -> bool | None:
    """Whether a byte-level tokenizer puts a blank before a text; None for other kinds."""
    first_cut = tokenizer.get("pre_tokenizer")
    if not isinstance(first_cut, dict) or first_cut.get("type") != "ByteLevel":
        return None
    return bool(first_cut.get("add_prefix_space", True))
