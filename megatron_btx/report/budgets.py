"""On how many tokens the models that a report compares were trained, by the manifests of their stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megatron_btx.recipe.names import (
    AVERAGE_STAGE,
    DATA_STAGE,
    DENSE_DOMAINS_STAGE,
    DENSE_STAGE,
    EXPERT_PREFIX,
    FINETUNE_STAGE,
    GENERALIST,
    MIX_STAGE,
    SEED_STAGE,
)
from megatron_btx.report.quantities import total
from megatron_btx.report.stages import Stage


class Budgets(NamedTuple):
    """Tokens that were consumed after the seed; None where a stage is not of the run, or states none."""

    btx_tokens: float | None
    """Of finetuning and of every expert in the mix."""
    dense_tokens: float | None

    def are_equal(self) -> bool:
        """Whether both are known and the same."""
        return self.btx_tokens is not None and self.btx_tokens == self.dense_tokens


def sum_budgets(stages: Iterable[Stage]) -> Budgets:
    """The budgets of the finetuned mixture and of the dense baseline."""
    known = {stage.name: stage for stage in stages}
    mixture = _tokens_behind(FINETUNE_STAGE, known, MIX_STAGE)
    return Budgets(mixture, _tokens_behind(DENSE_STAGE, known, DENSE_DOMAINS_STAGE))


def averaged_models(stages: Iterable[Stage]) -> tuple[str, ...]:
    """The models that the stage of the plain average took; empty where its manifest does not say."""
    return next((_experts_of(stage) for stage in stages if stage.name == AVERAGE_STAGE), ())


def _tokens_behind(name: str, known: Mapping[str, Stage], first: str) -> float | None:
    """Tokens of a stage and of all it is made from, up to the seed.

    None when stage ``first`` is not among them, or when one is unfinished: what was made from it had an earlier one.
    """
    line: list[str] = []
    waiting = [name]
    while waiting:
        stage = waiting.pop()
        if stage in (SEED_STAGE, DATA_STAGE) or stage in line:
            continue
        if stage not in known or known[stage].unfinished or not _is_made_here(known[stage]):
            return None
        line.append(stage)
        waiting += known[stage].parents
    spent: list[float] = []
    for stage in line:
        if not known[stage].steps and not known[stage].curve:
            continue
        tokens = known[stage].tokens
        if tokens is None:
            return None
        spent.append(tokens)
    if first not in line or not spent:
        return None
    return total(spent)


def _is_made_here(stage: Stage) -> bool:
    """Whether all experts of a mix were trained in the run; the budgets of given ones are not known."""
    return all(name == GENERALIST or f"{EXPERT_PREFIX}{name}" in stage.parents for name in _experts_of(stage))


def _experts_of(stage: Stage) -> tuple[str, ...]:
    """The models that a mix or an average took, as its manifest's settings name them."""
    names = stage.settings.get("experts")
    if not isinstance(names, list):
        return ()
    return tuple(map(str, names))
