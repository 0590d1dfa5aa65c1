"""Megatron's ``torch_dist`` checkpoints: found, read and written without a model, a GPU or a process group.

The format is PyTorch's distributed checkpoint (``torch.distributed.checkpoint``): data files of concatenated
``torch.save`` records, and a pickled index, ``.metadata``, that says which record of which file holds which block of
which tensor. Reading maps one record at a time; writing keeps one block in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.safe_pickle import load_pickle, load_torch
from megatron_btx.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
DATA_FILE_BYTES = 4 << 30


def resolve_iteration(path: str | Path) -> Path:
    """The folder of one iteration, from a checkpoint root (its latest) or from the folder itself.

    Raises:
        CheckpointError: nothing there, no tracker, a dangling tracker, or a format that is not torch_dist.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a checkpoint's root or one of its iter_ folders")
    folder = path if (path / "metadata.json").is_file() or (path / ".metadata").is_file() else _latest(path)
    backend_file = folder / "metadata.json"
    if not backend_file.is_file():
        raise CheckpointError(
            f"{folder}: has no metadata.json, so it is not a torch_dist checkpoint; "
            "save it again with --ckpt-format torch_dist"
        )
    try:
        backend = json.loads(backend_file.read_bytes()).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{backend_file}: is not JSON as expected ({error}); the checkpoint is damaged"
        ) from error
    if backend != BACKEND["sharded_backend"]:
        raise CheckpointError(
            f"{backend_file}: format {backend!r}, expected 'torch_dist'; save it again with --ckpt-format torch_dist"
        )
    return folder


def _latest(root: Path) -> Path:
    tracker = root / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{root}: has neither {TRACKER} nor metadata.json; give a checkpoint's root or one of its iter_ folders"
        )
    latest = tracker.read_bytes()[:40].decode(errors="replace").strip()
    if latest != RELEASE and not re.fullmatch(r"[0-9]{1,18}", latest):
        raise CheckpointError(f"{tracker}: holds {latest!r}, expected an iteration number or 'release'")
    folder = root / (RELEASE if latest == RELEASE else f"iter_{int(latest):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker}: names {folder.name}, which does not exist beside it; give an iter_ folder")
    return folder


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


