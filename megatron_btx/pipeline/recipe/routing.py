"""The routing methods by name: what ``mix.routing`` and ``mix.load-balancing`` say in Megatron's flags and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megatron_btx.pipeline.recipe.flags import Flags, FlagValue
from megatron_btx.pipeline.recipe.reading import Section

METHODS = ("top-k", "top-k-pre-softmax", "switch", "soft", "sample-top1")
BALANCING = ("megatron", "paper", "none")
SWITCH_CAPACITY = 1.5
"""The paper's capacity factor of switch routing."""
_DEFAULT_TOP_K = 2
_PAPER_COEFFICIENT = 0.01


class Routing(NamedTuple):
    """How a mixture routes: a method, its k, and the loss that balances it."""

    method: str
    top_k: int
    balancing: str | None
    """None: as the flags say."""

    def flags(self, given: Flags) -> dict[str, FlagValue]:
        """The flags that follow, beside those ``given`` for the mix; false takes a given one back."""
        flags: dict[str, FlagValue] = {"moe-router-topk": self.top_k}
        if self.method in ("top-k-pre-softmax", "switch", "sample-top1"):
            flags["moe-router-pre-softmax"] = True
        if self.method == "switch":
            flags["moe-expert-capacity-factor"] = given.get("moe-expert-capacity-factor") or SWITCH_CAPACITY
        if self.method == "sample-top1":
            flags["btx-sample-top1"] = True
        if self.balancing == "none":
            flags |= {
                "moe-router-load-balancing-type": "none",
                "moe-aux-loss-coeff": False,
                "btx-load-balancing": False,
            }
        elif self.balancing is not None:
            kind = given.get("moe-router-load-balancing-type")
            flags["moe-router-load-balancing-type"] = kind if kind not in (None, False, "none") else "aux_loss"
            flags["moe-aux-loss-coeff"] = given.get("moe-aux-loss-coeff") or _PAPER_COEFFICIENT
            flags["btx-load-balancing"] = self.balancing
        return flags


def read_routing(section: Section, experts: int, base: Routing | None = None) -> Routing:
    """The routing that a section names under routing, top-k and load-balancing; what it leaves out is ``base``'s.

    Raises:
        InputError: an unknown method, or a k that the method does not have.
    """
    method = section.text("routing", base.method if base else METHODS[0])
    if method not in METHODS:
        section.refuse("routing", f"found {method!r}, expected one of {', '.join(METHODS)}")
    has_k = method in ("top-k", "top-k-pre-softmax")
    if "top-k" in section.node and not has_k:
        section.refuse("top-k", f"{method} routing has its own k; leave it out")
    inherited = base.top_k if base and base.method in ("top-k", "top-k-pre-softmax") else min(_DEFAULT_TOP_K, experts)
    top_k = section.integer("top-k", inherited) if has_k else experts if method == "soft" else 1
    if top_k > experts:
        section.refuse("top-k", f"found {top_k}, expected at most the {experts} experts of the mix")
    if method == "top-k" and top_k == 1 and experts > 1:
        section.refuse("top-k", "found 1: after the softmax of one logit every gate is 1; take routing: switch")
    balancing = section.text("load-balancing", (base.balancing if base else None) or "as given")
    if balancing not in (*BALANCING, "as given"):
        section.refuse("load-balancing", f"found {balancing!r}, expected one of {', '.join(BALANCING)}")
    return Routing(method, top_k, None if balancing == "as given" else balancing)


def check_balancing(section: Section, routing: Routing, given: Mapping[str, Flags]) -> None:
    """Refuse flags that contradict the load-balancing of a section, which would take their place in silence.

    Args:
        given: place in the recipe -> flags that are written there.
    """
    if "load-balancing" not in section.node:
        return
    none = routing.balancing == "none"
    for place, flags in given.items():
        kind, coefficient = flags.get("moe-router-load-balancing-type"), flags.get("moe-aux-loss-coeff")
        for name, value, contradicts in (
            ("moe-router-load-balancing-type", kind, (kind == "none") != none),
            ("moe-aux-loss-coeff", coefficient, (coefficient == 0) != none),
        ):
            if value is not None and value is not False and contradicts:
                remedy = "leave one of them out (null takes back what an included recipe says)"
                said = f"load-balancing: {routing.balancing}"
                section.reader.refuse(
                    f"{place}.{name}", f"found {value!r} beside {said}, which contradicts it; {remedy}"
                )
