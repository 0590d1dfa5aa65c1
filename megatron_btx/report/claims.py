"""What is claimed of a plain run: everything that its report computes from the inputs, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_btx.report.budgets import Budgets, sum_budgets
from megatron_btx.report.comparisons import best_per_column, difference_to_dense
from megatron_btx.report.facts import Fact, check_facts
from megatron_btx.report.inputs import RunData


@dataclass(frozen=True)
class Claims:
    """What all sections of a report are written from, beside the inputs."""

    facts: tuple[Fact, ...]
    best: Mapping[str | None, float]
    """Lowest finite loss per domain, and of the means under None."""
    difference: Mapping[str | None, float | None] | None
    """Loss of btx minus loss of dense, likewise; None without either model."""
    budgets: Budgets


def make_claims(data: RunData) -> Claims:
    """The claims of a run."""
    return Claims(
        tuple(check_facts(data.models, data.domains)),
        best_per_column(data.models, data.domains),
        difference_to_dense(data.models, data.domains),
        sum_budgets(data.stages),
    )
