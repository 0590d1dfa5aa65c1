"""Hugging Face model folders: safetensors files, one or many with an index, read and laid out at positions.

The format is a JSON header of names, dtypes, shapes and offsets, followed by the numbers. Reading it needs no library
and runs no code; knowing the positions lets slices be read and written in any order.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.stored import Block, Files, Place, Slot, StoredTensor, read_box, read_slice
from megatron_btx.ground.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_HEADER_AT_MOST_BYTES = 100 << 20
_STEP_BYTES = 16 << 20
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_model_folder(path: Path) -> bool:
    """Whether a folder is (or claims to be) a Hugging Face model."""
    return os.path.lexists(path / CONFIG) and not (path / ".metadata").exists()


def refuse_without_config(path: Path) -> None:
    """Refuse a folder that holds models' weights and nothing that describes them."""
    weights = [file for pattern in ("*.safetensors", "*.safetensors.index.json") for file in path.glob(pattern)]
    if weights:
        raise CheckpointError(f"{path}: has {min(weights).name}, but no {CONFIG}; the model folder is incomplete")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or something else."""
    if not file.is_file():  # reading a pipe would wait forever
        found = "is no file, or a link to none" if os.path.lexists(file) else "does not exist"
        raise CheckpointError(f"{file}: {found}; the model folder is incomplete")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}); the model folder is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected an object; it is damaged")
    return content


def _whole(numbers: list[int]) -> tuple[int, ...]:
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"{numbers} where whole numbers are expected")
    return tuple(numbers)


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: from the name of each tensor to its file."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map of names to files; it is damaged")
    return weight_map


def _file_that_counts(folder: Path) -> str:
    """The index or the single file: where both are there, the single file, which transformers (4.57 and 5) reads.

    Raises:
        CheckpointError: there is neither, or the two hold other weights: one is left over from another save.
    """
    single, index = (folder / SINGLE).is_file(), os.path.lexists(folder / INDEX)
    if not single and not index:
        found = f"{SINGLE} is no file, or a link to none" if os.path.lexists(folder / SINGLE) else ""
        found = found or f"has neither {SINGLE} nor {INDEX}"
        raise CheckpointError(f"{folder}: {found}; the model folder is incomplete")
    if not (single and index):
        return SINGLE if single else INDEX
    shards = set(_weight_map(folder).values())
    if shards == {SINGLE}:
        return INDEX
    if any((folder / Path(name).name).is_file() for name in shards) and not _hold_the_same(folder):
        raise CheckpointError(
            f"{folder}: holds two sets of weights: {SINGLE}, which transformers reads, and {INDEX} with its "
            "shards, and they are not the same; remove the one that is left over from another save"
        )
    return SINGLE


def _hold_the_same(folder: Path) -> bool:
    """Whether the single file and the shards of the index hold the same tensors, bit for bit."""
    one = SafetensorsReader(folder, SINGLE)
    try:
        other = SafetensorsReader(folder, INDEX)
    except CheckpointError:
        return False
    described = [{name: (t.shape, t.dtype) for name, t in reader.tensors.items()} for reader in (one, other)]
    return described[0] == described[1] and all(one.holds_as(other, name) for name in one.tensors)


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
        if (file or _file_that_counts(folder)) == INDEX:
            self._open_index()
        else:
            self._open_file(SINGLE)

    def _open_index(self) -> None:
        index = self.folder / INDEX
        weight_map = _weight_map(self.folder)
        names = sorted(set(weight_map.values()))
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
        for tensor, file in weight_map.items():
            if tensor not in self.tensors:
                raise CheckpointError(f"{index}: {tensor} is said to be in {file}, which does not hold it; damaged")
            if self.tensors[tensor].blocks[0].file != file:
                found = self.tensors[tensor].blocks[0].file
                raise CheckpointError(f"{index}: {tensor} is said to be in {file}, it is in {found}; damaged")
        extra = next((name for name in self.tensors if name not in weight_map), None)
        if extra is not None:
            raise CheckpointError(f"{index}: does not name {extra}, which {self.tensors[extra].blocks[0].file} holds")

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
            header = json.loads(self._files.bytes_at(Place(file, 8), length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            described = [
                (k, str(v["dtype"]), _whole(v["shape"]), _whole(v["data_offsets"])) for k, v in entries.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file}: its header cannot be read ({error!r}); it is damaged") from error
        end = 0
        for tensor, dtype, shape, extent in sorted(described, key=lambda entry: entry[3]):
            if tensor in self.tensors:
                raise CheckpointError(f"{file}: {tensor} is in {self.tensors[tensor].blocks[0].file} as well; damaged")
            end = self._add(file, tensor, dtype, shape, extent, 8 + length, end)
        if 8 + length + end != size:
            raise CheckpointError(f"{file}: {size} bytes, but its header names {8 + length + end}; it is truncated")

    def _add(
        self, file: Path, name: str, dtype: str, shape: tuple[int, ...], extent: tuple[int, ...], data_at: int, end: int
    ) -> int:
        import torch

        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: {name}: is stored as {dtype}, expected one of {', '.join(_DTYPES)}; "
                "save the model unquantised in bf16, fp16 or fp32"
            )
        kind: torch.dtype = getattr(torch, _DTYPES[dtype])
        if len(extent) != 2 or extent[0] != end or extent[1] - extent[0] != math.prod(shape) * kind.itemsize:
            raise CheckpointError(f"{file}: {name}: shape {list(shape)} does not fit its bytes {list(extent)}; damaged")
        block = Block((0,) * len(shape), shape, file.name, data_at + extent[0], extent[1] - extent[0])
        self.tensors[name] = StoredTensor(shape, kind, (block,))
        return extent[1]

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
            size_bytes[name] = size_bytes.get(name, 0) + sum(block.length_bytes for block in stored.blocks)
        return sorted(size_bytes, key=lambda name: -size_bytes[name])

    def holds_as(self, other: SafetensorsReader, name: str) -> bool:
        """Whether a tensor has the same bytes in another reader, whose tensor is of the same shape and dtype."""
        (mine,), (theirs,) = (reader.tensors[name].blocks for reader in (self, other))
        for start in range(0, mine.length_bytes, _STEP_BYTES):
            count = min(_STEP_BYTES, mine.length_bytes - start)
            parts = [
                reader._files.bytes_at(Place(reader.folder / block.file, block.position_bytes + start), count)
                for reader, block in ((self, mine), (other, theirs))
            ]
            if parts[0] != parts[1]:
                return False
        return True

    def files(self) -> list[Path]:
        """The configuration, the index where there is one, and all files that hold tensors."""
        names = sorted({block.file for stored in self.tensors.values() for block in stored.blocks})
        small = [self.folder / name for name in (CONFIG, INDEX) if (self.folder / name).is_file()]
        # An index that is left over beside the single file says nothing of it.
        small = [file for file in small if file.name != INDEX or names != [SINGLE]]
        return small + [self.folder / name for name in names]


class SafetensorsLayout:
    """Lays out the files of a model folder: tensors in the order given, in shards of at most :data:`SHARD_BYTES`."""

    def __init__(self, tensors: list[tuple[str, tuple[int, ...], torch.dtype]]) -> None:
        names = {getattr(_torch(), name): code for code, name in _DTYPES.items()}
        shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
        filled = 0
        for name, shape, dtype in tensors:
            size = math.prod(shape) * dtype.itemsize
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append((name, shape, dtype))
            filled += size
        self.files: dict[str, int] = {}
        """Size of each data file in bytes."""
        self.objects: list[tuple[str, int, bytes]] = []
        """The headers: file, position, content."""
        self._slots: dict[str, Slot] = {}
        for number, shard in enumerate(shards):
            file = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(file, shard, names)
        self._shards = len(shards)

    def _lay_out(self, file: str, shard: list[tuple[str, tuple[int, ...], torch.dtype]], names: dict[Any, str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, dtype in shard:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        data_at = 8 + len(text)
        self.objects.append((file, 0, len(text).to_bytes(8, "little") + text))
        for name, _, _ in shard:
            low, high = header[name]["data_offsets"]
            self._slots[name] = Slot(file, data_at + low, high - low)
        self.files[file] = data_at + end

    def slot(self, name: str) -> Slot:
        """The place of a tensor."""
        return self._slots[name]

    def small_files(self) -> dict[str, bytes]:
        """The index, where there is more than one file."""
        if self._shards == 1:
            return {}
        total = sum(slot.length_bytes for slot in self._slots.values())
        weight_map = {name: slot.file for name, slot in sorted(self._slots.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _torch() -> Any:
    import torch

    return torch
