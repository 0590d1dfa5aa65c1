"""The vocabulary of a model: which token each row of its embedding belongs to, read from the files of its tokenizer.

A row means what its token means, so models can be averaged row by row only where their tables agree. A table comes from
several files: a base (``tokenizer.json``, a SentencePiece or tiktoken model, ``vocab.json``, ``vocab.txt``) and tokens
added to it (``tokenizer.json`` itself, ``tokenizer_config.json``, ``added_tokens.json``, ``special_tokens_map.json``).
Where the files of one folder disagree, the table is what transformers' ``AutoTokenizer`` (4.57 and 5 alike) makes of
them: ``added_tokens_decoder`` replaces the older files, a token that is known keeps its number, and a new one gets the
next free number, whatever number the file says.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
"""The arguments that name a tokenizer's files."""

TOKENIZER_FOLDER_FILES = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "tekken.json", "*.tiktoken",
)  # fmt: skip
"""Files of a tokenizer in a Hugging Face folder."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_OLD_MEGATRONS_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
_TIKTOKEN_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


class UnknownVocabularyError(ValueError):
    """A vocabulary that cannot be known; its text says why, to be put after the model's name."""


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
        tokens = _read_megatron_tiktoken(place, arguments)
    else:
        tokens = _read_base(place)
        tokens = _with_old_megatrons_tokens(tokens, kind, arguments)
    return Vocabulary(_by_number(tokens, place), place)


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
    named = next((arguments[argument] for argument in TOKENIZER_FILES if arguments.get(argument)), None)
    return Path(named) if named else None


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
    tokens = _read_base(base)
    config = _read_object(folder / "tokenizer_config.json")
    added = _added_by_files(folder, config)
    if base.name == "tokenizer.json":
        own = _added_in_tokenizer_json(base)
        tokens = _with_added(tokens, _in_order(own), base)
        if "added_tokens_decoder" not in config:
            added |= own
    if "added_tokens_decoder" not in config:
        config = config | _read_object(folder / "special_tokens_map.json")
    tokens = _with_added(tokens, [*_in_order(added), *_named_tokens(config, folder)], base)
    return Vocabulary(_by_number(tokens, base), base)


def _base_file(folder: Path) -> Path:
    """The file that AutoTokenizer starts from."""
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"):
        if (folder / name).is_file():
            return folder / name
    others = [file for pattern in ("*.model", "*.tiktoken") for file in sorted(folder.glob(pattern))]
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
        return {_number(key, where): _content(value, where) for key, value in entries.items()}
    where = folder / "added_tokens.json"
    return {_number(value, where): key for key, value in _read_object(where).items()}


