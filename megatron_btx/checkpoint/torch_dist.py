"""Megatron's ``torch_dist`` checkpoints: read without a model, a GPU or a process group.

The format is PyTorch's distributed checkpoint (``torch.distributed.checkpoint``): data files of concatenated
``torch.save`` records, and a pickled index, ``.metadata``, that says which record of which file holds which block of
which tensor. The numbers of a record are read where they lie, a slice at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.safe_pickle import load_pickle
from megatron_btx.checkpoint.stored import Block, Files, Place, StoredTensor, read_box, read_slice
from megatron_btx.checkpoint.torch_record import RecordedTensor, load_torch, locate_tensor
from megatron_btx.common.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata


class TorchDistReader:
    """Reads tensors, slices of tensors and objects of one iteration folder.

    Raises:
        CheckpointError: from the constructor or a read; names the file and what is wrong with it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_sizes_bytes: dict[str, int] = {}
        index_file = folder / ".metadata"
        if not index_file.is_file():
            raise CheckpointError(f"{index_file}: does not exist; the checkpoint is incomplete")
        with index_file.open("rb") as file:
            index = load_pickle(file, str(index_file))
        self.tensors: dict[str, StoredTensor] = {}
        self._objects: dict[str, list[_StorageInfo]] = {}
        """Name -> the places of its records: one, unless the index says otherwise."""
        self._files = Files()
        self._located: dict[tuple[str, int], RecordedTensor] = {}
        try:
            self._fill(index)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{index_file}: not the index of a distributed checkpoint ({error!r})") from error

    def _fill(self, index: Metadata) -> None:
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        stored: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = {}
        for key, info in index.storage_data.items():
            self._check_record(info.relative_path, info.offset, info.length)
            stored.setdefault(key.fqn, []).append((key, info))
        for name, description in index.state_dict_metadata.items():
            records = stored.get(name, [])
            if not records:
                raise CheckpointError(f"{self.folder}: {name}: is in the index and stored nowhere; incomplete")
            # By its class, as PyTorch does: an index can give one kind of entry the attributes of the other.
            if isinstance(description, BytesStorageMetadata):
                self._objects[name] = [info for _, info in records]
                continue
            blocks = self._blocks_of(name, description, records)
            stored_tensor = StoredTensor(tuple(description.size), description.properties.dtype, blocks)
            _check_tensor(name, stored_tensor)
            self.tensors[name] = stored_tensor

    def _blocks_of(
        self, name: str, description: TensorStorageMetadata, records: Sequence[tuple[MetadataIndex, _StorageInfo]]
    ) -> tuple[Block, ...]:
        """The blocks of a tensor: their sizes are in its description, their places in the records."""
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in description.chunks}
        blocks = []
        for key, info in records:
            offsets = tuple(key.offset)  # type: ignore[arg-type]  # None raises TypeError, which is caught
            blocks.append(Block(offsets, sizes[offsets], info.relative_path, info.offset, info.length))
        if len({block.offsets for block in blocks}) != len(sizes):
            raise CheckpointError(f"{self.folder}: {name}: {len(blocks)} of {len(sizes)} blocks are stored")
        return tuple(blocks)

    def _check_record(self, relative: str, position: int, length: int) -> None:
        """No record may lie outside the folder or past the end of its file."""
        if not (type(position) is type(length) is int):
            raise TypeError(f"{length!r} bytes at {position!r}")
        if os.path.isabs(relative) or ".." in Path(relative).parts:
            raise CheckpointError(f"{self.folder / '.metadata'}: names {relative!r}, outside the checkpoint; refused")
        if position < 0 or length < 0:
            raise CheckpointError(f"{self.folder / '.metadata'}: names {length} bytes at {position}; it is damaged")
        file = self.folder / relative
        if relative not in self._file_sizes_bytes:
            if not file.is_file():
                raise CheckpointError(f"{file}: does not exist; the checkpoint is incomplete")
            self._file_sizes_bytes[relative] = file.stat().st_size
        size = self._file_sizes_bytes[relative]
        if position + length > size:
            raise CheckpointError(f"{file}: {size} bytes, but the index names {position + length}; it is truncated")

    def objects(self) -> list[str]:
        """The names of the entries that are not tensors."""
        return list(self._objects)

    def read_object(self, name: str) -> Any:
        """One entry that is not a tensor, unpickled with the allow-list."""
        return self._unpickle_record(name, self._objects[name][0])

    def _unpickle_record(self, name: str, info: _StorageInfo) -> Any:
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
                digest = hashlib.sha256(self._record_of(info)).digest()
                if digest not in seen:
                    self._unpickle_record(name, info)
                    seen.add(digest)
        if self._older_common_state().is_file():
            self.common_state()

    def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """The slice of a tensor at ``offsets`` of ``sizes``, put together from the blocks that overlap it."""

        def read_block(block: Block, low: tuple[int, ...], extent: tuple[int, ...]) -> torch.Tensor:
            recorded = self._locate(name, block)
            return read_box(self._files, recorded.place, block.sizes, low, extent, recorded.dtype)

        return read_slice(name, self.tensors[name], offsets, sizes, read_block, self.folder)

    def _locate(self, name: str, block: Block) -> RecordedTensor:
        where = (block.file, block.position_bytes)
        recorded = self._located.get(where)
        if recorded is None:
            start = Place(self.folder / block.file, block.position_bytes)
            recorded = locate_tensor(self._files, start, block.length_bytes, f"{self.folder / block.file}: {name}")
            self._located[where] = recorded
        found, expected = (recorded.shape, recorded.dtype), (block.sizes, self.tensors[name].dtype)
        if found != expected:
            raise CheckpointError(
                f"{self.folder / block.file}: {name}: holds {found}, the index says {expected}; it is damaged"
            )
        return recorded

    def _record_of(self, info: _StorageInfo) -> bytes:
        return self._files.bytes_at(Place(self.folder / info.relative_path, info.offset), info.length)

    def files(self) -> list[Path]:
        """The index and all files that hold tensors."""
        names: set[str] = set()
        for stored in self.tensors.values():
            names.update(block.file for block in stored.blocks)
        return [self.folder / name for name in (".metadata", *sorted(names))]

    def arguments(self) -> dict[str, Any]:
        """Megatron's stored arguments, from ``common_state`` or from the older ``common.pt``.

        Raises:
            CheckpointError: the checkpoint has neither.
        """
        arguments = self.common_state().get("args")
        if not isinstance(arguments, argparse.Namespace):
            raise CheckpointError(f"{self.folder}: its common state holds no arguments; save it with stock Megatron")
        return dict(vars(arguments))

    def has_arguments(self) -> bool:
        """Whether there are stored arguments: programs other than Megatron's own leave them out."""
        if self._common_state_name() is None and not self._older_common_state().is_file():
            return False
        return isinstance(self.common_state().get("args"), argparse.Namespace)

    def common_state(self) -> dict[str, Any]:
        """The entry that holds arguments, iteration and scheduler: where both forms are there, Megatron's choice."""
        older = self._older_common_state()
        if older.is_file():
            with older.open("rb") as file:
                return self._checked_state(load_torch(file, str(older)), older.name)
        name = self._common_state_name()
        if name is None:
            raise CheckpointError(f"{self.folder}: has neither common_state nor common.pt, so no model configuration")
        state = self.read_object(name)
        if isinstance(state, list) and state:
            state = state[0]
        return self._checked_state(state, name)

    def _common_state_name(self) -> str | None:
        """The entry that Megatron 0.19 keeps the common state in."""
        for name in self._objects:
            if name.split("/")[0] == "common_state":
                return name
        return None

    def _older_common_state(self) -> Path:
        """Where Megatron before 0.19 keeps the common state."""
        return self.folder / "common.pt"

    def _checked_state(self, state: object, name: str) -> dict[str, Any]:
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.folder}: {name}: is a {type(state).__name__}, expected a dict; it is damaged")
        return state


def _check_tensor(name: str, stored: StoredTensor) -> None:
    """Check what the rest of the package takes for granted: sizes are whole numbers, blocks lie inside the tensor.

    Raises:
        TypeError: they are not, or do not.
    """
    import torch

    if not isinstance(stored.dtype, torch.dtype) or not isinstance(name, str):
        raise TypeError(f"{name}: {stored.dtype}")
    _check_whole(name, stored.shape)
    for block in stored.blocks:
        _check_whole(name, block.offsets)
        _check_whole(name, block.sizes)
        for offset, size, extent in zip(block.offsets, block.sizes, stored.shape, strict=True):
            if offset + size > extent:
                raise TypeError(f"{name}: a block of {block.sizes} at {block.offsets} in {stored.shape}")


def _check_whole(name: str, numbers: tuple[int, ...]) -> None:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError(f"{name}: {numbers} where whole numbers are expected")
