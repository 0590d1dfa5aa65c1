"""Megatron's ``torch_dist`` checkpoints: read, and laid out anew, without a model, a GPU or a process group.

The format is PyTorch's distributed checkpoint (``torch.distributed.checkpoint``): data files of concatenated
``torch.save`` records, and a pickled index, ``.metadata``, that says which record of which file holds which block of
which tensor. The numbers of a record are read where they lie, a slice at a time.
"""

from __future__ import annotations

import argparse
import copyreg
import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.iterations import BACKEND, BACKEND_FILE
from megatron_btx.checkpoint.safe_pickle import OLD_VALUES, load_pickle
from megatron_btx.checkpoint.stored import Block, Place, Reader, Slot, StoredTensor, check_whole
from megatron_btx.checkpoint.torch_record import load_torch, locate_tensor, record_frame
from megatron_btx.common.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

DATA_FILE_BYTES = 4 << 30
_OLDER_COMMON_STATE = "common.pt"
"""Where Megatron before 0.19 keeps arguments, iteration and scheduler."""


class TorchDistReader(Reader):
    """Reads tensors, slices of tensors and objects of one iteration folder.

    Raises:
        CheckpointError: from the constructor or a read; names the file and what is wrong with it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file_sizes_bytes: dict[str, int] = {}
        index_file = folder / ".metadata"
        if not index_file.is_file():
            raise CheckpointError(f"{index_file}: does not exist; the checkpoint is incomplete")
        with index_file.open("rb") as file:
            index = load_pickle(file, str(index_file))
        self._objects: dict[str, list[_StorageInfo]] = {}
        """Name -> the places of its records: one, unless the index says otherwise."""
        self._located: dict[tuple[str, int], tuple[Place, torch.Tensor]] = {}
        try:
            self._fill(index)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index_file}: not the index of a distributed checkpoint ({error!r})") from error

    def _fill(self, index: metadata.Metadata) -> None:
        from torch.distributed.checkpoint import metadata

        stored: dict[str, list[tuple[metadata.MetadataIndex, _StorageInfo]]] = {}
        for key, info in index.storage_data.items():
            self._check_record(info.relative_path, info.offset, info.length)
            stored.setdefault(key.fqn, []).append((key, info))
        for name, description in index.state_dict_metadata.items():
            records = stored.get(name, [])
            if not records:
                raise CheckpointError(f"{self.folder}: {name}: is in the index and stored nowhere; incomplete")
            # By its class, as PyTorch does: an index can give one kind of entry the attributes of the other.
            if isinstance(description, metadata.BytesStorageMetadata):
                self._objects[name] = [info for _, info in records]
                continue
            self.tensors[name] = self._tensor_of(name, description, records)

    def _tensor_of(
        self,
        name: str,
        description: metadata.TensorStorageMetadata,
        records: Sequence[tuple[metadata.MetadataIndex, _StorageInfo]],
    ) -> StoredTensor:
        """A tensor: the sizes of its blocks are in its description, their places in the records."""
        import torch

        dtype, shape = description.properties.dtype, check_whole(description.size)
        if not isinstance(dtype, torch.dtype) or not isinstance(name, str):
            raise TypeError(f"{name}: {dtype}")
        sizes = {check_whole(chunk.offsets): check_whole(chunk.sizes) for chunk in description.chunks}
        blocks = []
        for key, info in records:
            offsets = tuple(key.offset)  # type: ignore[arg-type]  # None raises TypeError, which is caught
            blocks.append(Block(offsets, sizes[offsets], info.relative_path, info.offset, info.length))
            for offset, size, extent in zip(offsets, sizes[offsets], shape, strict=True):
                if offset + size > extent:
                    raise ValueError(f"{name}: a block of {sizes[offsets]} at {offsets} in {shape}")
        if len({block.offsets for block in blocks}) != len(sizes):
            raise CheckpointError(f"{self.folder}: {name}: {len(blocks)} of {len(sizes)} blocks are stored")
        return StoredTensor(shape, dtype, tuple(blocks))

    def _check_record(self, relative: str, position: int, length: int) -> None:
        """No record may lie outside the folder or past the end of its file."""
        check_whole((position, length))
        if os.path.isabs(relative) or ".." in Path(relative).parts:
            raise CheckpointError(f"{self.folder / '.metadata'}: names {relative!r}, outside the checkpoint; refused")
        file = self.folder / relative
        if relative not in self._file_sizes_bytes:
            if not file.is_file():
                raise CheckpointError(f"{file}: does not exist; the checkpoint is incomplete")
            self._file_sizes_bytes[relative] = file.stat().st_size
        size = self._file_sizes_bytes[relative]
        if position + length > size:
            raise CheckpointError(f"{file}: {size} bytes, but the index names {position + length}; it is truncated")

    def read_object(self, name: str) -> Any:
        """One entry that is not a tensor, unpickled with the allow-list."""
        info = self._objects[name][0]
        return load_torch(io.BytesIO(self._record_of(info)), f"{self.folder / info.relative_path}: {name}")

    def check_objects(self) -> None:
        """Unpickle everything that is not a tensor with the allow-list: what Megatron would unpickle without one.

        Tensors are not read. The extra states of a large model are thousands, and all alike: equal bytes are looked at
        once.

        Raises:
            CheckpointError: names the entry and what it wants to load.
        """
        seen: set[bytes] = set()
        for name, records in self._objects.items():
            for info in records:
                record = self._record_of(info)
                digest = hashlib.sha256(record).digest()
                if digest not in seen:
                    load_torch(io.BytesIO(record), f"{self.folder / info.relative_path}: {name}")
                    seen.add(digest)
        if (self.folder / _OLDER_COMMON_STATE).is_file():
            self.common_state()

    def place_of(self, name: str, block: Block) -> Place:
        """Where the numbers of a block begin inside its record."""
        file, key = self.folder / block.file, (block.file, block.position_bytes)
        if key not in self._located:
            start = Place(file, block.position_bytes)
            self._located[key] = locate_tensor(self._files, start, block.length_bytes, f"{file}: {name}")
        place, tensor = self._located[key]
        found, expected = (tuple(tensor.shape), tensor.dtype), (block.sizes, self.tensors[name].dtype)
        if found != expected:
            raise CheckpointError(f"{file}: {name}: holds {found}, the index says {expected}; it is damaged")
        return place

    def _record_of(self, info: _StorageInfo) -> bytes:
        return self._files.bytes_at(Place(self.folder / info.relative_path, info.offset), info.length)

    def files(self) -> list[Path]:
        """The index and all files that hold tensors."""
        names: set[str] = set()
        for stored in self.tensors.values():
            names.update(block.file for block in stored.blocks)
        return [self.folder / name for name in (".metadata", *sorted(names))]

    def arguments(self) -> dict[str, Any]:
        """Megatron's stored arguments.

        Raises:
            CheckpointError: the checkpoint has none.
        """
        arguments = self.common_state().get("args")
        if not isinstance(arguments, argparse.Namespace):
            raise CheckpointError(
                f"{self.folder}: neither common_state nor common.pt holds arguments, so it has no model configuration; "
                "save it with stock Megatron"
            )
        return dict(vars(arguments))

    def has_arguments(self) -> bool:
        """Whether there are stored arguments: programs other than Megatron's own leave them out."""
        return isinstance(self.common_state().get("args"), argparse.Namespace)

    def common_state(self) -> dict[str, Any]:
        """Arguments, iteration and scheduler, from ``common.pt`` or from the entry of 0.19; empty without either."""
        older = self.folder / _OLDER_COMMON_STATE
        state: Any = {}
        entries = [name for name in self._objects if name.split("/")[0] == "common_state"]
        if older.is_file():  # where both are there, Megatron reads this one
            with older.open("rb") as file:
                state = load_torch(file, str(older))
        elif entries:
            state = self.read_object(entries[0])
            if isinstance(state, list) and state:
                state = state[0]
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.folder}: common_state is a {type(state).__name__}, expected a dict; damaged")
        return state


