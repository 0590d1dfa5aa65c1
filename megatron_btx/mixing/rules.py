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


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One of ``count`` equal parts of a source's feed-forward blocks along F."""

    source: int
    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to make a model from others."""

    summary: str
    shared: Literal["average", "move"]
    """What happens to all that does not become an expert."""
    experts: Callable[[int, int], list[tuple[Chunk, ...]]] | None = None
    """From the number of sources and the number the user gives: the chunks that, one after the other along F, make each
    expert of the result. None: the result has the sources' own feed-forward blocks."""
    names: Callable[[list[str], int], list[str]] = lambda names, number: list(names)
    """Names of the result's experts."""
    at_least: int = 2
    at_most: int | None = None
    number_flag: str = ""
    """The flag that gives the number, for methods that need one."""
    new_routers: bool = False
    """Whether a mixture's routers are made anew, those of its source left."""


METHODS: dict[str, Method] = {
    "btx": Method(
        "every source's feed-forward blocks become an expert, bit for bit; the rest is averaged",
        "average",
        lambda sources, _: [(Chunk(i),) for i in range(sources)],
    ),
    "split": Method(
        "every source's feed-forward blocks are cut in C chunks along F, each an expert; the rest is averaged",
        "average",
        lambda sources, chunks: [(Chunk(i, c, chunks),) for i in range(sources) for c in range(chunks)],
        lambda names, chunks: [f"{name}.{c}" for name in names for c in range(chunks)],
        number_flag="--chunks",
    ),
    "blend": Method(
        "expert n is chunk n of every source, one after the other; the rest is averaged",
        "average",
        lambda sources, _: [tuple(Chunk(i, n, sources) for i in range(sources)) for n in range(sources)],
        lambda names, _: [f"blend.{n}" for n in range(len(names))],
    ),
    "upcycle": Method(
        "one source, whose feed-forward blocks are copied into N equal experts",
        "move",
        lambda _, copies: [(Chunk(0),)] * copies,
        lambda names, copies: [f"{names[0]}.{n}" for n in range(copies)],
        at_least=1,
        at_most=1,
        number_flag="--copies",
    ),
    "average": Method("the plain average of the sources, a dense model", "average"),
    "reroute": Method("one mixture as it is, with new routers", "move", at_least=1, at_most=1, new_routers=True),
    "copy": Method("one source as it is, in another format", "move", at_least=1, at_most=1),
}
