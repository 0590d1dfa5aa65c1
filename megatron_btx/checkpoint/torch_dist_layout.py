"""The data files and the index of a new ``torch_dist`` checkpoint, laid out before any number is written."""

from __future__ import annotations

import copyreg
import functools
import io
import json
import math
import pickle
from collections.abc import Buffer
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.iterations import BACKEND, BACKEND_FILE
from megatron_btx.checkpoint.safe_pickle import old_state
from megatron_btx.checkpoint.stored import Slot

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

DATA_FILE_BYTES = 4 << 30


class TorchDistLayout:
    """Lays out the data files of an iteration folder and makes its index; the numbers are written by others."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        """Size of each data file in bytes."""
        self.objects: list[tuple[str, int, bytes]] = []
        """Records that are complete: file, position, content."""
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._entries: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}

    def add_block(
        self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Slot:
        """Reserve the place of one block of the tensor ``name``, whose global shape is ``shape``."""
        import torch
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        entry = self._entries.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            entry = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            self._entries[name] = entry
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        before, after = record_frame(tuple(sizes), dtype)
        length = math.prod(sizes) * dtype.itemsize
        file, start = self._reserve(
            MetadataIndex(name, chunk.offsets, len(entry.chunks)), len(before) + length + len(after)
        )
        entry.chunks.append(chunk)
        return Slot(file, start + len(before), length, before, after)

    def add_object(self, name: str, value: object) -> None:
        """Add an entry that is not a tensor."""
        import torch
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        record = io.BytesIO()
        torch.save(value, record)
        self._entries[name] = BytesStorageMetadata()
        file, start = self._reserve(MetadataIndex(name), len(record.getvalue()))
        self.objects.append((file, start, record.getvalue()))

    def _reserve(self, key: MetadataIndex, length: int) -> tuple[str, int]:
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        name = f"__0_{max(0, len(self.files) - 1)}.distcp"
        if self.files.get(name, 0) > DATA_FILE_BYTES:
            name = f"__0_{len(self.files)}.distcp"
        # Numbers lie at multiples of 64 bytes in their record, and so in the file.
        start = -(-self.files.get(name, 0) // 64) * 64
        self.files[name] = start + length
        self._storage[key] = _StorageInfo(name, start, length)
        return name, start

    def small_files(self) -> dict[str, bytes]:
        """The format file and the index; without them nothing loads."""
        from torch.distributed.checkpoint.metadata import Metadata

        index = io.BytesIO()
        _IndexPickler(index).dump(Metadata(self._entries, storage_data=self._storage))
        return {BACKEND_FILE: json.dumps(BACKEND).encode(), ".metadata": index.getvalue()}


class _IndexPickler(pickle.Pickler):
    """Pickles an index in the form that PyTorch before 2.15 reads, too."""

    def reducer_override(self, value: object) -> Any:
        from torch.distributed.checkpoint.metadata import TensorProperties

        if isinstance(value, TensorProperties):
            return copyreg.__newobj__, (TensorProperties,), old_state(value)  # type: ignore[attr-defined]
        return NotImplemented


class _Skeleton(io.RawIOBase):
    """Takes what ``torch.save`` writes and leaves out what it skips."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[int, bytes]] = []
        self._at = 0

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._at
        self._at = offset
        return self._at

    def write(self, content: Buffer) -> int:
        written = bytes(content)
        self.parts.append((self._at, written))
        self._at += len(written)
        return len(written)


@functools.lru_cache(maxsize=4096)
def record_frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the numbers of a contiguous tensor, made without the numbers.

    The checksums of the archive are those of skipped data; PyTorch does not look at them.
    """
    import torch
    from torch.serialization import skip_data

    out = _Skeleton()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), out)  # type: ignore[arg-type]  # it needs what is there alone
    size = math.prod(shape) * dtype.itemsize
    before, after, at = bytearray(), bytearray(), 0
    numbers_passed = False
    for position, content in out.parts:
        if size > 0 and position == at + size:
            numbers_passed = True
        if numbers_passed:
            after += content
        else:
            before += content
        at = position + len(content)
    return bytes(before), bytes(after)
