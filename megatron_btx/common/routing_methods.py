"""How a mixture can route: one table of methods, in Megatron's flags and ours.

Recipes, the launchers and the documentation read it. A launcher asks for the flags:

    python -m megatron_btx.common.routing_methods --routing switch --experts 4
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from megatron_btx.common.errors import InputError, exits_with_one_line

DEFAULT_TOPK = 2
SWITCH_CAPACITY = 1.5
"""The paper's capacity factor of switch routing."""
BALANCING_COEFFICIENT = 0.01
"""The paper's weight of the balancing loss."""
BALANCING = ("megatron", "paper", "none")
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

    def flags(
        self, experts: int, topk: int | None = None, capacity: float | str | None = None
    ) -> dict[str, int | float | str]:
        """Megatron's flags without dashes; True for a bare one.

        Args:
            experts: of the mixture.
            topk: of the methods that take it.
            capacity: in place of the paper's.
        """
        flags: dict[str, int | float | str] = {"moe-router-topk": self.experts_per_token(experts, topk)}
        if self.pre_softmax:
            flags["moe-router-pre-softmax"] = True
        if self.capacity is not None:
            flags["moe-expert-capacity-factor"] = capacity or self.capacity
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


METHODS = (
    RoutingMethod("top-k", "top-k, softmax over the k chosen", takes_topk=True),
    RoutingMethod("top-k-pre-softmax", "top-k of the full softmax", takes_topk=True, pre_softmax=True),
    RoutingMethod("switch", "switch", pre_softmax=True, capacity=SWITCH_CAPACITY),
    RoutingMethod("soft", "soft: every token takes all experts", takes_all=True, is_balanced=False),
    RoutingMethod("sample-top1", "sampled top-1", pre_softmax=True, samples=True, is_balanced=False),
)
"""The paper's (section 3.2 and its table of ablations), and top-k of the full softmax, as Mixtral's successors have."""
NAMES = tuple(method.name for method in METHODS)


def find_method(name: str) -> RoutingMethod | None:
    """The method of that name; None where there is none."""
    for method in METHODS:
        if method.name == name:
            return method
    return None


def launcher_words(given: argparse.Namespace) -> list[str]:
    """The command line of what a launcher's variables ask for.

    Raises:
        InputError: they contradict each other; names the variable.
    """
    method = find_method(given.routing)
    if method is None:
        *first, last = NAMES
        raise InputError(f"ROUTING={given.routing}: expected {', '.join(first)} or {last}")
    if given.topk and not method.takes_topk:
        raise InputError(f"TOPK={given.topk} with ROUTING={method.name}, which has its own k; leave one of them out")
    if given.capacity and method.capacity is None:
        raise InputError(
            f"CAPACITY={given.capacity} with ROUTING={method.name}, which drops no token; leave one of them out"
        )
    words = []
    topk = int(given.topk) if given.topk else None
    for name, value in method.flags(given.experts, topk, given.capacity).items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words + _balancing_words(method, given.balancing, given.aux_loss)


def _balancing_words(method: RoutingMethod, balancing: str, coefficient: str) -> list[str]:
    if not balancing:
        balancing = "megatron" if method.is_balanced else "none"
    if balancing not in BALANCING:
        raise InputError(f"BALANCING={balancing}: expected megatron, paper or none")
    if balancing == "none":
        if coefficient:
            raise InputError(
                f"AUX_LOSS={coefficient} with BALANCING=none (the default of ROUTING=soft and sample-top1); "
                "leave one of them out"
            )
        return ["--moe-router-load-balancing-type", "none"]
    coefficient = coefficient or str(BALANCING_COEFFICIENT)
    kind = ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", coefficient]
    return [*kind, "--btx-load-balancing", balancing]


@exits_with_one_line
def main() -> int:
    """Print the flags of a routing method, one word a line. Empty values count as not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routing", metavar="NAME", default="top-k", help=f"{', '.join(NAMES)} (default: top-k)")
    parser.add_argument("--experts", metavar="N", type=int, default=4, help="experts of the mixture (default: 4)")
    parser.add_argument("--topk", metavar="K", default="", help="experts per token (default: 2)")
    parser.add_argument("--capacity", metavar="X", default="", help="capacity factor of switch routing (default: 1.5)")
    parser.add_argument("--balancing", metavar="FORM", default="", help="megatron, paper or none (default: by method)")
    parser.add_argument("--aux-loss", metavar="X", default="", help="weight of the balancing loss (default: 0.01)")
    print("\n".join(launcher_words(parser.parse_args())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
