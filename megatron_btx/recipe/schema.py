"""The recipe as the planner reads it: typed, checked, with every default filled in.

What may stand in the YAML file is in written.py; reading.py makes the one of the other. A section that needs nothing
but itself is taken as it is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.recipe.ablation import Ablation
from megatron_btx.recipe.cluster import ClusterSection
from megatron_btx.recipe.data import Data
from megatron_btx.recipe.flags import Flags
from megatron_btx.recipe.routing import Routing
from megatron_btx.recipe.sections import DenseSection, EvaluateSection, ExportSection, LayoutSection


@dataclass(frozen=True)
class Training:
    """One stage that trains, or that is given by a model (``source``)."""

    source: Path | None
    """The model's folder, in any form that the converter reads."""
    blend: Mapping[str, float]
    """Domain -> share; sums to one. May be empty only for a given checkpoint."""
    tokens: int
    layout: LayoutSection
    megatron: Flags
    options: tuple[str, ...] = ()
    """Words of the converter that imports the model."""


@dataclass(frozen=True)
class Mix:
    """The mixing stage, or a given mixture."""

    source: Path | None
    experts: tuple[str, ...]
    router_seed: int
    routing: Routing
    megatron: Flags
    """Flags of the MoE model, for finetuning and evaluation alike; those of its routing not among them."""
    options: tuple[str, ...]
    """Words of the converter that mixes the experts, or imports the mixture."""
    shape: Flags
    """Flags that follow from them."""


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked as far as one can without Megatron and without looking at the machine."""

    file: str
    name: str
    random_seed: int
    data: Data
    model: Flags
    training: Flags
    domains: tuple[str, ...]
    seed: Training
    experts: Mapping[str, Training]
    mix: Mix | None
    finetune: Training | None
    average: bool
    dense: DenseSection | None
    evaluate: EvaluateSection | None
    ablation: Ablation | None
    """Variants of finetuning; they take the place of the one finetuning stage."""
    export: ExportSection | None
    cluster: ClusterSection
    """What btx submit asks of Slurm."""
    flag_sections: Mapping[str, Flags]
    """Place in the recipe -> the flags that were written there."""
    notes: tuple[str, ...]
    """What was read otherwise than it was written."""
    tree: Mapping[str, Any]
    """The YAML mapping that it was made of: included files and changes applied."""
