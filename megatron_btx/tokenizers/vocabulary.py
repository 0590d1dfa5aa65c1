"""The vocabulary of a model: which token each row of its embedding belongs to, read from the files of its tokenizer.

A row means what its token means, so models can be averaged row by row only where their tables agree. A table comes from
several files: a base (``tokenizer.json``, a SentencePiece or tiktoken model, ``vocab.json``, ``vocab.txt``) and tokens
added to it (``tokenizer.json`` itself, ``tokenizer_config.json``, ``added_tokens.json``, ``special_tokens_map.json``).
Where the files of one folder disagree, the table is what transformers' ``AutoTokenizer`` (4.57 and 5 alike) makes of
them: ``added_tokens_decoder`` replaces the older files, a token that is known keeps its number, and a new one gets the
next free number, whatever number the file says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.tokenizers.files import (
    UnknownVocabularyError,
    by_number,
    content_of,
    number_of,
    read_base,
    read_megatron_tiktoken,
    read_object,
    with_old_megatrons_tokens,
)

TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
"""The arguments that name a tokenizer's files."""

TOKENIZER_FOLDER_FILES = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "tekken.json", "*.tiktoken",
)  # fmt: skip
"""Files of a tokenizer in a Hugging Face folder."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Every token of a tokenizer; rows that no token has are padding."""

    tokens: Mapping[int, str]
    """From the number of a row to its token. Byte-level tokens are written as GPT-2 writes them."""
    base: Path
    """The file that most of them stand in."""

    def below(self, rows: int) -> dict[int, str]:
        """The tokens that a model of so many rows has: numbers beyond them mean nothing to it."""
        return {number: token for number, token in self.tokens.items() if number < rows}


@dataclasses.dataclass(frozen=True, eq=False)
class ModelTokenizer:
    """The tokenizer of one model, as its files and its stored arguments tell it."""

    model: str
    """The model's name, to show."""
    arguments: Mapping[str, Any]
    """Megatron's stored arguments; ``hf_folder`` among them is a Hugging Face folder, or None."""
    rows: int
    """Rows of the model's embedding."""
    root: Path
    """The model's folder."""

    @property
    def folder(self) -> Path | None:
        """The folder with Hugging Face's files, where there is one."""
        folder: Path | None = self.arguments["hf_folder"]
        return folder

    @property
    def place(self) -> Path | None:
        """The folder or file that the tokenizer lies in; None where none is named."""
        return tokenizer_place(self.arguments)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """What the tokenizer's files say; None where they cannot be read."""
        return read_vocabulary(self.arguments)

    @functools.cached_property
    def tokens(self) -> dict[int, str] | None:
        """The token of each row that has one; None where the tokenizer's files cannot be read."""
        if self.vocabulary is None:
            return None
        return self.vocabulary.below(self.rows)


