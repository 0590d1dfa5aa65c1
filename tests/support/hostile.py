"""Checkpoints that try to run code: a payload in place of one of their entries, under PyTorch's own index."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex


class Call:
    """Pickles to a call of a function, which unpickling it makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def payload(folder: Path) -> Call:
    """Leaves the file ``ran`` in a folder when it is unpickled."""
    return Call(os.mkdir, str(folder / "ran"))


def read_index(folder: Path) -> Any:
    """PyTorch's index of an iteration folder."""
    return pickle.loads((folder / ".metadata").read_bytes())


def byte_entries(folder: Path) -> list[str]:
    """The entries that are not tensors."""
    entries = read_index(folder).state_dict_metadata.items()
    return [name for name, kind in entries if isinstance(kind, BytesStorageMetadata)]


def plant(folder: Path, key: str, value: Any) -> str:
    """Put ``value`` in place of the first byte entry whose name holds ``key``, or beside all; returns its name."""
    index = read_index(folder)
    name = next((name for name in byte_entries(folder) if key in name), f"{key}/shard_0_1")
    index.state_dict_metadata.setdefault(name, BytesStorageMetadata())
    place = index.storage_data.setdefault(MetadataIndex(name), next(iter(index.storage_data.values())))
    place = type(place)(place.relative_path, place.offset, place.length)
    index.storage_data[MetadataIndex(name)] = place
    torch.save(value, record := io.BytesIO())
    with (folder / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), len(record.getvalue())
        file.write(record.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return name
