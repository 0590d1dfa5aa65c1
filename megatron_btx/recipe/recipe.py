"""A recipe as the planner reads it: its sections as they are written, and the table of models that they expand into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_btx.recipe.budgets import Budget
from megatron_btx.recipe.cluster import ClusterSection
from megatron_btx.recipe.data import Data
from megatron_btx.recipe.flags import Flags, FlagValue, merged
from megatron_btx.recipe.models import ModelSpec
from megatron_btx.recipe.sections import EvaluateSection, LayoutSection, RecipeSection


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, checked as far as one can without Megatron and without looking at the machine."""

    file: str
    name: str
    sections: RecipeSection
    """What is written, with every default filled in."""
    data: Data
    domains: tuple[str, ...]
    """Those that are evaluated, in this order."""
    model: Flags
    """Of the dense model: those of the given seed, else of the first given expert, and the recipe's."""
    tree: Mapping[str, Any]
    """The YAML mapping that it was made of: included files and changes applied."""
    flag_sections: Mapping[str, Flags] = field(default_factory=dict)
    """Place in the recipe -> the flags that were written there."""
    models: Mapping[str, ModelSpec] = field(default_factory=dict)
    """The table of models, by name."""
    notes: tuple[str, ...] = ()
    """What was read otherwise than it was written."""

    @property
    def cluster(self) -> ClusterSection:
        """What btx submit asks of Slurm."""
        return self.sections.cluster

    @property
    def evaluation(self) -> EvaluateSection | None:
        """The text that models are measured on; None for a recipe that measures none."""
        if self.sections.ablation is not None:
            return self.sections.ablation.evaluation()
        return self.sections.evaluate

    def find_role(self, role: str) -> ModelSpec | None:
        """The first row of a role."""
        return next((row for row in self.models.values() if row.role == role), None)

    def budget(self, name: str) -> Budget:
        """The data of a row that has a budget."""
        budget = self.models[name].budget
        assert budget is not None
        return budget

    def merge_flags(
        self, layout: LayoutSection, megatron: Flags, model: Flags, last: Flags | None = None
    ) -> dict[str, FlagValue]:
        """The flags of a stage that trains or evaluates; a later section wins.

        Args:
            layout, megatron: of the stage.
            model: of its architecture, beside those of the dense model.
            last: those that win over all others.
        """
        seed: Flags = {"seed": self.sections.random_seed}
        sections = (self.model, self.data.tokenizer, model, self.sections.training, layout.flags(), megatron, seed)
        return merged(*sections, last or {})
