"""Tokenizers compared by what they are: two models may be mixed only when a token means the same in both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.errors import InputError

TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
"""The arguments that name a tokenizer's files."""

TOKENIZER_FOLDER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")
"""Files of a tokenizer in a Hugging Face folder."""


def check_same_tokenizer(sources: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Refuse models whose tokenizers differ: by the content of their files, never by their paths.

    Files that differ are compared by the vocabularies in them, where these can be read: chat templates and the like do
    not matter to a mix.

    Args:
        sources: a name to show, and the stored arguments; ``hf_folder`` among them is a Hugging Face folder.

    Raises:
        InputError: two tokenizers differ, or one cannot be found to be compared.
    """
    seen = {name: tokenizer_identity(arguments, name, remedy) for name, arguments in sources.items()}
    first = next(iter(seen))
    for name, identity in seen.items():
        if identity == seen[first]:
            continue
        left, right = (vocabulary(sources[n]) for n in (first, name))
        if left is not None and left == right:
            continue
        raise InputError(
            f"tokenizers differ: {first} has {seen[first]}, {name} has {identity}; models can only be mixed or "
            f"continued with one tokenizer ({remedy} if the files differ in form alone)"
        )


def check_vocabulary_union(sources: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Refuse vocabularies of which none extends all others: a token that two of them know must have one number.

    Raises:
        InputError: names a token with two numbers, a number with two tokens, or a vocabulary that cannot be read.
    """
    known: dict[int, tuple[str, str]] = {}
    for name, arguments in sources.items():
        tokens = vocabulary(arguments)
        if tokens is None:
            raise InputError(
                f"{name}: its vocabulary cannot be read (no tokenizer.json, vocab.json or tokenizer.model), so it "
                f"cannot be compared; put the tokenizer's files beside the model, or {remedy}"
            )
        for token, number in tokens.items():
            before, owner = known.setdefault(number, (token, name))
            if before != token:
                raise InputError(
                    f"vocabularies do not extend each other: token {number} is {before!r} in {owner} and {token!r} in "
                    f"{name}; such models cannot be mixed ({remedy} if you know better)"
                )


def tokenizer_identity(arguments: Mapping[str, Any], name: str, remedy: str) -> str:
    """A tokenizer's kind and the hash of its files; its size where it has none.

    Raises:
        InputError: a file cannot be found, or a folder holds no file of a tokenizer.
    """
    kind = arguments.get("tokenizer_type")
    folder = arguments.get("hf_folder")
    given = [arguments[argument] for argument in TOKENIZER_FILES if arguments.get(argument) is not None]
    if folder is not None:
        kind, given = "HuggingFaceTokenizer", [folder] if _folder_files(Path(folder)) else []
    if not given:
        return f"{kind} of {arguments.get('vocab_size')} tokens"
    digest = hashlib.sha256()
    for path in map(Path, given):
        files = [path] if path.is_file() else _folder_files(path)
        if not files:
            raise InputError(
                f"{name}: its tokenizer {path} cannot be found, so it cannot be compared; put it back, or {remedy}"
            )
        for file in files:
            digest.update(file.read_bytes())
    return f"{kind} sha256 {digest.hexdigest()[:16]}"


def _folder_files(folder: Path) -> list[Path]:
    return sorted({f for pattern in TOKENIZER_FOLDER_FILES for f in folder.glob(pattern) if f.is_file()})


def vocabulary(arguments: Mapping[str, Any]) -> dict[str, int] | None:
    """Every token and its number, from the tokenizer's own files; None where they are of no kind that can be read."""
    tokens = _vocabulary(arguments)
    if tokens is None or not all(type(number) is int for number in tokens.values()):
        return None
    return tokens


def _vocabulary(arguments: Mapping[str, Any]) -> dict[str, int] | None:
    named = arguments.get("hf_folder") or arguments.get("tokenizer_model")
    if not named:
        return None
    path = Path(named)
    if path.is_file():
        return _sentencepiece(path)
    if (path / "tokenizer.json").is_file():
        return _tokenizer_json(path / "tokenizer.json")
    if (path / "vocab.json").is_file():
        return _plain_json(path / "vocab.json")
    return _sentencepiece(path / "tokenizer.model") if (path / "tokenizer.model").is_file() else None


def _tokenizer_json(file: Path) -> dict[str, int] | None:
    try:
        content = json.loads(file.read_bytes())
        tokens = content["model"]["vocab"]
        if isinstance(tokens, list):  # unigram models: [token, score] in the order of their numbers
            tokens = {token: number for number, (token, _) in enumerate(tokens)}
        return dict(tokens) | {added["content"]: added["id"] for added in content.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _plain_json(file: Path) -> dict[str, int] | None:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _sentencepiece(file: Path) -> dict[str, int] | None:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        return None
    return {model.id_to_piece(number): number for number in range(model.get_piece_size())}
