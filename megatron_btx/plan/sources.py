"""What stages read: models and datasets, made by the run or given from outside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from megatron_btx.recipe.data import Data
from megatron_btx.recipe.from_checkpoint import is_loadable
from megatron_btx.recipe.models import Given, ModelSpec
from megatron_btx.recipe.names import CHECKPOINT_FOLDER, DATA_STAGE, EXPERT_PREFIX, IMPORT_PREFIX


@dataclass(frozen=True)
class Model:
    """A checkpoint as the stages see it that read it."""

    path: str
    """Absolute where it is given, relative to the run directory where the run makes it."""
    stage: str | None
    """The stage that makes or imports it; None when it is given."""

    def identity(self) -> str | Path:
        """What decides which model it is, beside the stages that it comes from."""
        if self.stage is not None:
            return self.stage
        return Path(self.path)


def model_of(row: ModelSpec) -> Model:
    """The checkpoint of a row. A given one that Megatron cannot start from, or that options change, is imported."""
    stage = row.stage
    if isinstance(row.make, Given):
        if is_loadable(row.make.path) and not row.make.options:
            return Model(str(row.make.path), None)
        stage = import_stage(row)
    return Model(f"{stage}/{CHECKPOINT_FOLDER}", stage)


def mixed_model_of(row: ModelSpec) -> Model:
    """The same for the converter, which reads every form."""
    if isinstance(row.make, Given):
        return Model(str(row.make.path), None)
    return model_of(row)


def import_stage(row: ModelSpec) -> str:
    """The stage that imports a given model."""
    return f"{IMPORT_PREFIX}{row.stage.removeprefix(EXPERT_PREFIX)}"


def origins_of(models: Iterable[Model]) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """(the stages that make ``models``, the places of those that are given)."""
    parents: list[str] = []
    inputs: list[Path] = []
    for model in models:
        if model.stage is not None:
            parents.append(model.stage)
        else:
            inputs.append(Path(model.path))
    return tuple(parents), tuple(inputs)


def data_origins(
    data: Data, models: Iterable[Model], domains: Iterable[str], splits: Iterable[str]
) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """The same of a stage that reads ``models`` and the data of ``domains``."""
    parents, inputs = origins_of(models)
    outside: list[Path] = []
    for split, domain in product(splits, domains):
        prefixes = [prefix for _, prefix in data.list_prefixes(domain, split)]
        outside += [Path(prefix) for prefix in prefixes if not data.is_made(prefix)]
    tokenizer = data.tokenizer.get("tokenizer-model")
    if isinstance(tokenizer, str) and not data.is_made(tokenizer):
        outside.append(Path(tokenizer))
    if data.are_made():
        parents = (DATA_STAGE, *parents)
    return parents, (*inputs, *outside)
