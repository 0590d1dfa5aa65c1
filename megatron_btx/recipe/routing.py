"""The routing of a mixture: what ``routing``, ``top-k`` and ``load-balancing`` say in Megatron's flags and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from megatron_btx.common.refusals import refuse
from megatron_btx.common.routing_methods import BALANCING_COEFFICIENT, DEFAULT_TOPK, METHODS, Balancing, RoutingMethod
from megatron_btx.recipe.flags import Flags, FlagValue

if TYPE_CHECKING:
    from megatron_btx.recipe.sections import RoutingSection

_KIND, _COEFFICIENT = "moe-router-load-balancing-type", "moe-aux-loss-coeff"


class Routing(NamedTuple):
    """How a mixture routes: a method, its k, and the loss that balances it."""

    method: RoutingMethod
    top_k: int
    balancing: Balancing | None
    """None: as the flags say."""

    def flags(self, given: Flags) -> dict[str, FlagValue]:
        """The flags that follow, beside those ``given`` for the mix; false takes a given one back."""
        flags: dict[str, FlagValue] = {**self.method.flags(self.top_k, self.top_k)}
        capacity = "moe-expert-capacity-factor"
        if capacity in flags and given.get(capacity):
            flags[capacity] = given[capacity]
        if self.balancing == "none":
            flags |= {_KIND: "none", _COEFFICIENT: False, "btx-load-balancing": False}
        elif self.balancing is not None:
            kind = given.get(_KIND)
            if kind in (None, False, "none"):
                kind = "aux_loss"
            coefficient = given.get(_COEFFICIENT) or BALANCING_COEFFICIENT
            flags |= {_KIND: kind, _COEFFICIENT: coefficient, "btx-load-balancing": self.balancing}
        return flags


def read_routing(place: str, section: RoutingSection, experts: int, base: Routing | None = None) -> Routing:
    """The routing that the section at ``place`` names; what it leaves out is ``base``'s.

    Raises:
        InputError: an unknown method, or a k that the method does not have.
    """
    name = section.routing or (base.method.name if base else next(iter(METHODS)))
    if name not in METHODS:
        refuse(f"{place}.routing", f"found {name!r}, expected one of {', '.join(METHODS)}")
    method = METHODS[name]
    balancing = section.load_balancing or (base.balancing if base else None)
    return Routing(method, _read_top_k(place, section, method, experts, base), balancing)


def _read_top_k(place: str, section: RoutingSection, method: RoutingMethod, experts: int, base: Routing | None) -> int:
    if not method.takes_topk:
        if section.top_k is not None:
            refuse(f"{place}.top-k", f"{method.name} routing has its own k; leave it out")
        return method.experts_per_token(experts)
    top_k = min(DEFAULT_TOPK, experts)
    if base and base.method.takes_topk:
        top_k = base.top_k
    if section.top_k is not None:
        top_k = section.top_k
    if top_k > experts:
        refuse(f"{place}.top-k", f"found {top_k}, expected at most the {experts} experts of the mix")
    if not method.pre_softmax and top_k == 1 and experts > 1:
        refuse(f"{place}.top-k", "found 1: after the softmax of one logit every gate is 1; take routing: switch")
    return top_k


def check_balancing(section: RoutingSection, routing: Routing, given: Mapping[str, Flags]) -> None:
    """Refuse flags that contradict the load-balancing of a section, which would take their place in silence.

    Args:
        given: place in the recipe -> flags that are written there.
    """
    if section.load_balancing is None:
        return
    none = routing.balancing == "none"
    for place, flags in given.items():
        kind, coefficient = flags.get(_KIND), flags.get(_COEFFICIENT)
        for name, value, says_none in ((_KIND, kind, kind == "none"), (_COEFFICIENT, coefficient, coefficient == 0)):
            if value is None or value is False or says_none == none:
                continue
            remedy = "leave one of them out (null takes back what an included recipe says)"
            beside = f"beside load-balancing: {routing.balancing}, which contradicts it"
            refuse(f"{place}.{name}", f"found {value!r} {beside}; {remedy}")
