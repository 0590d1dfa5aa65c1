"""Tensors that lie in files: named arrays, cut in blocks, each block a run of bytes at a known place.

Every checkpoint format the project reads or writes comes down to this (``torch_dist`` records, safetensors), so reading
slices, with plain positioned reads and without mapping, is written once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.common.errors import CheckpointError, KeptError

if TYPE_CHECKING:
    import torch


def check_whole(numbers: Sequence[int]) -> tuple[int, ...]:
    """Sizes or positions as a file says them; ValueError where they are no whole numbers from 0 on."""
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} where whole numbers are expected")
    return tuple(numbers)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a contiguous array begins."""

    file: Path
    position_bytes: int


@dataclasses.dataclass(frozen=True)
class Block:
    """One stored block of a tensor: where it lies in the tensor, and where its record lies on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position_bytes: int
    length_bytes: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint: its global shape, its dtype, and its blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]

    @functools.cached_property
    def _single(self) -> int:
        """How many leading axes every block has one index of: layers and experts, as a rule."""
        single = len(self.shape)
        for block in self.blocks:
            while block.sizes[:single] != (1,) * single:
                single -= 1
        return single

    @functools.cached_property
    def _by_lead(self) -> dict[tuple[int, ...], list[Block]]:
        found: dict[tuple[int, ...], list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.offsets[: self._single], []).append(block)
        return found

    def blocks_near(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Sequence[Block]:
        """The blocks that may overlap a slice: few, where the leading axes are cut to one."""
        if tuple(sizes[: self._single]) == (1,) * self._single:
            return self._by_lead.get(tuple(offsets[: self._single]), [])
        return self.blocks


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where the numbers of one block are to be written, and the bytes that belong around them."""

    file: str
    position_bytes: int
    length_bytes: int
    before: bytes = b""
    after: bytes = b""


class Files:
    """Open files, one descriptor each, for reading at positions from several threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def read_into(self, place: Place, buffer: memoryview) -> None:
        """Fill ``buffer`` from a place.

        Raises:
            CheckpointError: the file ends before.
            KeptError: the system cannot read it.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor(place.file), [buffer[done:]], place.position_bytes + done)
            except OSError as error:
                raise KeptError(f"{place.file}: cannot be read ({error.strerror}); start again once it can") from error
            if count == 0:
                raise CheckpointError(
                    f"{place.file}: ends at byte {place.position_bytes + done}, "
                    f"expected {len(buffer) - done} more; it is truncated"
                )
            done += count

    def bytes_at(self, place: Place, length: int) -> bytes:
        """``length`` bytes from a place."""
        buffer = bytearray(length)
        self.read_into(place, memoryview(buffer))
        return bytes(buffer)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it, whatever its dtype."""
    import torch

    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()).cast("B")


def read_box(
    files: Files,
    place: Place,
    block_sizes: tuple[int, ...],
    low: tuple[int, ...],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The box at ``low`` of ``sizes`` out of a contiguous block that begins at ``place``.

    One read: leading axes of which one index is wanted are skipped to, the first other axis is read in its range, and
    what is too much in the axes after it is cut off.
    """
    import torch

    axis = 0
    while axis < len(sizes) - 1 and sizes[axis] == 1:
        axis += 1
    start = 0  # counted in numbers, not bytes
    for skipped, index in enumerate(low[: axis + 1]):
        start += index * math.prod(block_sizes[skipped + 1 :])
    shape = (*sizes[: axis + 1], *block_sizes[axis + 1 :])
    read = torch.empty(shape, dtype=dtype)
    files.read_into(Place(place.file, place.position_bytes + start * dtype.itemsize), bytes_of(read))
    if shape == tuple(sizes):
        return read
    for cut in range(axis + 1, len(sizes)):
        read = read.narrow(cut, low[cut], sizes[cut])
    return read.contiguous()


type Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: along each axis the first index, and the one after the last."""


def _box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    return tuple(offsets), tuple(map(operator.add, offsets, sizes))


def _common(one: Box, other: Box) -> Box | None:
    """What lies in both boxes; None where nothing does."""
    low = tuple(map(max, one[0], other[0]))
    high = tuple(map(min, one[1], other[1]))
    if all(map(operator.lt, low, high)):
        return low, high
    return None


def _minus(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(operator.sub, left, right))


class Reader:
    """Reads slices of a folder's tensors; what they are, and where a block's numbers begin, its format says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files = Files()

    def files(self) -> list[Path]:
        """All files the tensors lie in, and the index that names them."""
        raise NotImplementedError

    def place_of(self, name: str, block: Block) -> Place:
        """Where the numbers of a tensor's block begin."""
        return Place(self.folder / block.file, block.position_bytes)

    def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """The slice of a tensor at ``offsets`` of ``sizes``, put together from the blocks that overlap it.

        Raises:
            CheckpointError: the blocks do not hold all of it, or overlap.
        """
        import torch

        stored, wanted = self.tensors[name], _box(offsets, sizes)
        result: torch.Tensor | None = None
        filled = 0
        boxes: list[Box] = []
        for block in stored.blocks_near(offsets, sizes):
            box = _common(wanted, _box(block.offsets, block.sizes))
            if box is None:
                continue
            low, high = box
            if any(_common(box, other) for other in boxes):
                raise CheckpointError(f"{self.folder}: {name}: two stored blocks overlap at {list(low)}; it is damaged")
            boxes.append(box)
            place, extent = self.place_of(name, block), _minus(high, low)
            part = read_box(self._files, place, block.sizes, _minus(low, block.offsets), extent, stored.dtype)
            filled += part.numel()
            if extent == tuple(sizes):
                result = part
                continue
            if result is None:
                result = torch.empty(sizes, dtype=stored.dtype)
            result[tuple(map(slice, _minus(low, offsets), _minus(high, offsets)))] = part
        if filled != math.prod(sizes):
            raise CheckpointError(f"{self.folder}: {name}: {filled} of {math.prod(sizes)} elements are stored")
        if result is None:
            return torch.empty(sizes, dtype=stored.dtype)
        return result