def read_vocabulary(arguments: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a model, or None where it cannot be known; see :func:`known_vocabulary`."""
    try:
        return known_vocabulary(arguments)
    except UnknownVocabularyError:
        return None


def known_vocabulary(arguments: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a model.

    Args:
        arguments: Megatron's stored arguments; ``hf_folder`` among them is a Hugging Face folder.

    Raises:
        UnknownVocabularyError: says why it cannot be known.
    """
    place = tokenizer_place(arguments)
    if place is None:
        raise UnknownVocabularyError("no tokenizer comes with it")
    if place.is_dir():
        return _read_folder(place)
    if not place.is_file():
        raise UnknownVocabularyError(f"its tokenizer {place} cannot be found")
    kind = str(arguments.get("tokenizer_type"))
    if kind == "TikTokenizer":
        tokens = read_megatron_tiktoken(place, arguments)
    else:
        tokens = read_base(place)
        tokens = with_old_megatrons_tokens(tokens, kind, arguments)
    return Vocabulary(by_number(tokens, place), place)


def unknown_reason(arguments: Mapping[str, Any]) -> str:
    """Why a vocabulary cannot be known; "" where it is known."""
    try:
        known_vocabulary(arguments)
    except UnknownVocabularyError as error:
        return str(error)
    return ""


def tokenizer_place(arguments: Mapping[str, Any]) -> Path | None:
    """The folder or file that a model's tokenizer lies in, whether it is there or not; None where none is named."""
    folder = arguments.get("hf_folder")
    if folder is not None and tokenizer_files(Path(folder)):
        return Path(folder)
    if folder is not None and (Path(folder) / "config.json").is_file() and _is_same(folder, arguments):
        return None
    for argument in TOKENIZER_FILES:
        if arguments.get(argument):
            return Path(arguments[argument])
    return None


def _is_same(folder: object, arguments: Mapping[str, Any]) -> bool:
    """Whether the stored tokenizer is the folder itself, in which there is no file of a tokenizer."""
    named = arguments.get("tokenizer_model")
    return named is None or Path(named) == Path(str(folder))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder, in the order of their names."""
    found: set[Path] = set()
    for pattern in TOKENIZER_FOLDER_FILES:
        found.update(file for file in folder.glob(pattern) if file.is_file())
    return sorted(found)


# --- a Hugging Face folder ------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Vocabulary:
    """What AutoTokenizer makes of a folder."""
    base = _base_file(folder)
    tokens = read_base(base)
    config = read_object(folder / "tokenizer_config.json")
    added = _added_by_files(folder, config)
    if base.name == "tokenizer.json":
        own = _added_in_tokenizer_json(base)
        tokens = with_added(tokens, [token for _, token in own], base)  # as they are listed, whatever their numbers
        if "added_tokens_decoder" not in config:
            added |= dict(own)
    if "added_tokens_decoder" not in config:
        config = config | read_object(folder / "special_tokens_map.json")
    tokens = with_added(tokens, [*(added[number] for number in sorted(added)), *_named_tokens(config, folder)], base)
    return Vocabulary(by_number(tokens, base), base)


def _base_file(folder: Path) -> Path:
    """The file that AutoTokenizer starts from."""
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"):
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.model")) + sorted(folder.glob("*.tiktoken"))
    if len(others) == 1:
        return others[0]
    if others:
        raise UnknownVocabularyError(f"{folder} holds several tokenizers: {others[0].name} and {others[1].name}")
    raise UnknownVocabularyError(
        f"its tokenizer cannot be found: {folder} holds no tokenizer.json, tokenizer.model, vocab.json or vocab.txt"
    )


def _added_by_files(folder: Path, config: Mapping[str, Any]) -> dict[int, str]:
    """The added tokens that stand beside the base: the older file counts where the newer place says nothing."""
    if "added_tokens_decoder" in config:
        where = folder / "tokenizer_config.json"
        entries = config["added_tokens_decoder"]
        if not isinstance(entries, dict):
            raise UnknownVocabularyError(f"{where}: added_tokens_decoder is no object")
        return {number_of(key, where): content_of(value, where) for key, value in entries.items()}
    where = folder / "added_tokens.json"
    return {number_of(value, where): key for key, value in read_object(where).items()}


def _added_in_tokenizer_json(file: Path) -> list[tuple[int, str]]:
    entries = read_object(file).get("added_tokens", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UnknownVocabularyError(f"{file}: added_tokens is no list of objects")
    return [(number_of(entry.get("id"), file), content_of(entry, file)) for entry in entries]


def _named_tokens(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Tokens that have a name (bos, pad, ...) or are listed as special; most are in the vocabulary already."""
    values = [config.get(name) for name in _NAMED_TOKENS]
    for name in _LISTED_TOKENS:
        listed = config.get(name) or []
        if isinstance(listed, dict):
            listed = listed.values()
        values += listed
    where = folder / "tokenizer_config.json"
    return [content_of(value, where) for value in values if value is not None]


def with_added(tokens: dict[str, int], added: Iterable[str], where: Path) -> dict[str, int]:
    """Tokens with more of them: one that is known keeps its number, a new one gets the next.

    The next is counted as the tokenizers library does: after the base's tokens, and after what was added before.

    Raises:
        UnknownVocabularyError: the next number is another token's, because the base has holes.
    """
    result = dict(tokens)
    taken = set(result.values())
    size = highest = len(tokens)
    for token in filter(None, added):  # the library passes over an empty one
        if token not in result:
            if highest in taken:
                other = next(known for known, number in result.items() if number == highest)
                raise UnknownVocabularyError(
                    f"{where}: token {highest} is {other!r}, and {token!r} is added as {highest}"
                )
            result[token] = highest
            taken.add(highest)
        highest = max(highest, size, result[token] + 1)
    return result