class TorchDistLayout:
    """Lays out the data files of a new iteration folder and makes its index; the numbers are written by others."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        """Size of each data file in bytes."""
        self.objects: list[tuple[str, int, bytes]] = []
        """Records that are complete: file, position, content."""
        self._storage: dict[metadata.MetadataIndex, _StorageInfo] = {}
        self._entries: dict[str, metadata.BytesStorageMetadata | metadata.TensorStorageMetadata] = {}

    def add_block(
        self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> Slot:
        """Reserve the place of one block of the tensor ``name``, whose global shape is ``shape``."""
        import torch
        from torch.distributed.checkpoint import metadata

        entry = self._entries.get(name)
        if not isinstance(entry, metadata.TensorStorageMetadata):
            properties = metadata.TensorProperties(dtype=dtype)
            entry = self._entries[name] = metadata.TensorStorageMetadata(properties, torch.Size(shape), [])
        chunk = metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        before, after = record_frame(tuple(sizes), dtype)
        length = math.prod(sizes) * dtype.itemsize
        key = metadata.MetadataIndex(name, chunk.offsets, len(entry.chunks))
        file, start = self._reserve(key, len(before) + length + len(after))
        entry.chunks.append(chunk)
        return Slot(file, start + len(before), length, before, after)

    def add_object(self, name: str, value: object) -> None:
        """Add an entry that is not a tensor."""
        import torch
        from torch.distributed.checkpoint import metadata

        record = io.BytesIO()
        torch.save(value, record)
        self._entries[name] = metadata.BytesStorageMetadata()
        file, start = self._reserve(metadata.MetadataIndex(name), len(record.getvalue()))
        self.objects.append((file, start, record.getvalue()))

    def _reserve(self, key: metadata.MetadataIndex, length: int) -> tuple[str, int]:
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
        from torch.distributed.checkpoint.metadata import Metadata, TensorProperties

        def reduce_properties(value: TensorProperties) -> Any:
            """In the form that PyTorch before 2.15 reads, too."""
            return copyreg.__newobj__, (TensorProperties,), value.__getstate__()[:OLD_VALUES]  # type: ignore[attr-defined]

        index = io.BytesIO()
        pickler = pickle.Pickler(index)
        pickler.dispatch_table = copyreg.dispatch_table | {TensorProperties: reduce_properties}
        pickler.dump(Metadata(self._entries, storage_data=self._storage))
        return {BACKEND_FILE: json.dumps(BACKEND).encode(), ".metadata": index.getvalue()}
