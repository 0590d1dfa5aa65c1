"""How a mixture can route: one table of methods, in Megatron's flags and ours.

Recipes and the documentation read it. The launcher of mixtures says the same in shell; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEFAULT_TOPK = 2
SWITCH_CAPACITY = 1.5
"""The paper's capacity factor of switch routing."""
BALANCING_COEFFICIENT = 0.01
"""The paper's weight of the balancing loss."""
Balancing = Literal["megatron", "paper", "none"]
"""Forms of the balancing loss."""


@dataclass(frozen=True)
class RoutingMethod:
    """One way to choose experts, and the flags that say it."""

    name: str
    """In a recipe (``mix.routing``) and for the launcher (``ROUTING``)."""
    meaning: str
    """For the documentation."""
    takes_topk: bool = False
    """Whether the user says how many experts a token takes."""
    takes_all: bool = False
    """Whether a token takes every expert."""
    pre_softmax: bool = False
    """Whether gates are probabilities over all experts; else a softmax over those that were chosen."""
    capacity: float | None = None
    """Tokens that an expert takes at most, as a multiple of its even share; None: no token is dropped."""
    samples: bool = False
    """Whether the expert is drawn in training."""
    is_balanced: bool = True
    """Whether the paper trains it with a balancing loss."""

    def flags(self, experts: int, topk: int | None = None) -> dict[str, int | float | str]:
        """Megatron's flags without dashes; True for a bare one.

        Args:
            experts: of the mixture.
            topk: of the methods that take it.
        """
        flags: dict[str, int | float | str] = {"moe-router-topk": self.experts_per_token(experts, topk)}
        if self.pre_softmax:
            flags["moe-router-pre-softmax"] = True
        if self.capacity is not None:
            flags["moe-expert-capacity-factor"] = self.capacity
        if self.samples:
            flags["btx-sample-top1"] = True
        return flags

    def experts_per_token(self, experts: int, topk: int | None = None) -> int:
        """How many experts a token takes."""
        if self.takes_all:
            return experts
        if self.takes_topk:
            return topk or DEFAULT_TOPK
        return 1


_METHODS = (
    RoutingMethod("top-k", "top-k, softmax over the k chosen", takes_topk=True),
    RoutingMethod("top-k-pre-softmax", "top-k of the full softmax", takes_topk=True, pre_softmax=True),
    RoutingMethod("switch", "switch", pre_softmax=True, capacity=SWITCH_CAPACITY),
    RoutingMethod("soft", "soft: every token takes all experts", takes_all=True, is_balanced=False),
    RoutingMethod("sample-top1", "sampled top-1", pre_softmax=True, samples=True, is_balanced=False),
)
"""The paper's (section 3.2 and its table of ablations), and top-k of the full softmax, as Mixtral's successors have."""
METHODS = {method.name: method for method in _METHODS}
