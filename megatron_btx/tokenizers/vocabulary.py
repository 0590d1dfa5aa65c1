"""The vocabulary of a model: which token each row of its embedding belongs to, read from the files of its tokenizer.

A row means what its token means, so models can be averaged row by row only where their tables agree. A table comes from
several files: a base (``tokenizer.json``, a SentencePiece model, ``vocab.json``, ``vocab.txt``) and tokens added to it
(``tokenizer.json`` itself, ``tokenizer_config.json``, ``added_tokens.json``, ``special_tokens_map.json``). Where the
files of one folder disagree, the table is what transformers' ``AutoTokenizer`` (4.57 and 5 alike) makes of them:
``added_tokens_decoder`` replaces the older files, a token that is known keeps its number, and a new one gets the next
free number, whatever number the file says. The ``tokenizers`` library reads tokenizer.json and numbers what is added.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, bare_exceptions_as
from megatron_btx.common.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
"""The arguments that name a tokenizer's files."""

TOKENIZER_FOLDER_FILES = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "tekken.json", "*.tiktoken",
)  # fmt: skip
"""Files of a tokenizer in a Hugging Face folder."""
CONFIG_FILE, TOKENIZER_FILE = "tokenizer_config.json", "tokenizer.json"
HF_FOLDER = "huggingface"
"""Beside a Megatron checkpoint made from Hugging Face models: their configuration, tokenizer and generation files."""

