"""How the members of an ensemble can be weighed: one table, for the evaluation's flags and for recipes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weighting:
    """One way."""

    meaning: str
    needs_texts: bool = False
    """Whether it compares a context with the members' training texts."""
    needs_prior: bool = False
    """Whether it needs a development text."""


NEAREST, ALIKE = "tf-idf", "uniform"
WEIGHTINGS: dict[str, Weighting] = {
    NEAREST: Weighting("the nearest by tf-idf of the context, alike", needs_texts=True),
    "cluster": Weighting("the nearest by exp(-distance^2 / 0.1), as c-BTM", needs_texts=True),
    ALIKE: Weighting("all members alike"),
    "bayes": Weighting("posterior over members, from an even prior"),
    "bayes-updating": Weighting("the same, from a prior that follows the text"),
    "bayes-cached": Weighting("the same, from a prior of a development text", needs_prior=True),
}


def name_ensemble(weights: str, k: int) -> str:
    """The name of an ensemble among the models: btm-top2, btm-bayes-top2, btm-uniform."""
    if weights == NEAREST:
        return f"btm-top{k}"
    if weights == ALIKE:
        return "btm-uniform"
    return f"btm-{weights}-top{k}"
