"""What a plan is: every piece of the result, what makes it and of what, before anything is written."""

from __future__ import annotations

import abc
import dataclasses
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megatron_btx.checkpoint.pieces import Piece
    from megatron_btx.checkpoint.sizes import Sizes
    from megatron_btx.mixing.loader import Held, Source
    from megatron_btx.mixing.request import Request


@dataclasses.dataclass(frozen=True)
class Part:
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
    parts: tuple[Part, ...] = ()
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


class Once:
    """Values that are made once, by the first thread that asks for them, and kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._values: dict[Hashable, Any] = {}

    def get[T](self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key; whoever asks while it is made waits."""
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._values:
                self._values[key] = make()
            value: T = self._values[key]
        return value


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a mix will write."""

    request: Request
    sources: tuple[Source, ...]
    """Those that are mixed, and last their base, where the method has one."""
    weights: tuple[float, ...]
    """Of the sources that are mixed, in averages; they sum to one."""
    pieces: tuple[PlannedPiece, ...]
    arguments: Mapping[str, Any]
    """The arguments of the result."""
    sizes: Sizes
    once: Once = dataclasses.field(default_factory=Once, compare=False, repr=False)
    """What is computed from whole tensors, for all rows that need it."""

    @property
    def mixed(self) -> tuple[Source, ...]:
        """The sources without the base."""
        return self.sources[: len(self.weights)]

    @property
    def base(self) -> Source | None:
        """The model that the mixed ones began from."""
        if len(self.sources) > len(self.weights):
            return self.sources[-1]
        return None

    def held(self, part: Part) -> Held:
        """The whole piece that a part is of."""
        return self.sources[part.source].pieces[part.piece]

    def read(self, part: Part, start: int, stop: int) -> torch.Tensor:
        """Rows of the whole piece that a part is of."""
        return self.sources[part.source].read(part.piece, start, stop)

    def prepared(self, planned: PlannedPiece) -> Any:
        """What the operation of a piece has found in whole tensors: see :meth:`Operation.prepare`."""
        return self.once.get(("prepared", planned.name), lambda: planned.operation.prepare(self, planned))

    @property
    def input_bytes(self) -> int:
        """Bytes read from the sources."""
        total = 0
        for planned in self.pieces:
            for part in planned.parts:
                held = self.held(part)
                share = (part.stop - part.start) / max(1, held.shape[planned.axis])
                total += round(math.prod(held.shape) * share) * held.dtype.itemsize
        return total


Numbers = Mapping[Part, "torch.Tensor"]
"""What parts hold of some rows, in fp64."""


class Operation(abc.ABC):
    """One way to make a piece."""

    name: str
    """As the manifest says it."""

    @abc.abstractmethod
    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a piece, in its dtype; new rows of the vocabulary are not asked for.

        Asked for by several threads and processes, in any order, and twice when a result is verified.
        """

    @abc.abstractmethod
    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        """What is done, in words, for the column "made by" of a plan."""

    @abc.abstractmethod
    def reference(self, plan: Plan, planned: PlannedPiece, rows: Sequence[int], numbers: Numbers) -> torch.Tensor:
        """What rows of a piece must be, by another road than :meth:`rows`: ``--verify`` compares with it.

        Args:
            rows: their numbers in the piece.
            numbers: what each part holds there, in fp64, [rows, ...]; parts that have nothing to say are left out.

        Returns:
            In fp64, [rows, ...]. What is stored may differ by one rounding.
        """

    def prepare(self, plan: Plan, planned: PlannedPiece) -> object:
        """What :meth:`rows` has to know of whole tensors: a threshold, a norm; ``plan.prepared(planned)`` has it.

        Called once for a piece in each process, when its first rows are asked for. It may read all that its parts hold,
        some rows at a time (``operations.stream``), and is kept to the end, so keep it small. It must be the same in
        every process: what is drawn is drawn by the name of the tensor.
        """
        return None

    def stretches(
        self, plan: Plan, planned: PlannedPiece, start: int, stop: int
    ) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
        """Rows in stretches, each with the parts that its rows are made of."""
        yield start, stop, planned.parts

    def numbers(self, plan: Plan, planned: PlannedPiece, row: int) -> dict[Part, torch.Tensor]:
        """What the parts hold of one row, for :meth:`reference`: each the same row."""
        found = {}
        for _, _, parts in self.stretches(plan, planned, row, row + 1):
            for part in parts:
                found[part] = plan.read(part, row, row + 1).double()
        return found
