"""Hugging Face model folders: safetensors files, one or many with an index, read at positions, and laid out anew.

The format is a JSON header of names, dtypes, shapes and offsets, followed by the numbers. Reading it needs no library
and runs no code; knowing the positions lets slices be read and written in any order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.stored import Block, Place, Reader, Slot, StoredTensor, check_whole
from megatron_btx.common.errors import CheckpointError
from megatron_btx.common.files import parse_json, read_json_object

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_STEP_BYTES = 4 << 20
"""Two copies of a tensor are compared this many bytes at a time."""
type _Form = tuple[str, tuple[int, ...], torch.dtype]
"""The name, shape and type of a tensor that is to be written."""
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


class SafetensorsReader(Reader):
    """Reads tensors and slices of one model folder.

    Raises:
        CheckpointError: from the constructor or a read; names the file and what is wrong with it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        single, index = folder / SINGLE, folder / INDEX
        self._weight_map: dict[str, str] = {}
        """The index: from the name of each tensor to its file; empty where one file holds all."""
        if os.path.lexists(index):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise CheckpointError(f"{index}: has no weight_map of names to files; it is damaged")
            self._weight_map = weight_map
        if not single.is_file():
            if os.path.lexists(index):
                self._open_shards(index)
                return
            found = f"has neither {SINGLE} nor {INDEX}"
            if os.path.lexists(single):
                found = f"{SINGLE} is no file, or a link to none"
            raise CheckpointError(f"{folder}: {found}; the model folder is incomplete")
        if any((folder / Path(name).name).is_file() for name in {*self._weight_map.values()} - {SINGLE}):
            raise CheckpointError(
                f"{folder}: holds two sets of weights: {single}, which transformers reads, and {INDEX} with its "
                "shards; remove the one that is left over from another save"
            )
        self._weight_map = {}  # transformers (4.57 and 5) reads the single file
        self._open_file(SINGLE)

    def _open_shards(self, index: Path) -> None:
        names = sorted(set(self._weight_map.values()))
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
        held = {tensor: stored.blocks[0].file for tensor, stored in self.tensors.items()}
        for tensor, file in self._weight_map.items():
            if held.get(tensor) != file:
                found = f"{held.get(tensor, 'none of its files')} does"
                raise CheckpointError(
                    f"{index}: {tensor} is said to be in {file}, which does not hold it ({found}); it is damaged"
                )
        for tensor, file in held.items():
            if tensor not in self._weight_map:
                raise CheckpointError(f"{index}: does not name {tensor}, which {file} holds")

    def _open_file(self, name: str) -> None:
        import torch

        file = self.folder / name
        size = file.stat().st_size
        length = int.from_bytes(self._files.bytes_at(Place(file, 0), min(8, size)), "little")
        if length > size - 8:
            raise CheckpointError(
                f"{file}: {size} bytes, but its header says it is {length} long; truncated or damaged"
            )
        try:
            header = parse_json(self._files.bytes_at(Place(file, 8), length))
            header.pop("__metadata__", None)
            entries = []
            for tensor, entry in header.items():
                extent, shape = check_whole(entry["data_offsets"]), check_whole(entry["shape"])
                entries.append((extent, tensor, shape, str(entry["dtype"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: its header cannot be read ({error!r}); it is damaged") from error
        data_at = 8 + length
        end = 0
        for extent, tensor, shape, code in sorted(entries):
            if code not in DTYPES:
                raise CheckpointError(
                    f"{file}: {tensor}: is stored as {code}, expected one of {', '.join(DTYPES)}; "
                    "save the model unquantised in bf16, fp16 or fp32"
                )
            dtype: torch.dtype = getattr(torch, DTYPES[code])
            length_bytes = math.prod(shape) * dtype.itemsize
            if extent != (end, end + length_bytes):
                raise CheckpointError(
                    f"{file}: {tensor}: shape {list(shape)} does not fit its bytes {list(extent)}; damaged"
                )
            block = Block((0,) * len(shape), shape, name, data_at + end, length_bytes)
            mine = StoredTensor(shape, dtype, (block,))
            before = self.tensors.get(tensor)
            self.tensors[tensor] = mine if before is None else self._choose_copy(tensor, mine, before)
            end += length_bytes
        if data_at + end != size:
            raise CheckpointError(f"{file}: {size} bytes, but its header names {data_at + end}; it is truncated")

    def _choose_copy(self, name: str, mine: StoredTensor, other: StoredTensor) -> StoredTensor:
        """Of a tensor that two shards hold with the same bytes, which transformers loads, that of the index."""
        (block,), (known,) = mine.blocks, other.blocks
        is_same = (mine.shape, mine.dtype) == (other.shape, other.dtype)
        for start in range(0, block.length_bytes if is_same else 0, _STEP_BYTES):
            count = min(_STEP_BYTES, block.length_bytes - start)
            places = [Place(self.folder / one.file, one.position_bytes + start) for one in (block, known)]
            is_same = is_same and self._files.bytes_at(places[0], count) == self._files.bytes_at(places[1], count)
        if not is_same:
            where = self.folder / block.file
            raise CheckpointError(f"{where}: {name} is in {known.file} as well, with other numbers; damaged")
        return other if self._weight_map.get(name) == known.file else mine

    def dtypes(self) -> list[str]:
        """The names of the tensors' types, that with the most bytes first."""
        size_bytes: dict[str, int] = {}
        for stored in self.tensors.values():
            name = str(stored.dtype).removeprefix("torch.")
            size_bytes[name] = size_bytes.get(name, 0) + stored.blocks[0].length_bytes
        return sorted(size_bytes, key=lambda name: -size_bytes[name])

    def files(self) -> list[Path]:
        """The configuration, the index where there is one, and all files that hold tensors."""
        names = sorted({stored.blocks[0].file for stored in self.tensors.values()})
        if self._weight_map:
            names.insert(0, INDEX)
        if (self.folder / CONFIG).is_file():
            names.insert(0, CONFIG)
        return [self.folder / name for name in names]


class SafetensorsLayout:
    """Lays out the files of a new model folder before any number is written.

    Tensors (name, shape, type) come in the order given, in shards of at most :data:`SHARD_BYTES`.
    """

    def __init__(self, tensors: Sequence[_Form]) -> None:
        shards: list[list[_Form]] = [[]]
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
        self._shards = len(shards)
        for number, shard in enumerate(shards, start=1):
            file = SINGLE
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(file, shard)

    def _lay_out(self, file: str, shard: Sequence[_Form]) -> None:
        import torch

        codes = {getattr(torch, name): code for code, name in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, dtype in shard:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
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
