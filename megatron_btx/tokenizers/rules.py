"""What decides ids besides the vocabulary: two tokenizers with one table can cut the same text into other tokens.

A byte-pair tokenizer cuts by the order of its merges, a Unigram tokenizer by its scores, and both after a normaliser
and a first cut into words. Files of different form tell different parts of this; what both tell is compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.tokenizers.sentencepiece import NORMAL, read_model
from megatron_btx.tokenizers.vocabulary import Vocabulary, read_tokenizer

_SETTINGS = {
    **dict.fromkeys(("byte_fallback", "ignore_merges", "fuse_unk", "unk_token", "unk_id", "dropout")),
    **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix")),
    "max_input_chars_per_word": 100,
}
"""Settings of a model in tokenizer.json that decide ids, with what holds where they are not given (None: nothing)."""


def first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], among: Mapping[int, str] | None = None
) -> str | None:
    """The first of the rules in which two tokenizers differ, in words; None where no difference is known.

    Args:
        among: the tokens that both have, where one has more: only rules of these are compared.
    """
    if among is not None:
        one, other = _rules_among(one, other, among), _rules_among(other, one, among)
    for name in one:
        difference = _difference(one[name], other.get(name, one[name]))
        if difference:
            return f"their {name} ({difference})"
    return None


def rule_fingerprints(vocabulary: Vocabulary, merges: object = None) -> dict[str, str]:
    """Every rule that a tokenizer's files tell, as a short hash by its name: what two name alike can be compared.

    Scores of special pieces mean nothing and differ from form to form, so that scores have a name for each form.

    Args:
        merges: the file of merges that stored arguments name, for tokenizers that are no folders.
    """
    rules = read_rules(vocabulary, merges)
    if vocabulary.base.name == "tokenizer.json" and "scores" in rules:
        rules["scores in tokenizer.json"] = rules.pop("scores")
    return {name: _fingerprint(value) for name, value in rules.items()}


def _fingerprint(value: object) -> str:
    if isinstance(value, list) and any(isinstance(entry, float) for entry in value):
        # Scores: to the precision of the files, and without those of special pieces, which are 0 or none.
        value = [(number, struct.pack("<f", score).hex()) for number, score in enumerate(value) if score]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _difference(one: object, other: object) -> str:
    """In what two rules differ; "" where they do not. In lists, None stands for anything."""
    if not isinstance(one, list) or not isinstance(other, list):
        return "" if one == other else f"{_short(one)} and {_short(other)}"
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        alike = left is None or right is None or left == right
        if isinstance(left, float) and isinstance(right, float):  # scores, to the precision of the files
            alike = math.isclose(left, right, rel_tol=1e-6)
        if not alike:
            return f"number {number} is {left!r} and {right!r}"
    return "" if len(one) == len(other) else f"there are {len(one)} and {len(other)}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def read_rules(vocabulary: Vocabulary, merges: object = None) -> dict[str, Any]:
    """The rules that a tokenizer's files tell, by the name they have in a refusal; as :func:`rule_fingerprints`."""
    base = vocabulary.base
    if base.name == "tokenizer.json":
        return _rules_of_json(base)
    if base.suffix not in (".json", ".txt"):
        return _rules_of_sentencepiece(base)
    file = Path(str(merges or base.parent / "merges.txt"))
    return {"merges": _read_merges(file)} if file.is_file() else {}


def _rules_among(rules: Mapping[str, Any], others: Mapping[str, Any], tokens: Mapping[int, str]) -> dict[str, Any]:
    """What rules say of some tokens: other tokens have merges, scores and places of their own."""
    kept = dict(rules)
    if "merges" in kept:
        texts = set(tokens.values())
        kept["merges"] = [pair for pair in kept["merges"] if "".join(pair) in texts]
    if "scores" in kept:
        scores = [None] * (max(tokens, default=-1) + 1)
        for number, score in enumerate(kept["scores"]):
            if number in tokens:
                scores[number] = score
        kept["scores"] = scores
    if "order of pieces" in kept:  # a token can be a piece of one and added to the other
        pieces = tokens.keys() & set(others.get("order of pieces", ()))
        kept["order of pieces"] = [number for number in kept["order of pieces"] if number in pieces]
    return kept


def _rules_of_json(file: Path) -> dict[str, Any]:
    """As the ``tokenizers`` library spells them, whatever version wrote the file."""
    content = json.loads(read_tokenizer(file).to_str())
    model = content["model"]
    settings = {}
    for key, usual in _SETTINGS.items():
        if model.get(key) not in (None, "", False, usual):
            settings[key] = model[key]
    rules: dict[str, Any] = {"kind": model["type"], "model settings": settings}
    if "merges" in model:
        rules["merges"] = model["merges"]
    if isinstance(model["vocab"], list):  # Unigram: [token, score]
        rules["scores"] = [score for _, score in model["vocab"]]
    rules["normaliser"] = _as_described(content["normalizer"])
    rules["first cut into words"] = content["pre_tokenizer"]
    return rules


def _as_described(normaliser: Any) -> Any:
    """A normaliser as descriptions of datasets have it: bytes with the settings that the first cut of this name has."""
    if not isinstance(normaliser, dict):
        return normaliser
    if normaliser["type"] == "Sequence":
        return normaliser | {"normalizers": list(map(_as_described, normaliser["normalizers"]))}
    if normaliser["type"] == "ByteLevel":
        return normaliser | {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return normaliser


def _read_merges(file: Path) -> list[list[str]]:
    """The pairs of a merges.txt."""
    merges = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.strip() and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            merges.append([left, right])
    return merges


def _rules_of_sentencepiece(file: Path) -> dict[str, Any]:
    """From the model's protocol buffer."""
    model = read_model(file.read_bytes())
    kind = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}[model.trainer_spec.model_type]
    rules: dict[str, Any] = {"kind": kind}
    if kind == "Unigram":
        # Those of special pieces mean nothing.
        rules["scores"] = [piece.score if piece.type == NORMAL else None for piece in model.pieces]
    else:  # a score says which merge comes first, its number means nothing
        scores = [piece.score for piece in model.pieces]
        rules["order of pieces"] = sorted(range(len(scores)), key=lambda number: -scores[number])
    spec = model.normalizer_spec
    return rules | {
        "SentencePiece normaliser": hashlib.sha256(spec.precompiled_charsmap).hexdigest()[:16],
        "SentencePiece dummy prefix": bool(spec.add_dummy_prefix),
        "SentencePiece removal of blanks": bool(spec.remove_extra_whitespaces),
        "SentencePiece escaping of blanks": bool(spec.escape_whitespaces),
    }
