"""The data statement of a run that made its datasets: sizes per domain and split, and what they are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import read_json_object

_REMEDY = "run the stage that writes it again"
_ALL_SPLITS = "text"
"""The source of a domain whose documents were split by shares, in datasets.json."""


@dataclass(frozen=True)
class DatasetRow:
    """One split of one domain."""

    domain: str
    split: str
    documents: int | None
    tokens: int | None
    size_bytes: int | None
    """Of the files that it is made of; None where they were split by shares."""


@dataclass(frozen=True)
class Datasets:
    """What datasets.json states."""

    rows: tuple[DatasetRow, ...]
    """Empty for a run that was given its datasets."""
    sources: Mapping[str, str]
    """The tokenizer's flags, the seed of the split, and the texts of every domain, in words."""


def read_datasets(file: Path) -> Datasets:
    """The data statement in ``file``; an empty one when there is no such file. Raises InputError when it is broken."""
    if not file.is_file():
        return Datasets((), {})
    content = read_json_object(file, _REMEDY)
    try:
        return Datasets(tuple(_read_rows(content)), _read_sources(content))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file}: is no data statement of btx datasets ({error!r}); {_REMEDY}") from error


def _read_rows(content: dict[str, Any]) -> list[DatasetRow]:
    rows = []
    for domain, splits in content["domains"].items():
        for split, sizes in splits.items():
            own_files = content["sources"][domain].get(split, {})
            rows.append(DatasetRow(domain, split, sizes.get("documents"), sizes.get("tokens"), own_files.get("bytes")))
    return rows


def _read_sources(content: dict[str, Any]) -> dict[str, str]:
    sources = {}
    for flag, value in content["tokenizer"].items():
        sources[flag] = name_path(value)
    for domain, texts in content["sources"].items():
        for source, text in texts.items():
            said = f"{len(text['files'])} file(s), {text['bytes']:,} bytes"
            if source == _ALL_SPLITS:
                said += f", split by shares with seed {content['seed']}"
            sources[f"{domain}: {source}"] = f"{said}: {_first_and_last(text['files'])}"
    return sources


def _first_and_last(files: list[str]) -> str:
    """The files, shortened where there are many."""
    if len(files) <= 2:
        return ", ".join(map(name_path, files))
    return f"{name_path(files[0])}, …, {name_path(files[-1])}"


def name_path(value: object) -> str:
    """A value as text; of a path the last part, because a report is read elsewhere."""
    if os.path.isabs(text := str(value)):
        return Path(text).name
    return text
