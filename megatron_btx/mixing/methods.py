"""The methods of mixing, as a table: which parts of which sources make the experts, and what happens to the rest.

A feed-forward block can be cut along its intermediate axis F: rows of gate and up and columns of down, together, make a
smaller block that computes its share of the sum. Every method is a choice of such parts for each expert of the result.

Sources: Sukhbaatar et al. 2024, arXiv 2403.07816, sections 3.2 (btx) and 4.3 (split, blend); Komatsuzaki et al. 2023,
arXiv 2212.05055 (upcycle).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from megatron_btx.mixing.merge import AVERAGE, MOVE
from megatron_btx.mixing.plan import Operation


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One of ``count`` equal parts of a source's feed-forward blocks along F."""

    source: int
    index: int = 0
    count: int = 1


Expert = tuple[Chunk, ...]
"""What makes one expert: chunks that stand one after the other along F."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to make a model from others."""

    summary: str
    shared: Operation
    """What happens to all that does not become an expert."""
    experts: Callable[[int, int], list[Expert]] | None = None
    """From the number of sources and the number that the user gives: the result's experts. None: the result has the
    sources' own feed-forward blocks."""
    names: Callable[[list[str], int], list[str]] | None = None
    """Names of the result's experts, from those of the sources and the user's number; None: those of the sources."""
    at_least: int = 2
    """Fewest sources."""
    at_most: int | None = None
    """Most sources; None: any number."""
    number: Literal["", "chunks", "copies"] = ""
    """The field of the request that gives the user's number; "" for methods that need none."""
    new_routers: bool = False
    """Whether a mixture's routers are made anew, those of its source left."""

    @property
    def averages(self) -> bool:
        """Whether anything is averaged."""
        return self.shared is AVERAGE


METHODS: dict[str, Method] = {
    "btx": Method(
        "every source's feed-forward blocks become an expert, bit for bit; the rest is averaged",
        shared=AVERAGE,
        experts=lambda sources, _: [(Chunk(source),) for source in range(sources)],
    ),
    "split": Method(
        "every source's feed-forward blocks are cut in C chunks along F, each an expert; the rest is averaged",
        shared=AVERAGE,
        experts=lambda sources, chunks: [(Chunk(s, i, chunks),) for s in range(sources) for i in range(chunks)],
        names=lambda names, chunks: [f"{name}.{index}" for name in names for index in range(chunks)],
        number="chunks",
    ),
    "blend": Method(
        "expert n is chunk n of every source, one after the other; the rest is averaged",
        shared=AVERAGE,
        experts=lambda sources, _: [tuple(Chunk(s, i, sources) for s in range(sources)) for i in range(sources)],
        names=lambda names, _: [f"blend.{index}" for index in range(len(names))],
    ),
    "upcycle": Method(
        "one source, whose feed-forward blocks are copied into N equal experts",
        shared=MOVE,
        experts=lambda _, copies: [(Chunk(0),)] * copies,
        names=lambda names, copies: [f"{names[0]}.{index}" for index in range(copies)],
        at_least=1,
        at_most=1,
        number="copies",
    ),
    "average": Method("the plain average of the sources, a dense model", shared=AVERAGE),
    "reroute": Method(
        "one mixture as it is, with new routers",
        shared=MOVE,
        at_least=1,
        at_most=1,
        new_routers=True,
    ),
    "copy": Method("one source as it is, in another format", shared=MOVE, at_least=1, at_most=1),
}
