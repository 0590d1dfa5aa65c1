"""What a plan is: every piece of the result, where it comes from and how, before anything is written."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megatron_btx.mixing.request import Request

if TYPE_CHECKING:  # the command line reads the table of methods, and has no need of what reads checkpoints
    import torch

    from megatron_btx.checkpoint.pieces import Piece
    from megatron_btx.checkpoint.sizes import Sizes
    from megatron_btx.mixing.sources import Source


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """Rows of a source's piece, or columns where :attr:`PlannedPiece.axis` is 1."""

    source: int
    """Its place among :attr:`Plan.sources`."""
    piece: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class PlannedPiece:
    """One piece of the result."""

    piece: Piece
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: Operation
    """What makes the piece."""
    parts: tuple[SourceRows, ...] = ()
    """What it is made of."""
    axis: int = 0
    """0 where the parts are rows, 1 where they are columns."""
    new_rows: int = 0
    """The last rows of the piece, which no source has: padding, each the mean of the result's tokens."""

    @property
    def has_token_rows(self) -> bool:
        """Whether each row belongs to a token or is padding."""
        return self.name.startswith(("embedding.", "head."))

    @property
    def name(self) -> str:
        """The piece's name."""
        return self.piece.name

    @property
    def source_rows(self) -> int:
        """Rows that are made from the sources: all but the new ones."""
        return self.shape[0] - self.new_rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a mix will write."""

    request: Request
    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    """Of the sources in averages; they sum to one."""
    pieces: tuple[PlannedPiece, ...]
    arguments: Mapping[str, Any]
    """The arguments of the result."""
    sizes: Sizes

    @functools.cached_property
    def mean_rows(self) -> dict[str, torch.Tensor]:
        """By piece, the row that is new in it; filled when the first of its rows is asked for."""
        return {}

    @property
    def input_bytes(self) -> int:
        """Bytes read from the sources."""
        total = 0
        for planned in self.pieces:
            for part in planned.parts:
                held = self.sources[part.source].pieces[part.piece]
                share = (part.stop - part.start) / max(1, held.shape[planned.axis])
                total += round(math.prod(held.shape) * share) * held.dtype.itemsize
        return total


class Operation(abc.ABC):
    """One way to make a piece; :mod:`megatron_btx.mixing.merge` has them all."""

    name: str
    """As the manifest says it."""

    @abc.abstractmethod
    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a piece, in its dtype; new rows of the vocabulary are not asked for."""

    @abc.abstractmethod
    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        """What is done, in words, for the column "made by" of a plan."""

    def stretches(
        self, plan: Plan, planned: PlannedPiece, start: int, stop: int
    ) -> Iterator[tuple[int, int, tuple[SourceRows, ...]]]:
        """Rows in stretches, each with the parts that its rows are made of."""
        yield start, stop, planned.parts
