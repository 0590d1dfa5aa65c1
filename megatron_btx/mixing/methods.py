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


def _whole_blocks(sources: int, _: int) -> list[Expert]:
    return [(Chunk(source),) for source in range(sources)]


def _split_blocks(sources: int, chunks: int) -> list[Expert]:
    experts: list[Expert] = []
    for source in range(sources):
        for index in range(chunks):
            experts.append((Chunk(source, index, chunks),))
    return experts


def _split_names(names: list[str], chunks: int) -> list[str]:
    found = []
    for name in names:
        for index in range(chunks):
            found.append(f"{name}.{index}")
    return found


def _blended_blocks(sources: int, _: int) -> list[Expert]:
    experts = []
    for index in range(sources):
        chunks = [Chunk(source, index, sources) for source in range(sources)]
        experts.append(tuple(chunks))
    return experts


def _blended_names(names: list[str], _: int) -> list[str]:
    return [f"blend.{index}" for index in range(len(names))]


def _copied_block(_: int, copies: int) -> list[Expert]:
    return [(Chunk(0),)] * copies


def _copied_names(names: list[str], copies: int) -> list[str]:
    return [f"{names[0]}.{index}" for index in range(copies)]


METHODS: dict[str, Method] = {
    "btx": Method(
        "every source's feed-forward blocks become an expert, bit for bit; the rest is averaged",
        shared=AVERAGE,
        experts=_whole_blocks,
    ),
    "split": Method(
        "every source's feed-forward blocks are cut in C chunks along F, each an expert; the rest is averaged",
        shared=AVERAGE,
        experts=_split_blocks,
        names=_split_names,
        number="chunks",
    ),
    "blend": Method(
        "expert n is chunk n of every source, one after the other; the rest is averaged",
        shared=AVERAGE,
        experts=_blended_blocks,
        names=_blended_names,
    ),
    "upcycle": Method(
        "one source, whose feed-forward blocks are copied into N equal experts",
        shared=MOVE,
        experts=_copied_block,
        names=_copied_names,
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