class TorchDistReader:
    """Reads tensors, slices of tensors and objects of one iteration folder.

    Raises:
        CheckpointError: from the constructor or a read; names the file and what is wrong with it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index_file = folder / ".metadata"
        if not index_file.is_file():
            raise CheckpointError(f"{index_file}: does not exist; the checkpoint is incomplete")
        with index_file.open("rb") as file:
            index = load_pickle(file, str(index_file))
        self.tensors: dict[str, StoredTensor] = {}
        self._objects: dict[str, Any] = {}
        self._last: tuple[Block, torch.Tensor] | None = None
        try:
            self._fill(index)
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index_file}: not the index of a distributed checkpoint ({error!r})") from error

    def _fill(self, index: Any) -> None:
        stored: dict[str, list[tuple[Any, Any]]] = {}
        for key, info in index.storage_data.items():
            self._check_record(info.relative_path, info.offset, info.length)
            stored.setdefault(key.fqn, []).append((key, info))
        for name, description in index.state_dict_metadata.items():
            records = stored.get(name, [])
            if not records:
                raise CheckpointError(f"{self.folder}: {name}: is in the index and stored nowhere; incomplete")
            if not hasattr(description, "chunks"):
                self._objects[name] = records[0][1]
                continue
            sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in description.chunks}
            blocks = [
                Block(tuple(key.offset), sizes[tuple(key.offset)], info.relative_path, info.offset, info.length)
                for key, info in records
            ]
            if len({block.offsets for block in blocks}) != len(sizes):
                raise CheckpointError(f"{self.folder}: {name}: {len(blocks)} of {len(sizes)} blocks are stored")
            dtype = description.properties.dtype
            self.tensors[name] = StoredTensor(tuple(description.size), dtype, tuple(blocks))

    def _check_record(self, relative: str, position: int, length: int) -> None:
        """No record may lie outside the folder or past the end of its file."""
        if os.path.isabs(relative) or ".." in Path(relative).parts:
            raise CheckpointError(f"{self.folder / '.metadata'}: names {relative!r}, outside the checkpoint; refused")
        if position < 0 or length < 0:
            raise CheckpointError(f"{self.folder / '.metadata'}: names {length} bytes at {position}; it is damaged")
        sizes: dict[str, int] = self.__dict__.setdefault("_file_sizes", {})
        if relative not in sizes:
            file = self.folder / relative
            if not file.is_file():
                raise CheckpointError(f"{file}: does not exist; the checkpoint is incomplete")
            sizes[relative] = file.stat().st_size
        if position + length > sizes[relative]:
            raise CheckpointError(
                f"{self.folder / relative}: {sizes[relative]} bytes, but the index names {position + length}; "
                "it is truncated"
            )

    def objects(self) -> list[str]:
        """The names of the entries that are not tensors."""
        return list(self._objects)

    def read_object(self, name: str) -> Any:
        """One entry that is not a tensor, unpickled with the allow-list."""
        info = self._objects[name]
        return load_torch(
            io.BytesIO(self._record(info.relative_path, info.offset, info.length)), f"{self.folder}: {name}"
        )

    def read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        """The slice of a tensor at ``offsets`` of ``sizes``, put together from the blocks that overlap it."""
        import torch

        stored = self.tensors[name]
        result = torch.empty(sizes, dtype=stored.dtype)
        filled = 0
        for block in stored.blocks:
            low = [max(o, b) for o, b in zip(offsets, block.offsets, strict=True)]
            high = [min(o + s, b + c) for o, s, b, c in zip(offsets, sizes, block.offsets, block.sizes, strict=True)]
            if any(lo >= hi for lo, hi in zip(low, high, strict=True)):
                continue
            there = tuple(slice(lo - o, hi - o) for lo, hi, o in zip(low, high, offsets, strict=True))
            here = tuple(slice(lo - b, hi - b) for lo, hi, b in zip(low, high, block.offsets, strict=True))
            part = self._load(name, block)[here]
            result[there] = part
            filled += part.numel()
        if filled != result.numel():
            raise CheckpointError(f"{self.folder}: {name}: {filled} of {result.numel()} elements are stored")
        return result

    def _load(self, name: str, block: Block) -> torch.Tensor:
        if self._last is None or self._last[0] != block:
            record = self._record(block.file, block.position_bytes, block.length_bytes)
            tensor = load_torch(io.BytesIO(record), f"{self.folder / block.file}: {name}")
            # Anything can be in the record: what is no tensor has neither a shape nor a dtype.
            found = (tuple(getattr(tensor, "shape", ())), getattr(tensor, "dtype", type(tensor)))
            expected = (block.sizes, self.tensors[name].dtype)
            if found != expected:
                raise CheckpointError(
                    f"{self.folder / block.file}: {name}: holds {found}, the index says {expected}; it is damaged"
                )
            self._last = (block, tensor)
        return self._last[1]

    def _record(self, relative: str, position: int, length: int) -> bytes:
        with (self.folder / relative).open("rb") as file:
            file.seek(position)
            return file.read(length)

    def arguments(self) -> dict[str, Any]:
        """Megatron's stored arguments, from ``common_state`` or from the older ``common.pt``.

        Raises:
            CheckpointError: the checkpoint has neither.
        """
        arguments = self.common_state().get("args")
        if not isinstance(arguments, argparse.Namespace):
            raise CheckpointError(f"{self.folder}: its common state holds no arguments; save it with stock Megatron")
        return dict(vars(arguments))

    def common_state(self) -> dict[str, Any]:
        """The entry that holds arguments, iteration and scheduler."""
        for name in self._objects:
            if name.split("/")[0] == "common_state":
                state = self.read_object(name)
                return self._checked_state(state[0] if isinstance(state, list) and state else state, name)
        older = self.folder / "common.pt"
        if older.is_file():
            with older.open("rb") as file:
                return self._checked_state(load_torch(file, str(older)), older.name)
        raise CheckpointError(f"{self.folder}: has neither common_state nor common.pt, so no model configuration")

    def _checked_state(self, state: Any, name: str) -> dict[str, Any]:
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.folder}: {name}: is a {type(state).__name__}, expected a dict; it is damaged")
        return state


class TorchDistWriter:
    """Writes one iteration folder block by block; nothing loads until :meth:`close` has written the index."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._storage: dict[Any, Any] = {}
        self._entries: dict[str, Any] = {}
        self._file: Any = None
        self._file_number = -1

    def write_block(self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], block: torch.Tensor) -> None:
        """Append one block of the tensor ``name``, whose global shape is ``shape``."""
        import torch
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        entry = self._entries.setdefault(
            name, TensorStorageMetadata(TensorProperties(dtype=block.dtype), torch.Size(shape), [])
        )
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(block.shape))
        self._append(MetadataIndex(name, chunk.offsets, len(entry.chunks)), block.contiguous())
        entry.chunks.append(chunk)

    def write_object(self, name: str, value: Any) -> None:
        """Append an entry that is not a tensor."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        self._entries[name] = BytesStorageMetadata()
        self._append(MetadataIndex(name), value)

    def _append(self, key: Any, value: Any) -> None:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        if self._file is None or self._file.tell() > DATA_FILE_BYTES:
            self._close_file()
            self._file_number += 1
            self._file = (self.folder / f"__0_{self._file_number}.distcp").open("wb")
        start = self._file.tell()
        record = io.BytesIO()
        torch.save(value, record)
        self._file.write(record.getbuffer())
        self._storage[key] = _StorageInfo(Path(self._file.name).name, start, self._file.tell() - start)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Flush the data, then write the index and the format file."""
        from torch.distributed.checkpoint.metadata import Metadata

        self._close_file()
        index = Metadata(self._entries, storage_data=self._storage)
        write_flushed(self.folder / "metadata.json", json.dumps(BACKEND).encode())
        write_flushed(self.folder / ".metadata", pickle.dumps(index))


def write_flushed(file: Path, content: bytes) -> None:
    """Write a small file and wait until it is on disk."""
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def blocks_of(
    shape: tuple[int, ...], element_bytes: int, leading_axes: int, at_most_bytes: int = 128 << 20
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a tensor into blocks to hold in memory one at a time: (offsets, sizes) of each.

    The first ``leading_axes`` axes (layers, experts) are cut to one, as Megatron's own checkpoints have them; what is
    still larger than ``at_most_bytes`` is cut along the next axis.
    """
    import itertools
    import math

    rest = shape[leading_axes:]
    rows = rest[0] if rest else 1
    row_bytes = max(1, element_bytes * math.prod(rest[1:]))
    step = max(1, min(rows, at_most_bytes // row_bytes))
    for lead in itertools.product(*(range(n) for n in shape[:leading_axes])):
        ones = (1,) * leading_axes
        if not rest:
            yield lead, ones
            continue
        for row in range(0, rows, step):
            yield (*lead, row, *(0,) * (len(rest) - 1)), (*ones, min(step, rows - row), *rest[1:])
