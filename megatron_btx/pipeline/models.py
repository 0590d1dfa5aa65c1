"""The checkpoints that stages read, and where a stage comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_btx.pipeline.directory import CHECKPOINT_FOLDER, EXPERT_PREFIX, IMPORT_PREFIX
from megatron_btx.pipeline.recipe.given import is_loadable


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