def _added_in_tokenizer_json(file: Path) -> dict[int, str]:
    entries = _read_object(file).get("added_tokens", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UnknownVocabularyError(f"{file}: added_tokens is no list of objects")
    return {_number(entry.get("id"), file): _content(entry, file) for entry in entries}


def _named_tokens(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Tokens that have a name (bos, pad, ...) or are listed as special; most are in the vocabulary already."""
    values = [config.get(name) for name in _NAMED_TOKENS]
    for name in _LISTED_TOKENS:
        listed = config.get(name)
        values += list(listed.values()) if isinstance(listed, dict) else list(listed or [])
    where = folder / "tokenizer_config.json"
    return [_content(value, where) for value in values if value is not None]


def _in_order(added: Mapping[int, str]) -> list[str]:
    return [token for _, token in sorted(added.items())]


def _with_added(tokens: dict[str, int], added: Iterable[str], where: Path) -> dict[str, int]:
    """Tokens with more of them: one that is known keeps its number, a new one gets the next.

    The next is counted as the tokenizers library does: after the base's tokens, and after what was added before.
    """
    result = dict(tokens)
    taken = set(result.values())
    size = highest = len(tokens)
    for token in added:
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


# --- files ----------------------------------------------------------------------------------------------------


def _read_base(file: Path) -> dict[str, int]:
    """The tokens of one file, whatever its kind."""
    if file.name == "tekken.json":
        return _read_tekken(file)
    if file.suffix == ".json":
        return _read_vocabulary_json(file)
    if file.suffix == ".txt":
        lines = _read_text(file).split("\n")
        return {line.rstrip("\r"): number for number, line in enumerate(lines) if line or number + 1 < len(lines)}
    if file.suffix == ".tiktoken":
        return _read_tiktoken(file)
    try:
        return _read_sentencepiece(file)
    except UnknownVocabularyError:
        return _read_unnamed(file)


def _read_unnamed(file: Path) -> dict[str, int]:
    """A file whose name does not say what it is: Llama 3 calls a tiktoken file ``tokenizer.model``."""
    for read in (_read_tiktoken, _read_vocabulary_json):
        try:
            return read(file)
        except UnknownVocabularyError:
            continue
    raise UnknownVocabularyError(f"{file} is no tokenizer that can be read (SentencePiece, tiktoken, JSON)")


def _read_vocabulary_json(file: Path) -> dict[str, int]:
    """``tokenizer.json`` (its model alone), or a plain object from tokens to numbers."""
    content = _read_object(file)
    if "model" not in content or isinstance(content["model"], int):
        if file.name == "tokenizer.json":
            raise UnknownVocabularyError(f"{file}: has no model")
        tokens: Any = content
    else:
        model = content["model"]
        tokens = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(tokens, list):  # Unigram: [token, score] in the order of their numbers
            tokens = {_first(entry, file): number for number, entry in enumerate(tokens)}
    if not isinstance(tokens, dict):
        raise UnknownVocabularyError(f"{file}: has no vocabulary")
    return {token: _number(number, file) for token, number in tokens.items()}


def _first(entry: object, file: Path) -> str:
    if isinstance(entry, list) and entry and isinstance(entry[0], str):
        return entry[0]
    raise UnknownVocabularyError(f"{file}: {entry!r} is no token with a score")


def _read_sentencepiece(file: Path) -> dict[str, int]:
    import sentencepiece

    refuse_pointer(file)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UnknownVocabularyError(f"{file} is no SentencePiece model") from error
    return {model.id_to_piece(number): number for number in range(model.get_piece_size())}


def _read_tiktoken(file: Path) -> dict[str, int]:
    """Lines of a token's bytes in base64 and its number."""
    tokens = {}
    for line in _read_text(file).splitlines():
        words = line.split()
        if words:
            token = _as_byte_level(words[0], file)
            tokens[token] = _number(words[1] if len(words) == 2 else None, file)
    if not tokens:
        raise UnknownVocabularyError(f"{file} is empty")
    return tokens


def _read_tekken(file: Path) -> dict[str, int]:
    """Mistral's form: special tokens first, then bytes in base64 in the order of their ranks."""
    content = _read_object(file)
    config, entries = content.get("config"), content.get("vocab")
    specials = content.get("special_tokens") or []
    if not isinstance(config, dict) or not isinstance(entries, list) or not isinstance(specials, list):
        raise UnknownVocabularyError(f"{file}: has no config and vocab as Mistral's tekken files have")
    count = _number(config.get("default_num_special_tokens"), file)
    size = _number(config.get("default_vocab_size"), file)
    tokens = {f"<SPECIAL_{number}>": number for number in range(count)}
    for entry in specials:
        number = _number(_field(entry, "rank", file), file)
        tokens.pop(f"<SPECIAL_{number}>", None)
        tokens[str(_field(entry, "token_str", file))] = number
    for rank, entry in enumerate(entries[: max(0, size - count)]):
        tokens[_as_byte_level(_field(entry, "token_bytes", file), file)] = count + rank
    return tokens


def _read_megatron_tiktoken(file: Path, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Megatron's TikTokenizer (core/tokenizers/text/libraries/tiktoken_tokenizer.py): special tokens, then ranks."""
    entries = _read_json(file)
    if not isinstance(entries, list):
        raise UnknownVocabularyError(f"{file}: is no list of tokens")
    count = arguments.get("tiktoken_num_special_tokens", 1000)
    given = arguments.get("tiktoken_special_tokens") or arguments.get("special_tokens") or _TIKTOKEN_SPECIALS
    names = [*map(str, given), *(f"<SPECIAL_{number}>" for number in range(len(given), count))]
    tokens = {name: number for number, name in enumerate(names[:count])}
    size = arguments.get("vocab_size") or 2**17
    for rank, entry in enumerate(entries[: max(0, size - count)]):
        tokens[_as_byte_level(_field(entry, "token_bytes", file), file)] = count + rank
    return tokens


def _with_old_megatrons_tokens(tokens: dict[str, int], kind: str, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Megatron before its core tokenizers gave SentencePiece models tokens of its own, after the pieces.

    Source: ``_SentencePieceTokenizer`` in megatron/training/tokenizer/tokenizer.py up to 0.14; newer versions store
    ``tokenizer_sentencepiece_legacy``, older ones ``vocab_extra_ids``.
    """
    old = arguments.get("legacy_tokenizer", "tokenizer_sentencepiece_legacy" not in arguments)
    if not old or "vocab_extra_ids" not in arguments:
        return tokens
    added: list[str] = []
    if kind == "SentencePieceTokenizer":
        added += [*_OLD_MEGATRONS_TOKENS]
        missing = {"<pad>": "<PAD>", "<s>": "<BOS>", "</s>": "<EOS>"}
        added += [name for piece, name in missing.items() if piece not in tokens]
    if kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        added += [f"<extra_id_{number}>" for number in range(arguments.get("vocab_extra_ids") or 0)]
    result = dict(tokens)
    for token in added:
        result.setdefault(token, len(result))
    return result


# --- values ---------------------------------------------------------------------------------------------------


def refuse_pointer(file: Path) -> None:
    """Refuse what Git LFS leaves where a file was not fetched.

    Raises:
        UnknownVocabularyError: the file is such a pointer.
    """
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UnknownVocabularyError(f"{file} is a pointer of Git LFS in place of the file; fetch it: git lfs pull")


def _read_text(file: Path) -> str:
    refuse_pointer(file)
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise UnknownVocabularyError(f"{file} is no text in UTF-8") from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(_read_text(file))
    except UnknownVocabularyError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnknownVocabularyError(f"{file} is no JSON") from error


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not file.is_file():
        return {}
    content = _read_json(file)
    if not isinstance(content, dict):
        raise UnknownVocabularyError(f"{file} holds no JSON object")
    return content


def _number(value: object, file: Path) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if type(value) is int and value >= 0:
        return value
    raise UnknownVocabularyError(f"{file}: {value!r} is no number of a token")


def _content(value: object, file: Path) -> str:
    """A token as a plain text or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    if isinstance(text, str):
        return text
    raise UnknownVocabularyError(f"{file}: {value!r} is no token")


def _field(entry: object, key: str, file: Path) -> Any:
    if isinstance(entry, dict) and key in entry:
        return entry[key]
    raise UnknownVocabularyError(f"{file}: {entry!r} has no {key}")


def _as_byte_level(text: object, file: Path) -> str:
    """Bytes given in base64, as GPT-2 writes them: one printable character for each byte."""
    try:
        content = base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnknownVocabularyError(f"{file}: {text!r} is no base64") from error
    return "".join(map(_BYTE_CHARACTERS.__getitem__, content))


def _byte_characters() -> list[str]:
    """The character of each byte: printable ones stand for themselves, the rest follow from 256 on (Radford 2019)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()


def _by_number(tokens: Mapping[str, int], file: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for token, number in tokens.items():
        if found.setdefault(number, token) != token:
            raise UnknownVocabularyError(f"{file}: token {number} is both {found[number]!r} and {token!r}")
    return dict(sorted(found.items()))
