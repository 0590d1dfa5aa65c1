"""The table of models: what a run makes, trains, mixes and compares, a row each.

A recipe's sections expand into rows (expand.py), and the planner makes a stage of each (plan/planner.py). Nobody parses
a name to learn what a model is: its row says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.recipe.budgets import Budget
from megatron_btx.recipe.flags import Flags
from megatron_btx.recipe.sections import EvaluateSection, LayoutSection


@dataclass(frozen=True)
class Given:
    """A model that the user has, in any form that the converter reads."""

    path: Path
    options: tuple[str, ...] = ()
    """Words of the converter that imports it."""


@dataclass(frozen=True)
class Train:
    """A model that is trained on its row's budget."""

    start: str | None = None
    """The row that it starts from; None for drawn weights."""
    layout: LayoutSection = LayoutSection()
    megatron: Flags = field(default_factory=dict)
    last_flags: Flags = field(default_factory=dict)
    """Flags that win over all others."""
    watch: EvaluateSection | None = None
    """The text whose loss per domain is measured meanwhile; the experts' losses on it bound the first step."""
    watch_interval: int | None = None
    """Steps between two such measurements; None: as the flags say."""
    cluster: str = "finetune"
    """Its section of the recipe's ``cluster``."""


@dataclass(frozen=True)
class Mix:
    """A model that the converter makes of others."""

    sources: Mapping[str, str]
    """Name in the mixture -> row."""
    words: tuple[str, ...]
    """The converter's options."""


@dataclass(frozen=True)
class Ensemble:
    """Several models whose distributions of the next token are averaged; the stage that evaluates them makes it."""

    members: Mapping[str, Mapping[str, float]]
    """Row -> share of each domain in what it was trained on."""
    weights: str
    """As :data:`megatron_btx.common.ensembles.WEIGHTINGS` has it."""
    top_k: int


@dataclass(frozen=True)
class ModelSpec:
    """One row."""

    name: str
    """In evaluations and reports."""
    stage: str
    """The stage that makes it; "" for an ensemble."""
    make: Given | Train | Mix | Ensemble
    role: str
    """What it is to the others: seed, expert, average, mix, btx, dense, or a baseline's own word."""
    meaning: str = ""
    """A phrase for the caption of a table."""
    home: str = ""
    """An expert's domain."""
    variant: str = ""
    """Of an ablation."""
    seed: int | None = None
    """That drew its routers and shuffled its data, where it is one of several."""
    budget: Budget | None = None
    """None for a model that is mixed, or given without a word of its data."""
    flags: Flags = field(default_factory=dict)
    """Flags of its architecture beside those of the dense model."""
    traits: Mapping[str, str] = field(default_factory=dict)
    """Of a variant: its routing, load-balancing and freeze, so that a report finds those that differ in one."""
    evaluated_in: str = ""
    """The stage that measures it; "" for none. Models of one stage have one architecture."""

    def describe(self) -> dict[str, Any]:
        """The row as a run's models.json has it."""
        return {
            "name": self.name,
            "role": self.role,
            "home": self.home,
            "variant": self.variant,
            "seed": self.seed,
            "stage": self.stage,
            "tokens": self.budget.tokens if self.budget else None,
            "meaning": self.meaning,
            "traits": dict(self.traits),
        }
