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

from megatron_btx.checkpoint.tokenizers.vocabulary import Vocabulary

_JSON_PARTS = {"normalizer": "normaliser", "pre_tokenizer": "first cut into words"}
_SETTINGS = {
    **dict.fromkeys(("byte_fallback", "ignore_merges", "fuse_unk", "unk_token", "unk_id", "dropout")),
    **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix")),
    "max_input_chars_per_word": 100,
}
"""Settings of a model in tokenizer.json that decide ids, with what holds where they are not given (None: nothing)."""


def first_difference(
    left: Vocabulary,
    right: Vocabulary,
    merges: tuple[object, object] = (None, None),
    among: Mapping[int, str] | None = None,
) -> str | None:
    """The first rule in which two tokenizers differ, in words; None where no difference is known.

    Args:
        merges: the files of merges that stored arguments name, for tokenizers that are no folders.
        among: the tokens that both have, where one has more: only rules of these are compared.
    """
    one, other = _rules(left, merges[0]), _rules(right, merges[1])
    if among is not None:
        one, other = _rules_among(one, other, among), _rules_among(other, one, among)
    for name in one:
        if name in other and not _alike(one[name], other[name]):
            return _described(name, one[name], other[name])
    return None


def rule_fingerprints(vocabulary: Vocabulary, merges: object = None) -> dict[str, str]:
    """Every rule that a tokenizer's files tell, as a short hash by its name: what two name alike can be compared.

    Scores of special pieces mean nothing and differ from form to form, so that scores have a name for each form.

    Args:
        merges: the file of merges that stored arguments name, for tokenizers that are no folders.
    """
    rules = _rules(vocabulary, merges)
    if vocabulary.base.name == "tokenizer.json" and "scores" in rules:
        rules["scores in tokenizer.json"] = rules.pop("scores")
    return {name: _fingerprint(value) for name, value in rules.items()}


def _fingerprint(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(entry, float) for entry in value):
        # Scores: to the precision of the files, and without those of special pieces, which are 0 or none.
        value = [(number, struct.pack("<f", score).hex()) for number, score in enumerate(value) if score]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _alike(one: Any, other: Any) -> bool:
    """Equal; scores to the precision of the files, and those of special pieces (None) with any."""
    if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other):
        return bool(one == other)
    return all(map(_alike_entries, one, other))


def _alike_entries(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one is None or other is None or bool(one == other)


def _described(name: str, one: Any, other: Any) -> str:
    if not isinstance(one, list) or not isinstance(other, list):
        return f"their {name} ({_short(one)} and {_short(other)})"
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if not _alike_entries(left, right):
            return f"their {name} (number {number} is {left!r} and {right!r})"
    return f"their {name} (there are {len(one)} and {len(other)})"


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 120 else f"{text[:120]}..."


def _rules(vocabulary: Vocabulary, merges: object) -> dict[str, Any]:
    """The rules that a tokenizer's files tell, by the name they have in a refusal."""
    base = vocabulary.base
    if base.name == "tokenizer.json":
        return _rules_of_json(base)
    if base.suffix in (".json", ".txt"):
        file = Path(str(merges)) if merges else base.parent / "merges.txt"
        return {"merges": _read_merges(file)} if file.is_file() else {}
    return _rules_of_sentencepiece(base)


def _rules_among(rules: Mapping[str, Any], others: Mapping[str, Any], tokens: Mapping[int, str]) -> dict[str, Any]:
    """What rules say of some tokens: other tokens have merges, scores and places of their own."""
    kept = {name: value for name, value in rules.items() if name != "files"}
    if "merges" in kept:
        texts = set(tokens.values())
        kept["merges"] = [pair for pair in kept["merges"] if "".join(pair) in texts]
    if "scores" in kept:
        known = {number: score for number, score in enumerate(kept["scores"]) if number in tokens}
        kept["scores"] = [known.get(number) for number in range(max(tokens, default=-1) + 1)]
    if "order of pieces" in kept:  # a token can be a piece of one and added to the other
        pieces = tokens.keys() & set(others.get("order of pieces", ()))
        kept["order of pieces"] = [number for number in kept["order of pieces"] if number in pieces]
    return kept


def _rules_of_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    rules = {"kind": model["type"]} if model.get("type") else {}
    settings = {key: model[key] for key in _SETTINGS if model.get(key) not in (None, "", False, _SETTINGS[key])}
    if settings or model.get("type"):
        rules["model settings"] = settings
    if isinstance(model.get("merges"), list):
        rules["merges"] = [_pair(merge) for merge in model["merges"]]
    if isinstance(model.get("vocab"), list):
        rules["scores"] = [entry[1] if len(entry) > 1 else None for entry in model["vocab"]]
    return rules | {name: _canonical(content.get(part)) for part, name in _JSON_PARTS.items()}


def _canonical(part: Any) -> Any:
    """A part of tokenizer.json with what its writers leave out or spell in an older way."""
    if not isinstance(part, dict):
        return part
    filled = {key: value for key, value in part.items() if key != "str_rep"}
    for key in ("normalizers", "pretokenizers"):
        if isinstance(filled.get(key), list):
            filled[key] = [_canonical(step) for step in filled[key]]
    if filled.get("type") == "ByteLevel":
        filled = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True} | filled
    if filled.get("type") == "Metaspace":
        prefix = filled.pop("add_prefix_space", True)
        filled = {"prepend_scheme": "always" if prefix else "never", "split": True} | filled
    return filled


def _read_merges(file: Path) -> list[tuple[str, str]]:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, written as one text or as two."""
    words = merge if isinstance(merge, list) else str(merge).split(" ")
    return str(words[0]) if words else "", " ".join(map(str, words[1:]))


def _rules_of_sentencepiece(file: Path) -> dict[str, Any]:
    """From the model's protocol buffer; nothing for a tiktoken file, whose table says it all."""
    content = file.read_bytes()
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ModuleNotFoundError:  # without protobuf only equal files are known to be equal
        return {"files": hashlib.sha256(content).hexdigest()[:16]}
    model: Any = vars(sentencepiece_model_pb2)["ModelProto"]()  # made when the module is imported
    try:
        model.ParseFromString(content)
    except DecodeError:
        return {}
    kind = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}[model.trainer_spec.model_type]
    rules: dict[str, Any] = {"kind": kind}
    if kind == "Unigram":
        ordinary = type(model.pieces[0]).NORMAL if model.pieces else None
        rules["scores"] = [piece.score if piece.type == ordinary else None for piece in model.pieces]
    else:  # a score says which merge comes first, its number means nothing
        scores = [piece.score for piece in model.pieces]
        rules["order of pieces"] = sorted(range(len(scores)), key=lambda number: -scores[number])
    return rules | {f"SentencePiece {name}": value for name, value in _normaliser(model.normalizer_spec).items()}


def _normaliser(spec: Any) -> Mapping[str, Any]:
    return {
        "normaliser": hashlib.sha256(spec.precompiled_charsmap).hexdigest()[:16],
        "dummy prefix": bool(spec.add_dummy_prefix),
        "removal of blanks": bool(spec.remove_extra_whitespaces),
        "escaping of blanks": bool(spec.escape_whitespaces),
    }
