"""Hugging Face model folders: safetensors files, one or many with an index, read at positions.

The format is a JSON header of names, dtypes, shapes and offsets, followed by the numbers. Reading it needs no library
and runs no code; knowing the positions lets slices be read in any order.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.stored import Block, Files, Place, StoredTensor, read_box, read_slice
from megatron_btx.common.errors import CheckpointError
from megatron_btx.common.files import parse_json, read_json_object

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_AT_MOST_BYTES = 100 << 20
_STEP_BYTES = 16 << 20
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_model_folder(path: Path) -> bool:
    """Whether a folder is (or claims to be) a Hugging Face model."""
    return os.path.lexists(path / CONFIG) and not (path / ".metadata").exists()


def refuse_without_config(path: Path) -> None:
    """Refuse a folder that holds models' weights and nothing that describes them."""
    weights = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
    if weights:
        raise CheckpointError(f"{path}: has {min(weights).name}, but no {CONFIG}; the model folder is incomplete")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        CheckpointError: it is missing, or something else.
    """
    return read_json_object(file, "the model folder is incomplete or damaged", CheckpointError)


def _check_whole(numbers: list[int]) -> tuple[int, ...]:
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} where whole numbers are expected")
    return tuple(numbers)


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: from the name of each tensor to its file."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map of names to files; it is damaged")
    return weight_map


def _choose_file(folder: Path) -> str:
    """The index or the single file. Where both are there: the single file, which transformers (4.57 and 5) reads.

    Raises:
        CheckpointError: there is neither, or the two hold other weights: one is left over from another save.
    """
    single, index = (folder / SINGLE).is_file(), os.path.lexists(folder / INDEX)
    if not single and not index:
        found = f"has neither {SINGLE} nor {INDEX}"
        if os.path.lexists(folder / SINGLE):
            found = f"{SINGLE} is no file, or a link to none"
        raise CheckpointError(f"{folder}: {found}; the model folder is incomplete")
    if not index:
        return SINGLE
    if not single:
        return INDEX
    shards = set(_weight_map(folder).values())
    if shards == {SINGLE}:
        return INDEX
    if any((folder / Path(name).name).is_file() for name in shards) and not _have_same_weights(folder):
        raise CheckpointError(
            f"{folder}: holds two sets of weights: {SINGLE}, which transformers reads, and {INDEX} with its "
            "shards, and they are not the same; remove the one that is left over from another save"
        )
    return SINGLE


def _have_same_weights(folder: Path) -> bool:
    """Whether the single file and the shards of the index hold the same tensors, bit for bit."""
    one = SafetensorsReader(folder, SINGLE)
    try:
        other = SafetensorsReader(folder, INDEX)
    except CheckpointError:
        return False
    if one.tensors.keys() != other.tensors.keys():
        return False
    return all(one.has_same(mine, other, other.tensors[name]) for name, mine in one.tensors.items())


@dataclasses.dataclass(frozen=True)
class _Entry:
    """What a header says of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: tuple[int, ...]
    """Where its bytes begin and end, counted from the end of the header."""


def _entries_of(header: Mapping[str, Any]) -> list[_Entry]:
    """The entries of a header, in the order of their bytes."""
    entries = []
    for name, entry in header.items():
        if name != "__metadata__":
            shape, extent = _check_whole(entry["shape"]), _check_whole(entry["data_offsets"])
            entries.append(_Entry(name, str(entry["dtype"]), shape, extent))
    return sorted(entries, key=lambda entry: entry.extent)


