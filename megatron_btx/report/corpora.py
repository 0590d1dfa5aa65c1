"""The data statement of a run whose corpora were made by it: sizes per domain and split, and what they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.ground.errors import InputError
from megatron_btx.ground.files import read_json_object

_REMEDY = "make the corpora again"
_LABELS = {
    "settings.seed": "random seed",
    "settings.vocab_size": "vocabulary size asked for",
    "settings.scale": "share of the full size",
    "tokenizer.file": "tokenizer's file",
    "tokenizer.vocab_size": "tokenizer's vocabulary size",
    "sources.python": "version of Python, whose library is read",
}


@dataclass(frozen=True)
class CorpusRow:
    """One split of one domain's corpus."""

    domain: str
    split: str
    documents: int | None
    tokens: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class Corpora:
    """What corpora.json states."""

    rows: tuple[CorpusRow, ...]
    """Empty for a run that was given its corpora."""
    sources: Mapping[str, str]
    """Settings, versions and tokenizer: ``section.key`` -> value."""


def read_corpora(file: Path) -> Corpora:
    """The data statement in ``file``; an empty one when there is no such file. Raises InputError when it is broken."""
    if not file.is_file():
        return Corpora((), {})
    content = read_json_object(file, _REMEDY)
    try:
        return Corpora(tuple(_read_rows(content["domains"])), _read_sources(content))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: is no data statement of btx corpora ({error!r}); {_REMEDY}") from error


def label_of(key: str) -> str:
    """A key of :attr:`Corpora.sources` in words."""
    section, _, name = key.partition(".")
    if section == "sources":
        return _LABELS.get(key, f"version of {name}, whose documentation is read")
    return _LABELS.get(key, f"{section}: {name}")


def _read_rows(domains: dict[str, Any]) -> list[CorpusRow]:
    rows = []
    for domain, splits in domains.items():
        for split, sizes in splits.items():
            rows.append(CorpusRow(domain, split, sizes.get("documents"), sizes.get("tokens"), sizes.get("bytes")))
    return rows


def _read_sources(content: dict[str, Any]) -> dict[str, str]:
    sources = {}
    for section in ("settings", "sources", "tokenizer"):
        for key, value in content.get(section, {}).items():
            if key != "sha256":
                sources[f"{section}.{key}"] = str(value)
    return sources
