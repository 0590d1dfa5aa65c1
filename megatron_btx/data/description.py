"""What an indexed dataset says of itself: ``PREFIX.dataset.json`` beside ``PREFIX.bin`` and ``PREFIX.idx``.

An indexed dataset is numbers alone. Of another tokenizer they mean other tokens, and beyond a model's vocabulary they
mean nothing: a run learns noise without a word, or ends on one rank. So whoever tokenizes a text writes down with what
and up to which number, and a run compares that with its own tokenizer before it starts. Tokenizers are compared by
their tokens and rules, never by the paths or form of their files. Datasets without a description pass: their batches
are looked at as they come.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import parse_json
from megatron_btx.tokenizers.rules import rule_fingerprints
from megatron_btx.tokenizers.vocabulary import Vocabulary, read_vocabulary

SUFFIX = ".dataset.json"
ALLOWANCE = "dataset_tokenizer"
"""The word of ``--btx-allow-change`` that lets a dataset of another tokenizer pass."""
_FORMAT = 1
_AGAIN = "make it again with tools/preprocess_data.py"


@dataclass(frozen=True)
class Description:
    """The content of the file."""

    tokenizer_type: str
    """As Megatron's ``--tokenizer-type``."""
    tokenizer_model: str | None
    """The name of its file or folder, for people; where it lay says nothing on another machine."""
    vocabulary_size: int
    """Numbers that the tokenizer has."""
    largest_id: int
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    """The sizes of both files: others were written by somebody who did not know of this one."""
    table: str | None
    """Fingerprint of the tokens up to the largest number; None where they are not known."""
    rules: dict[str, str]
    """Fingerprints of the rules by which texts are cut, as far as the tokenizer's files tell them."""
    format: int = _FORMAT


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as far as descriptions speak of it."""

    kind: str
    model: str | None
    size: int | None
    vocabulary: Vocabulary | None
    """None where it is not known: a name on a hub, numbers without tokens."""
    merges: str | None = None

    @staticmethod
    def of(arguments: Mapping[str, Any], size: int | None) -> Tokenizer:
        """That of Megatron's arguments; its size where it has been built, else it follows from its files."""
        vocabulary = read_vocabulary(arguments)
        kind = str(arguments.get("tokenizer_type"))
        if size is None and kind == "NullTokenizer":
            size = arguments.get("vocab_size")
        elif size is None and vocabulary is not None:
            size = max(vocabulary.tokens, default=-1) + 1
        model = arguments.get("tokenizer_model") or arguments.get("vocab_file")
        return Tokenizer(kind, model and str(model), size, vocabulary, arguments.get("merge_file"))

    def table(self, largest_id: int) -> str | None:
        """Fingerprint of the tokens up to a number; None where they are not known."""
        if self.vocabulary is None:
            return None
        tokens = sorted(self.vocabulary.below(largest_id + 1).items())
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]

    def rules(self) -> dict[str, str]:
        """Fingerprints of the rules by which it cuts texts, as far as they are known."""
        if self.vocabulary is None:
            return {}
        return rule_fingerprints(self.vocabulary, self.merges)


def describe(tokenizer: Tokenizer, largest_id: int, sequences: int, tokens: int, files: Mapping[str, str]) -> str:
    """The text of a description, for a tokenizer of known size; ``files`` are the dataset's at present, by ending."""
    assert tokenizer.size is not None
    model = tokenizer.model
    if model and os.path.exists(model):
        model = os.path.basename(os.path.abspath(model))
    description = Description(
        tokenizer_type=tokenizer.kind,
        tokenizer_model=model,
        vocabulary_size=tokenizer.size,
        largest_id=largest_id,
        sequences=sequences,
        tokens=tokens,
        bin_bytes=os.path.getsize(files[".bin"]),
        idx_bytes=os.path.getsize(files[".idx"]),
        table=tokenizer.table(largest_id),
        rules=tokenizer.rules(),
    )
    return json.dumps(dataclasses.asdict(description), indent=1) + "\n"