class SafetensorsReader:
    """Reads tensors and slices of one model folder.

    Raises:
        CheckpointError: from the constructor or a read; names the file and what is wrong with it.
    """

    def __init__(self, folder: Path, file: str = "") -> None:
        """Open a folder; ``file`` is :data:`INDEX` or :data:`SINGLE` where one of the two is meant."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files = Files()
        self._weight_map: Mapping[str, str] = {}
        if (file or _choose_file(folder)) == INDEX:
            self._open_index()
        else:
            self._open_file(SINGLE)

    def _open_index(self) -> None:
        index = self.folder / INDEX
        self._weight_map = weight_map = _weight_map(self.folder)
        self._open_shards(sorted(set(weight_map.values())))
        for tensor, file in weight_map.items():
            if tensor not in self.tensors:
                raise CheckpointError(f"{index}: {tensor} is said to be in {file}, which does not hold it; damaged")
            if self.file_of(tensor) != file:
                found = self.file_of(tensor)
                raise CheckpointError(f"{index}: {tensor} is said to be in {file}, it is in {found}; damaged")
        for tensor in self.tensors:
            if tensor not in weight_map:
                raise CheckpointError(f"{index}: does not name {tensor}, which {self.file_of(tensor)} holds")

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self.tensors[name].blocks[0].file

    def _open_shards(self, names: Sequence[str]) -> None:
        index = self.folder / INDEX
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: names {name!r}, expected a .safetensors file beside it; refused")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder / missing[0]}: does not exist, {INDEX} names it ({len(missing)} of {len(names)} "
                "files are missing); the model folder is incomplete, fetch or save it again"
            )
        for name in names:
            self._open_file(name)

    def _open_file(self, name: str) -> None:
        file = self.folder / name
        size = file.stat().st_size
        if size < 8:
            raise CheckpointError(f"{file}: {size} bytes; it is truncated")
        length = int.from_bytes(self._files.bytes_at(Place(file, 0), 8), "little")
        if length > min(_HEADER_AT_MOST_BYTES, size - 8):
            raise CheckpointError(
                f"{file}: {size} bytes, but its header says it is {length} long; truncated or damaged"
            )
        try:
            entries = _entries_of(parse_json(self._files.bytes_at(Place(file, 8), length)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: its header cannot be read ({error!r}); it is damaged") from error
        end = 0
        for entry in entries:
            before = self.tensors.get(entry.name)
            self._add(file, entry, 8 + length, end)
            end = entry.extent[1]
            if before is not None:
                self._choose_copy(entry.name, before)
        if 8 + length + end != size:
            raise CheckpointError(f"{file}: {size} bytes, but its header names {8 + length + end}; it is truncated")

    def _choose_copy(self, name: str, before: StoredTensor) -> None:
        """Of a tensor that two shards hold with the same bytes, keep the copy that the index names."""
        file, other = self.file_of(name), before.blocks[0].file
        if not self.has_same(self.tensors[name], self, before):
            raise CheckpointError(f"{self.folder / file}: {name} is in {other} as well, with other numbers; damaged")
        if self._weight_map.get(name) == other:
            self.tensors[name] = before

    def _add(self, file: Path, entry: _Entry, data_at: int, end: int) -> None:
        """Add a tensor of a file whose numbers begin at ``data_at``; the tensor before ends at ``end``."""
        import torch

        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{file}: {entry.name}: is stored as {entry.dtype}, expected one of {', '.join(DTYPES)}; "
                "save the model unquantised in bf16, fp16 or fp32"
            )
        kind: torch.dtype = getattr(torch, DTYPES[entry.dtype])
        shape, extent = entry.shape, entry.extent
        if len(extent) != 2 or extent[0] != end or extent[1] - extent[0] != math.prod(shape) * kind.itemsize:
            raise CheckpointError(
                f"{file}: {entry.name}: shape {list(shape)} does not fit its bytes {list(extent)}; damaged"
            )
        block = Block((0,) * len(shape), shape, file.name, data_at + extent[0], extent[1] - extent[0])
        self.tensors[entry.name] = StoredTensor(shape, kind, (block,))

    def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """The slice of a tensor at ``offsets`` of ``sizes``."""
        stored = self.tensors[name]

        def read_block(block: Block, low: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
            place = Place(self.folder / block.file, block.position_bytes)
            return read_box(self._files, place, block.sizes, low, extent, stored.dtype)

        return read_slice(name, stored, offsets, sizes, read_block, self.folder)

    def dtypes(self) -> list[str]:
        """The names of the tensors' types, that with the most bytes first."""
        size_bytes: dict[str, int] = {}
        for stored in self.tensors.values():
            name = str(stored.dtype).removeprefix("torch.")
            size_bytes[name] = size_bytes.get(name, 0) + stored.blocks[0].length_bytes
        return sorted(size_bytes, key=lambda name: -size_bytes[name])

    def has_same(self, mine: StoredTensor, other: SafetensorsReader, theirs: StoredTensor) -> bool:
        """Whether a tensor and one of another reader have one shape and dtype, and the same bytes."""
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return False
        for start in range(0, mine.blocks[0].length_bytes, _STEP_BYTES):
            if self._bytes_of(mine.blocks[0], start) != other._bytes_of(theirs.blocks[0], start):
                return False
        return True

    def _bytes_of(self, block: Block, start: int) -> bytes:
        """Some bytes of a tensor from its byte ``start`` on."""
        count = min(_STEP_BYTES, block.length_bytes - start)
        return self._files.bytes_at(Place(self.folder / block.file, block.position_bytes + start), count)

    def files(self) -> list[Path]:
        """The configuration, the index where there is one, and all files that hold tensors."""
        names = sorted(set(map(self.file_of, self.tensors)))
        if (self.folder / INDEX).is_file() and names != [SINGLE]:  # beside the single file an index is left over
            names.insert(0, INDEX)
        if (self.folder / CONFIG).is_file():
            names.insert(0, CONFIG)
        return [self.folder / name for name in names]
