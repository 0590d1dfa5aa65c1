"""What stages read: models and datasets (prefixes of .bin/.idx files), made by the run or given from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_btx.plan.fingerprint import deciding
from megatron_btx.recipe.data import Data
from megatron_btx.recipe.flags import Flags
from megatron_btx.recipe.from_checkpoint import is_loadable
from megatron_btx.recipe.names import CHECKPOINT_FOLDER, DATA_STAGE, EXPERT_PREFIX, IMPORT_PREFIX, TRAIN_SPLIT


@dataclass(frozen=True)
class Model:
    """A checkpoint as the stages see it that read it."""

    path: str
    """Absolute where it is given, relative to the run directory where the run makes it."""
    stage: str | None
    """The stage that makes or imports it; None when it is given."""
    source: Path | None = None
    """What the stage imports it from."""
    options: tuple[str, ...] = ()
    """Words of the converter that imports it."""

    @classmethod
    def made_by(cls, stage: str) -> Model:
        """The model that a stage of the run makes."""
        return cls(f"{stage}/{CHECKPOINT_FOLDER}", stage)

    @classmethod
    def given_or_made(cls, source: Path | None, stage: str, options: tuple[str, ...] = ()) -> Model:
        """The model given at ``source``, or else the one that ``stage`` makes.

        A given one that Megatron cannot start from, or that options change, is imported by a stage ``import-NAME``.
        """
        if source is None:
            return cls.made_by(stage)
        if is_loadable(source) and not options:
            return cls(str(source), None)
        importing = f"{IMPORT_PREFIX}{stage.removeprefix(EXPERT_PREFIX)}"
        return cls(f"{importing}/{CHECKPOINT_FOLDER}", importing, source, options)

    def as_given(self) -> Model:
        """The model without its import: mixing reads every form."""
        if self.source is None:
            return self
        return Model(str(self.source), None)

    def identity(self) -> str | Path:
        """What decides which model it is, beside the stages that it comes from."""
        if self.stage is not None:
            return self.stage
        return Path(self.path)


class Origins(NamedTuple):
    """What a stage is made from."""

    parents: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()


def origins_of(models: Iterable[Model]) -> Origins:
    """The stages that make ``models``, and the places of those that are given."""
    parents: list[str] = []
    inputs: list[Path] = []
    for model in models:
        if model.stage is not None:
            parents.append(model.stage)
        else:
            inputs.append(Path(model.path))
    return Origins(tuple(parents), tuple(inputs))


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
                prefixes = [prefix for _, prefix in self.list_prefixes(domain, split)]
                outside += [Path(prefix) for prefix in prefixes if not self._is_made(prefix)]
        tokenizer = self.data.tokenizer.get("tokenizer-model")
        if isinstance(tokenizer, str) and not self._is_made(tokenizer):
            outside.append(Path(tokenizer))
        if self.data.are_made():
            parents = (DATA_STAGE, *parents)
        return Origins(parents, (*inputs, *outside))

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
