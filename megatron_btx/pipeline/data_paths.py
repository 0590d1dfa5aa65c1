"""Where the datasets of a recipe lie: prefixes of .bin/.idx files, of the run's own data or given from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.pipeline.directory import DATA_STAGE, TRAIN_SPLIT
from megatron_btx.pipeline.identity import deciding
from megatron_btx.pipeline.models import Model, Origins, origins_of
from megatron_btx.pipeline.recipe.data import Data
from megatron_btx.pipeline.recipe.flags import Flags


class DataPaths:
    """The datasets of ``data`` by domain and split."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def list_prefixes(self, domain: str, split: str) -> tuple[tuple[float, str], ...]:
        """(weight, prefix) of a domain's data; a prefix is relative to the run directory where the run makes it."""
        return self.data.domains[domain].get(split, ())

    def evaluation_prefix(self, domain: str, split: str) -> str:
        """The one prefix of a domain's evaluation set."""
        _, prefix = self.list_prefixes(domain, split)[0]
        return prefix

    def blend_words(self, blend: Mapping[str, float], split: str) -> tuple[str, ...] | None:
        """Weights and prefixes for Megatron's --<split>-data-path, or None when a domain has no such split."""
        words: list[str] = []
        for domain, share in blend.items():
            prefixes = self.list_prefixes(domain, split)
            if not prefixes:
                return None
            total = sum(weight for weight, _ in prefixes)
            for weight, prefix in prefixes:
                words += [f"{share * weight / total:.10g}", prefix]
        return tuple(words)

    def deciding_blend(self, blend: Mapping[str, float]) -> list[str | Path]:
        """The words of ``blend`` as a setting: datasets from outside count by their content."""
        words = self.blend_words(blend, TRAIN_SPLIT) or ()
        settings: list[str | Path] = []
        for position, word in enumerate(words):
            is_prefix = position % 2 == 1
            settings.append(locate(word) if is_prefix else word)
        return settings

    def origins(self, models: Iterable[Model], domains: Iterable[str], splits: Iterable[str]) -> Origins:
        """Where a stage comes from that reads ``models`` and the data of ``domains``."""
        parents, inputs = origins_of(models)
        outside: list[Path] = []
        domains = tuple(domains)
        for split in splits:
            for domain in domains:
                outside += self._outside_prefixes(domain, split)
        tokenizer = self.data.tokenizer.get("tokenizer-model")
        if isinstance(tokenizer, str) and not self._is_made(tokenizer):
            outside.append(Path(tokenizer))
        if self.data.are_made():
            parents = (DATA_STAGE, *parents)
        return Origins(parents, (*inputs, *outside))

    def _outside_prefixes(self, domain: str, split: str) -> list[Path]:
        found = []
        for _, prefix in self.list_prefixes(domain, split):
            if not self._is_made(prefix):
                found.append(Path(prefix))
        return found

    def _is_made(self, path: str) -> bool:
        """Whether ``path`` lies in the folder of the stage that makes the run's data."""
        return self.data.are_made() and Path(path).parts[:1] == (DATA_STAGE,)


def locate(path: str) -> str | Path:
    """A path as a setting: by content where it is given from outside, by name where the run makes it."""
    if Path(path).is_absolute():
        return Path(path)
    return path


def deciding_settings(flags: Flags, blend: list[str | Path]) -> dict[str, Any]:
    """The settings that decide what a program does with ``flags``; files from outside count by their content.

    Args:
        blend: the words of --train-data-path as a setting; empty for a program that does not train.
    """
    settings = deciding(flags)
    if blend:
        settings["train-data-path"] = blend
    for name in ("pretrained-checkpoint", "tokenizer-model"):
        path = flags.get(name)
        if isinstance(path, str):
            settings[name] = locate(path)
    return settings