_BASES = (TOKENIZER_FILE, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_OLD_MEGATRONS_TOKENS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>")
_LARGEST_NUMBER = 2**31


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


@dataclasses.dataclass(frozen=True, eq=False)
class ModelTokenizer:
    """The tokenizer of one model, as its files and its stored arguments tell it."""

    model: str
    """The model's name, to show."""
    arguments: Mapping[str, Any]
    """Megatron's stored arguments; ``hf_folder`` among them is a Hugging Face folder, or None."""

    @property
    def rows(self) -> int:
        """Rows of the model's embedding; 0 where they are not known."""
        return int(self.arguments.get("padded_vocab_size") or 0)

    @property
    def place(self) -> Path | None:
        """As :func:`tokenizer_place`."""
        return tokenizer_place(self.arguments)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What the tokenizer's files say; raises UnknownVocabularyError."""
        return known_vocabulary(self.arguments)

    @functools.cached_property
    def tokens(self) -> dict[int, str] | None:
        """The token of each row that has one; None where the tokenizer's files cannot be read."""
        try:
            return self.vocabulary.below(self.rows)
        except UnknownVocabularyError:
            return None


def read_vocabulary(arguments: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a model, or None where it cannot be known; see :func:`known_vocabulary`."""
    try:
        return known_vocabulary(arguments)
    except UnknownVocabularyError:
        return None


def known_vocabulary(arguments: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that stored arguments lead to; UnknownVocabularyError says why it cannot be known."""
    place = tokenizer_place(arguments)
    if place is None:
        raise UnknownVocabularyError("no tokenizer comes with it")
    if place.is_dir():
        return _read_folder(place)
    if not place.is_file():
        raise UnknownVocabularyError(f"its tokenizer {place} cannot be found")
    tokens = _read_tokens(place)
    for token in old_megatrons_tokens(tokens, arguments):
        tokens[token] = len(tokens)
    return Vocabulary(_by_number(tokens, place), place)


def tokenizer_place(arguments: Mapping[str, Any]) -> Path | None:
    """The folder or file that a model's tokenizer lies in, whether it is there or not; None where none is named."""
    folder = arguments.get("hf_folder")
    if folder is not None and tokenizer_files(Path(folder)):
        return Path(folder)
    if folder is not None and (Path(folder) / "config.json").is_file():
        named = arguments.get("tokenizer_model")
        if named is None or Path(named) == Path(folder):  # the folder itself, which holds no tokenizer
            return None
    for argument in TOKENIZER_FILES:
        if arguments.get(argument):
            return Path(arguments[argument])
    return None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder, in the order of their names."""
    found: set[Path] = set()
    for pattern in TOKENIZER_FOLDER_FILES:
        found.update(file for file in folder.glob(pattern) if file.is_file())
    return sorted(found)


def locate_tokenizer(arguments: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Arguments with the tokenizer's files where they are: paths of the machine where a checkpoint was made are gone.

    Files of the same names beside the weights, or in the folder with Hugging Face's files, take their place.
    """
    found = dict(arguments)
    for argument in TOKENIZER_FILES:
        named = arguments.get(argument)
        if not isinstance(named, str | Path) or not str(named) or Path(named).exists():
            continue
        for folder in (root, root / HF_FOLDER):
            if (folder / Path(named).name).is_file():
                found[argument] = str(folder / Path(named).name)
                break
    named, folder = found.get("tokenizer_model"), root / HF_FOLDER
    is_folder = found.get("tokenizer_type") == "HuggingFaceTokenizer" and isinstance(named, str)
    if is_folder and not Path(str(named)).exists() and tokenizer_files(folder):
        found["tokenizer_model"] = str(folder)
    return found


def as_shell_word(path: str) -> str:
    """A path as one word of ``$(cat FILE)``, which a shell cuts at blanks, whatever quotes are in the file.

    ``?`` for each special character is a pattern that the shell makes the path of again, in one word.
    """
    return re.sub(r"[\s*?\[\\]", "?", path)


# --- a Hugging Face folder ------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Vocabulary:
    """What AutoTokenizer makes of a folder."""
    from tokenizers import Tokenizer, models

    base = _base_file(folder)
    config = read_object(folder / CONFIG_FILE)
    added = _added_by_files(folder, config)
    if base.name == TOKENIZER_FILE:
        tokenizer = read_tokenizer(base)
        if "added_tokens_decoder" not in config:
            for number, token in tokenizer.get_added_tokens_decoder().items():
                added[number] = token.content
    else:
        tokenizer = Tokenizer(models.WordLevel(_read_tokens(base), unk_token=""))
    if "added_tokens_decoder" not in config:
        config = config | read_object(folder / "special_tokens_map.json")
    tokenizer.add_tokens([added[number] for number in sorted(added)] + _named_tokens(config, folder))
    return Vocabulary(_by_number(tokenizer.get_vocab(), base), base)


def _base_file(folder: Path) -> Path:
    """The file that AutoTokenizer starts from."""
    for name in _BASES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.model"))
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
        where = folder / CONFIG_FILE
        entries = config["added_tokens_decoder"]
        if not isinstance(entries, dict):
            raise UnknownVocabularyError(f"{where}: added_tokens_decoder is no object")
        return {_number_of(key, where): _content_of(value, where) for key, value in entries.items()}
    where = folder / "added_tokens.json"
    return {_number_of(value, where): key for key, value in read_object(where).items()}


def _named_tokens(config: Mapping[str, Any], folder: Path) -> list[str]:
    """Tokens that have a name (bos, pad, ...) or are listed as special; most are in the vocabulary already."""
    values = [config.get(name) for name in _NAMED_TOKENS]
    for name in _LISTED_TOKENS:
        listed = config.get(name) or []
        if isinstance(listed, dict):
            listed = listed.values()
        values += listed
    where = folder / CONFIG_FILE
    return [_content_of(value, where) for value in values if value is not None]


# --- a single file --------------------------------------------------------------------------------------------


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json as the ``tokenizers`` library reads it; UnknownVocabularyError where it cannot."""
    content = _read_text(file)
    try:
        return load_tokenizer(content)
    except InputError as error:
        raise UnknownVocabularyError(f"{file}: {error}") from error


def load_tokenizer(content: str) -> Tokenizer:
    """The tokenizer that the content of a tokenizer.json is; InputError where the installed library reads none."""
    from tokenizers import Tokenizer

    unreadable = "tokenizer.json cannot be read by the tokenizers library"
    with bare_exceptions_as(lambda error: InputError(f"{unreadable} ({error})")):
        return Tokenizer.from_str(content)


def _read_tokens(file: Path) -> dict[str, int]:
    """The tokens of one file, whatever its kind."""
    if file.name == TOKENIZER_FILE:
        return read_tokenizer(file).get_vocab()
    if file.suffix == ".json":
        return {token: _number_of(number, file) for token, number in read_object(file).items()}
    if file.suffix == ".txt":  # a token a line, numbered from 0
        lines = _read_text(file).split("\n")
        if not lines[-1]:
            lines.pop()
        return {line.rstrip("\r"): number for number, line in enumerate(lines)}
    import sentencepiece

    refuse_pointer(file)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise UnknownVocabularyError(f"{file} is no SentencePiece model") from error
    return {model.id_to_piece(number): number for number in range(model.get_piece_size())}


def old_megatrons_tokens(pieces: Mapping[str, int], arguments: Mapping[str, Any]) -> list[str]:
    """The tokens that Megatron before its core tokenizers put after the pieces of a SentencePiece model.

    Source: ``_SentencePieceTokenizer`` in megatron/training/tokenizer/tokenizer.py up to 0.14; newer versions store
    ``tokenizer_sentencepiece_legacy``, older ones ``vocab_extra_ids``.
    """
    kind = arguments.get("tokenizer_type")
    old = arguments.get("legacy_tokenizer", "tokenizer_sentencepiece_legacy" not in arguments)
    if not old or "vocab_extra_ids" not in arguments:
        return []
    added: list[str] = []
    if kind == "SentencePieceTokenizer":
        added += _OLD_MEGATRONS_TOKENS
        for piece, name in {"<pad>": "<PAD>", "<s>": "<BOS>", "</s>": "<EOS>"}.items():
            if piece not in pieces:
                added.append(name)
    if kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"):
        added += [f"<extra_id_{number}>" for number in range(arguments.get("vocab_extra_ids") or 0)]
    return [token for token in dict.fromkeys(added) if token not in pieces]


# --- values ---------------------------------------------------------------------------------------------------


def refuse_pointer(file: Path) -> None:
    """Raise UnknownVocabularyError for what Git LFS leaves where a file was not fetched."""
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


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file; UnknownVocabularyError where it holds none."""
    if not file.is_file():
        return {}
    refuse_pointer(file)
    try:
        content = read_json(file, "it is damaged")
        json.dumps(content, ensure_ascii=False).encode()  # JSON can spell half of a character, which no library takes
    except InputError as error:
        raise UnknownVocabularyError(str(error)) from error
    except (UnicodeEncodeError, RecursionError) as error:
        raise UnknownVocabularyError(f"{file} holds what is no text ({error})") from error
    if not isinstance(content, dict):
        raise UnknownVocabularyError(f"{file} holds no JSON object")
    return content


def _number_of(value: object, file: Path) -> int:
    """The number of a token, written as a number or as digits."""
    number = value
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        number = int(value)
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _LARGEST_NUMBER:
        return number
    raise UnknownVocabularyError(f"{file}: {value!r} is no number of a token")


def _content_of(value: object, file: Path) -> str:
    """A token as a plain text or as an object."""
    text = value
    if isinstance(value, dict):
        text = value.get("content")
    if isinstance(text, str):
        return text
    raise UnknownVocabularyError(f"{file}: {value!r} is no token")


def _by_number(tokens: Mapping[str, int], file: Path) -> dict[int, str]:
    """The token of each number; two tokens have one where the library puts its next token into a hole of the model."""
    found: dict[int, str] = {}
    for token, number in tokens.items():
        if found.setdefault(number, token) != token:
            one, other = sorted([found[number], token])
            raise UnknownVocabularyError(f"{file}: token {number} is both {one!r} and {other!r}")
    return dict(sorted(found.items()))
