"""The safetensors files of a new model folder, laid out before any number is written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.safetensors import DTYPES, INDEX, SINGLE
from megatron_btx.checkpoint.stored import Slot

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9
type _Described = tuple[str, tuple[int, ...], torch.dtype]
"""The name, shape and type of a tensor that is to be written."""


class SafetensorsLayout:
    """Lays out the files of a model folder: tensors in the order given, in shards of at most :data:`SHARD_BYTES`."""

    def __init__(self, tensors: Sequence[_Described]) -> None:
        shards: list[list[_Described]] = [[]]
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

    def _lay_out(self, file: str, shard: Sequence[_Described]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape, dtype in shard:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _code_of(dtype), "shape": list(shape), "data_offsets": [end, end + size]}
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


def _code_of(dtype: torch.dtype) -> str:
    """The name of a dtype in a header."""
    for code, name in DTYPES.items():
        if str(dtype) == f"torch.{name}":
            return code
    raise KeyError(dtype)
