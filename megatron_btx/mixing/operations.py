"""How tensors become one: the operations that methods choose from, what each does, and how a plan says it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_btx.common.errors import InputError
from megatron_btx.mixing.plan import Numbers, Operation, Part, Plan, PlannedPiece

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from megatron_btx.mixing.request import RouterInit

_BEYOND_FP32 = (1 << 29) - 1
"""The bits of a number in fp64 that fp32 lacks."""
_STREAM_BYTES = 4 << 20
_SUM_NUMBERS = 1 << 16
"""Means are taken over this many numbers at a time: half a MiB of fp64 stays in the cache of one core."""


def stream(plan: Plan, part: Part) -> Iterator[torch.Tensor]:
    """All rows of a source's piece, some MiB at a time and in order."""
    held = plan.held(part)
    step = max(1, _STREAM_BYTES // max(1, held.dtype.itemsize * math.prod(held.shape[1:])))
    for start in range(0, held.shape[0], step):
        yield plan.read(part, start, min(start + step, held.shape[0]))


class Move(Operation):
    """The parts one after the other, bit for bit."""

    name = "move"

    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        """Rows out of the parts that hold them; whole rows of each part where the parts are columns."""
        found = []
        if planned.axis == 1:
            for part in planned.parts:
                found.append(plan.read(part, start, stop)[:, part.start : part.stop])
            return join(found, dim=1).to(planned.dtype)
        before = 0
        for part in planned.parts:
            low = max(start, before)
            high = min(stop, before + part.stop - part.start)
            if low < high:
                shift = part.start - before
                found.append(plan.read(part, shift + low, shift + high))
            before += part.stop - part.start
        return join(found, dim=0).to(planned.dtype)

    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        axis = ("rows", "columns")[planned.axis]
        if len(planned.parts) > 1:
            return f"{axis} of {len(planned.parts)} sources, one after the other"
        part = planned.parts[0]
        if part.stop - part.start < plan.held(part).shape[planned.axis]:
            return f"{axis} of one source, moved bit for bit"
        return "moved bit for bit"

    def numbers(self, plan: Plan, planned: PlannedPiece, row: int) -> dict[Part, torch.Tensor]:
        """Of the one part that has the row; of all where the parts are columns."""
        if planned.axis == 1:
            return super().numbers(plan, planned, row)
        for part in planned.parts:
            count = part.stop - part.start
            if row < count:
                at = part.start + row
                return {part: plan.read(part, at, at + 1).double()}
            row -= count
        raise IndexError(f"{planned.name}: its parts end {row + 1} rows before")

    def reference(self, plan: Plan, planned: PlannedPiece, rows: Sequence[int], numbers: Numbers) -> torch.Tensor:
        """The row itself, or its columns side by side."""
        import torch

        if planned.axis == 0:
            (found,) = numbers.values()
            return found
        return torch.cat([numbers[part][:, part.start : part.stop] for part in planned.parts], 1)


class Average(Operation):
    """The weighted mean over the sources, rounded once to the stored dtype.

    Summed in fp64: in fp32 three equal experts would not average to themselves, and the experts' order would show.
    """

    name = "average"

    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        means = []
        for low, high, parts in self.stretches(plan, planned, start, stop):
            means.append(_mean(plan, planned, parts, low, high))
        return join(means, dim=0)

    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        if plan.request.weights:
            return "weighted mean"
        return "mean of all"

    def reference(self, plan: Plan, planned: PlannedPiece, rows: Sequence[int], numbers: Numbers) -> torch.Tensor:
        """Each times its weight, over the sum of the weights."""
        import torch

        weights = torch.tensor([plan.weights[part.source] for part in numbers], dtype=torch.float64)
        if not bool(weights.any()):  # a token that only models of weight zero know is theirs all the same
            weights = torch.ones_like(weights)
        return torch.tensordot(weights / weights.sum(), torch.stack(list(numbers.values())), dims=1)

    def stretches(
        self, plan: Plan, planned: PlannedPiece, start: int, stop: int
    ) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
        """All rows over all sources, but those of an embedding or head over the sources whose token the row is.

        Padding enters no average. A row that is nobody's token is averaged over those that have it at all.
        """
        if not planned.has_token_rows:
            yield start, stop, planned.parts
            return
        tokens = {part: plan.sources[part.source].token_rows(part.piece) for part in planned.parts}
        bounds = {start, stop}
        for part, stretches in tokens.items():
            for bound in (part.stop, *itertools.chain(*stretches)):
                if start < bound < stop:
                    bounds.add(bound)
        for low, high in itertools.pairwise(sorted(bounds)):
            owners = [part for part in planned.parts if any(begin <= low < end for begin, end in tokens[part])]
            if not owners:
                owners = [part for part in planned.parts if low < part.stop]
            yield low, high, tuple(owners)


class NewRouters(Operation):
    """Rows of new routers; see :func:`router_rows`."""

    name = "router"

    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        index = sum(plan.sizes.mixture_layers[: planned.piece.numbers["layer"]])
        return new_routers(plan)[index, start:stop].to(planned.dtype)

    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        return describe_routers(plan.request.router, "rows: ")

    def reference(self, plan: Plan, planned: PlannedPiece, rows: Sequence[int], numbers: Numbers) -> torch.Tensor:
        """Drawn again, one mixture layer after the other up to this one; or read by numpy."""
        import numpy as np
        import torch

        init, experts, hidden = plan.request.router, plan.sizes.experts, plan.sizes.hidden
        before = sum(plan.sizes.mixture_layers[: planned.piece.numbers["layer"]])
        found = torch.zeros(experts, hidden)
        if init.how == "normal":
            generator = torch.Generator().manual_seed(init.seed)
            for _ in range(before + 1):
                found = torch.empty(experts, hidden).normal_(0.0, init.std, generator=generator)
        elif init.file is not None:
            read = np.load(init.file, allow_pickle=False)
            if read.ndim == 3:
                read = read[before]
            found = torch.from_numpy(read.astype(np.float32))
        return found[list(rows)].double()


class Zeros(Operation):
    """Zeros: biases of new routers, and experts that add nothing."""

    name = "zeros"

    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.zeros(stop - start, *planned.shape[1:], dtype=planned.dtype)

    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        return "zeros"

    def reference(self, plan: Plan, planned: PlannedPiece, rows: Sequence[int], numbers: Numbers) -> torch.Tensor:
        import torch

        return torch.tensor(0.0, dtype=torch.float64).expand(len(rows), *planned.shape[1:])


class Ramp(Operation):
    """Rows that run from 1 to just below 2: the gates of experts that add nothing."""

    name = "ramp"

    def rows(self, plan: Plan, planned: PlannedPiece, start: int, stop: int) -> torch.Tensor:
        import torch

        columns = planned.shape[1]
        row = 1 + torch.arange(columns, dtype=torch.float64) / columns
        return row.to(planned.dtype).repeat(stop - start, 1)

    def describe(self, plan: Plan, planned: PlannedPiece) -> str:
        return "1 to 2, so that no token's gate is zero"

    def reference(self, plan: Plan, planned: PlannedPiece, rows: Sequence[int], numbers: Numbers) -> torch.Tensor:
        import torch

        columns = planned.shape[1]
        return torch.linspace(1, 2, columns + 1, dtype=torch.float64)[:columns].expand(len(rows), columns)


MOVE, AVERAGE, NEW_ROUTERS, ZEROS, RAMP = Move(), Average(), NewRouters(), Zeros(), Ramp()


def _mean(plan: Plan, planned: PlannedPiece, parts: Sequence[Part], start: int, stop: int) -> torch.Tensor:
    import torch

    weights = [plan.weights[part.source] for part in parts]
    divisor = sum(weights)
    if len(set(weights)) == 1:  # whole numbers sum and divide without rounding
        weights = [1.0] * len(parts)
        divisor = len(parts)
    sources = [plan.read(part, start, stop).reshape(-1) for part in parts]
    result = torch.empty(stop - start, *planned.shape[1:], dtype=planned.dtype)
    flat = result.view(-1)
    total = torch.empty(min(_SUM_NUMBERS, flat.numel()), dtype=torch.float64)
    for low in range(0, flat.numel(), _SUM_NUMBERS):
        stretch = slice(low, min(low + _SUM_NUMBERS, flat.numel()))
        sum_ = total[: stretch.stop - low].zero_()
        for source, weight in zip(sources, weights, strict=True):
            sum_.add_(source[stretch], alpha=weight)
        flat[stretch] = for_one_rounding(sum_.div_(divisor), planned.dtype)
    return result


def for_one_rounding(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers in fp64, changed in place so that their conversion to ``dtype`` rounds once.

    torch goes from fp64 to 16 bits by way of fp32, and two roundings can miss the nearest number. So what fp32 has no
    room for leaves its mark in the last bit that it has (rounding to odd, Boldo and Melquiond 2008).
    """
    import torch

    if dtype.itemsize < torch.float32.itemsize:
        bits = numbers.view(torch.int64)
        bits |= (bits & _BEYOND_FP32).add_(_BEYOND_FP32)
        bits &= ~_BEYOND_FP32
    return numbers


def join(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Tensors one after the other along an axis; a single one without a copy where it is contiguous."""
    import torch

    if len(tensors) == 1:
        return tensors[0].contiguous()
    return torch.cat(list(tensors), dim=dim)


def describe_routers(init: RouterInit, before: str = "") -> str:
    """How routers start, in words; ``before`` stands before the word or the file's name where they are not drawn."""
    if init.how == "normal":
        return f"normal, std {init.std:g}, seed {init.seed}"
    return f"{before}{init.how}"


def new_routers(plan: Plan) -> torch.Tensor:
    """The routers of a plan, made once for all who ask; see :func:`router_rows`."""
    init, sizes = plan.request.router, plan.sizes
    layers = sum(sizes.mixture_layers)
    return plan.once.get("routers", lambda: router_rows(init, layers, sizes.experts, sizes.hidden))


def router_rows(init: RouterInit, layers: int, experts: int, hidden: int) -> torch.Tensor:
    """The routers of all mixture layers, in order: fp32 [L, E, H]; one generator draws them all, layer after layer.

    Raises:
        InputError: a file of rows cannot be read, is of another shape, or holds numbers that are not finite.
    """
    import torch

    if init.how == "normal":
        generator = torch.Generator().manual_seed(init.seed)
        drawn = [torch.empty(experts, hidden).normal_(0.0, init.std, generator=generator) for _ in range(layers)]
        return torch.stack(drawn)
    if init.file is None:
        return torch.zeros(layers, experts, hidden)
    rows = _rows_of_file(init.file)
    if rows.dim() == 2:
        rows = rows.expand(layers, *rows.shape)
    if tuple(rows.shape) != (layers, experts, hidden):
        raise InputError(
            f"--router-init {init.how}: holds {list(rows.shape)}, expected [{layers}, {experts}, {hidden}] "
            f"(mixture layers, experts, hidden) or [{experts}, {hidden}] for all layers"
        )
    if not bool(torch.isfinite(rows).all()):
        raise InputError(f"--router-init {init.how}: holds NaN or infinite numbers; make it again")
    return rows


def _rows_of_file(file: Path) -> torch.Tensor:
    import numpy as np
    import torch

    if not file.is_file():  # reading a pipe would wait forever
        raise InputError(f"--router-init {file}: expected normal, zeros, or an .npy file; there is none")
    try:
        # Mapped, so that a header which claims more than the file holds is refused before memory is asked for.
        rows = np.lib.format.open_memmap(file, mode="r")
        if rows.dtype.kind not in "fiu":
            raise TypeError(f"its type is {rows.dtype}")
        return torch.from_numpy(np.array(rows)).float()
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"--router-init {file}: is not an .npy file of numbers ({error}); see numpy.save") from error