def read_description(prefix: str, where: str) -> Description | None:
    """The description of a dataset, or None where it has none; ``where`` is the flag that named it.

    Raises InputError where the file is no description, or describes other files than those beside it.
    """
    file = Path(prefix + SUFFIX)
    if not file.is_file():
        return None
    remedy = f"{_AGAIN}, or remove {file.name} if the dataset was made by other means"
    try:
        content = parse_json(file.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError(f"it has the format {content['format']}, expected {_FORMAT}")
        description = Description(**content)
        numbers = (description.vocabulary_size, description.largest_id, description.bin_bytes, description.idx_bytes)
        if not all(type(number) is int for number in numbers) or not isinstance(description.rules, dict):
            raise TypeError("numbers are missing")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{where} {prefix}: {file} is no description of a dataset ({error}); {remedy}") from error
    found = {suffix: os.path.getsize(prefix + suffix) for suffix in (".bin", ".idx")}
    if found != {".bin": description.bin_bytes, ".idx": description.idx_bytes}:
        raise InputError(
            f"{where} {prefix}: {file} describes another dataset, with files of {description.bin_bytes} (.bin) and "
            f"{description.idx_bytes} (.idx) bytes, found {found['.bin']} and {found['.idx']}; {remedy}"
        )
    return description


def check_description(prefix: str, where: str, tokenizer: Tokenizer, rows: int | None, allowed: bool) -> None:
    """Refuse a dataset whose numbers mean something else to a run, or nothing; one without a description passes.

    Args:
        where: the flag that named it.
        tokenizer: the run's.
        rows: of the run's vocabulary, padding among them; None where they are not known yet.
        allowed: let another tokenizer pass, with all numbers that have a row.
    """
    description = read_description(prefix, where)
    if description is None:
        return
    made_with = _named(description.tokenizer_type, description.tokenizer_model, description.vocabulary_size)
    own = _named(tokenizer.kind, tokenizer.model, tokenizer.size)
    limit = rows
    if not allowed and tokenizer.size is not None:
        limit = min(tokenizer.size, rows or tokenizer.size)
    if limit is not None and description.largest_id >= limit:
        raise InputError(
            f"{where} {prefix}: holds token ids up to {description.largest_id}, and the vocabulary of this run ends at "
            f"{limit - 1} ({own}); the dataset was made with {made_with}: {_AGAIN} and this run's tokenizer, or give "
            "its own"
        )
    difference = _difference(description, tokenizer)
    if difference and not allowed:
        raise InputError(
            f"{where} {prefix}: was made with another tokenizer, {made_with}, than that of this run, "
            f"{own}: {difference}; {_AGAIN} and this run's tokenizer, or give its own (--btx-allow-change "
            f"{ALLOWANCE} if you know that the ids mean the same)"
        )


def _difference(description: Description, tokenizer: Tokenizer) -> str | None:
    """In what two tokenizers differ, in words; None where no difference is known."""
    if (description.tokenizer_type == "NullTokenizer") != (tokenizer.kind == "NullTokenizer"):
        return "one of them takes numbers for texts"
    table = tokenizer.table(description.largest_id)
    if description.table is None or table is None:
        if tokenizer.size in (None, description.vocabulary_size):
            return None
        return "they have other numbers of tokens"
    if table != description.table:
        return f"some of the tokens 0 to {description.largest_id} are others"
    rules = tokenizer.rules()
    other = [name for name, known in description.rules.items() if rules.get(name, known) != known]
    if not other:
        return None
    return f"they have the same tokens and cut texts in other ways ({', '.join(other)})"


def _named(kind: str, model: str | None, size: int | None) -> str:
    text = kind
    if model:
        text += f" {model}"
    if size is not None:
        text += f" of {size} tokens"
    return text
