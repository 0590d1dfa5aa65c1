"""The files that hold vocabularies, each read by itself: from a token to its number, as the file says it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import read_json

_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_OLD_MEGATRONS_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
_TIKTOKEN_SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")


class UnknownVocabularyError(ValueError):
    """A vocabulary that cannot be known; its text says why, to be put after the model's name."""


def read_base(file: Path) -> dict[str, int]:
    """The tokens of one file, whatever its kind."""
    if file.name == "tekken.json":
        return _read_tekken(file)
    if file.suffix == ".json":
        return _read_vocabulary_json(file)
    if file.suffix == ".txt":
        return _read_lines(file)
    if file.suffix == ".tiktoken":
        return _read_tiktoken(file)
    try:
        return _read_sentencepiece(file)
    except UnknownVocabularyError:
        return _read_unnamed(file)


def _read_lines(file: Path) -> dict[str, int]:
    """One token a line, numbered from 0; nothing follows the last line's end."""
    lines = _read_text(file).split("\n")
    if not lines[-1]:
        lines.pop()
    return {line.rstrip("\r"): number for number, line in enumerate(lines)}


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
    content = read_object(file)
    if "model" not in content or isinstance(content["model"], int):
        if file.name == "tokenizer.json":
            raise UnknownVocabularyError(f"{file}: has no model")
        tokens: Any = content
    else:
        model = content["model"]
        tokens = None
        if isinstance(model, dict):
            tokens = model.get("vocab")
        if isinstance(tokens, list):  # Unigram: [token, score] in the order of their numbers
            tokens = {_first(entry, file): number for number, entry in enumerate(tokens)}
    if not isinstance(tokens, dict):
        raise UnknownVocabularyError(f"{file}: has no vocabulary")
    return {token: number_of(number, file) for token, number in tokens.items()}


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
            tokens[token] = number_of(" ".join(words[1:]), file)
    if not tokens:
        raise UnknownVocabularyError(f"{file} is empty")
    return tokens


def _read_tekken(file: Path) -> dict[str, int]:
    """Mistral's form: special tokens first, then bytes in base64 in the order of their ranks."""
    content = read_object(file)
    config, entries = content.get("config"), content.get("vocab")
    specials = content.get("special_tokens") or []
    if not isinstance(config, dict) or not isinstance(entries, list) or not isinstance(specials, list):
        raise UnknownVocabularyError(f"{file}: has no config and vocab as Mistral's tekken files have")
    count = number_of(config.get("default_num_special_tokens"), file)
    size = number_of(config.get("default_vocab_size"), file)
    tokens = {f"<SPECIAL_{number}>": number for number in range(count)}
    for entry in specials:
        number = number_of(_field(entry, "rank", file), file)
        tokens.pop(f"<SPECIAL_{number}>", None)
        tokens[str(_field(entry, "token_str", file))] = number
    for rank, entry in enumerate(entries[: max(0, size - count)]):
        tokens[_as_byte_level(_field(entry, "token_bytes", file), file)] = count + rank
    return tokens


def read_megatron_tiktoken(file: Path, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Megatron's TikTokenizer (core/tokenizers/text/libraries/tiktoken_tokenizer.py): special tokens, then ranks."""
    entries = _read_json(file)
    if not isinstance(entries, list):
        raise UnknownVocabularyError(f"{file}: is no list of tokens")
    count = arguments.get("tiktoken_num_special_tokens", 1000)
    given = arguments.get("tiktoken_special_tokens") or arguments.get("special_tokens") or _TIKTOKEN_SPECIALS
    names = list(map(str, given))
    while len(names) < count:
        names.append(f"<SPECIAL_{len(names)}>")
    tokens = {name: number for number, name in enumerate(names[:count])}
    size = arguments.get("vocab_size") or 2**17
    for rank, entry in enumerate(entries[: max(0, size - count)]):
        tokens[_as_byte_level(_field(entry, "token_bytes", file), file)] = count + rank
    return tokens


def with_old_megatrons_tokens(tokens: dict[str, int], kind: str, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Megatron before its core tokenizers gave SentencePiece models tokens of its own, after the pieces.

    Source: ``_SentencePieceTokenizer`` in megatron/training/tokenizer/tokenizer.py up to 0.14; newer versions store
    ``tokenizer_sentencepiece_legacy``, older ones ``vocab_extra_ids``.
    """
    old = arguments.get("legacy_tokenizer", "tokenizer_sentencepiece_legacy" not in arguments)
    if not old or "vocab_extra_ids" not in arguments:
        return tokens
    added: list[str] = []
    if kind == "SentencePieceTokenizer":
        added += _OLD_MEGATRONS_TOKENS
        for piece, name in {"<pad>": "<PAD>", "<s>": "<BOS>", "</s>": "<EOS>"}.items():
            if piece not in tokens:
                added.append(name)
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
    if is_pointer(file):
        raise UnknownVocabularyError(f"{file} is a pointer of Git LFS in place of the file; fetch it: git lfs pull")


def is_pointer(file: Path) -> bool:
    """Whether a file is what Git LFS leaves where the file itself was not fetched."""
    with file.open("rb") as opened:
        return opened.read(len(_LFS_POINTER)) == _LFS_POINTER


def _read_text(file: Path) -> str:
    refuse_pointer(file)
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise UnknownVocabularyError(f"{file} is no text in UTF-8") from error


def _read_json(file: Path) -> Any:
    refuse_pointer(file)
    try:
        return read_json(file, "it is damaged")
    except InputError as error:
        raise UnknownVocabularyError(str(error)) from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not file.is_file():
        return {}
    content = _read_json(file)
    if not isinstance(content, dict):
        raise UnknownVocabularyError(f"{file} holds no JSON object")
    return content


def number_of(value: object, file: Path) -> int:
    """The number of a token, written as a number or as digits."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if type(value) is int and value >= 0:
        return value
    raise UnknownVocabularyError(f"{file}: {value!r} is no number of a token")


def content_of(value: object, file: Path) -> str:
    """A token as a plain text or as an object."""
    text = value
    if isinstance(value, dict):
        text = value.get("content")
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
    characters, others = [], 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + others))
            others += 1
    return characters


_BYTE_CHARACTERS = _byte_characters()


def by_number(tokens: Mapping[str, int], file: Path) -> dict[int, str]:
    """The token of each number. Raises UnknownVocabularyError where two tokens have one number."""
    found: dict[int, str] = {}
    for token, number in tokens.items():
        if found.setdefault(number, token) != token:
            raise UnknownVocabularyError(f"{file}: token {number} is both {found[number]!r} and {token!r}")
    return dict(sorted(found.items()))
