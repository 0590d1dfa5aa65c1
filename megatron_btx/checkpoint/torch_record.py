"""One ``torch.save`` record: where its numbers lie, and the objects that it holds.

A record is a zip archive of uncompressed members (PyTorch's documented serialization format). Knowing where the numbers
lie lets them be read at their place, in any order and by several processes, without a copy in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import tempfile
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_btx.checkpoint.safe_pickle import UNREADABLE, AllowListUnpickler, first_line, load_with
from megatron_btx.checkpoint.stored import Files, Place
from megatron_btx.common.errors import CheckpointError

if TYPE_CHECKING:
    import torch


type _StorageId = tuple[str, torch.dtype, str, str, int]
"""What a pickle says of a storage: the word "storage", its dtype, its key, its device, and how many numbers it has."""
_DESCRIPTION_AT_MOST_BYTES = 1 << 20
_DESCRIPTOR_AT_MOST_BYTES = 24
"""Sizes and a checksum, which writers that stream put after a member."""
_STORAGE_DTYPES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


@dataclasses.dataclass(frozen=True)
class RecordedTensor:
    """The tensor of a record: its place and form."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, files: Files, start: Place, length: int) -> None:
        super().__init__()
        self._files, self._start, self._length, self._at = files, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        if size < 0 or size > left:
            size = left
        content = self._files.bytes_at(Place(self._start.file, self._start.position_bytes + self._at), size)
        self._at += size
        return content


class _Record(zipfile.ZipFile):
    """The archive of a record; ``members`` are named without the folder that all of them lie in."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.members = {info.filename.partition("/")[2]: info for info in self.infolist()}
        if len(self.members) < len(self.infolist()):
            raise ValueError("two members have one name")

    def begin_of(self, name: str) -> int:
        """Where a member's bytes begin: told by its own header, which the archive's directory must agree with."""
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        assert self.fp is not None
        self.fp.seek(member.header_offset)
        header = self.fp.read(30)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        begin = member.header_offset + 30 + name_length + extra_length
        starts = [info.header_offset for info in self.infolist()] + [self.start_dir]
        gap = min(start for start in starts if start > member.header_offset) - begin - member.file_size
        named = self.fp.read(name_length) == member.orig_filename.encode()
        if header[:4] != b"PK\3\4" or not named or not 0 <= gap <= _DESCRIPTOR_AT_MOST_BYTES:
            raise ValueError(f"the header of {member.filename} and the archive's directory differ")
        return begin

    def content(self, name: str) -> bytes:
        """A member's bytes, whatever its checksum: PyTorch can be told to write none, and does not look at it."""
        begin, size = self.begin_of(name), self.members[name].file_size
        assert self.fp is not None
        self.fp.seek(begin)
        found = self.fp.read(size)
        if len(found) < size:
            raise EOFError(f"{name} ends early")
        return found


class _RecordUnpickler(AllowListUnpickler):
    """Knows PyTorch's names of tensors and storages, and describes both without reading a number."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of PyTorch's; for any other what the allow-list says."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.make_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            import torch

            return getattr(torch, _STORAGE_DTYPES[name])
        return super().find_class(module, name)

    def make_tensor(self, storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Any:
        """What stands for a tensor."""
        return storage, offset, tuple(size), tuple(stride)

    def persistent_load(self, pid: _StorageId) -> Any:
        """What stands for a storage: its dtype, key and count."""
        _, dtype, key, _, count = pid
        return dtype, key, count


def locate_tensor(files: Files, start: Place, length: int, where: str) -> RecordedTensor:
    """Find the numbers of a record.

    Raises:
        CheckpointError: no record, damaged, or not one contiguous tensor.
    """
    damaged = f"{where}: is not a tensor's record"
    try:
        record = _Record(_Window(files, start, length))  # type: ignore[arg-type]
        description = record.members["data.pkl"]
        if description.compress_type != zipfile.ZIP_STORED or description.file_size > _DESCRIPTION_AT_MOST_BYTES:
            raise ValueError(f"a description of {description.file_size} bytes")
        content = load_with(_RecordUnpickler(io.BytesIO(record.read(description))), where)
        (dtype, key, count), offset, shape, stride = content
        if not all(type(n) is int and n >= 0 for n in (count, offset, *shape, *stride)) or len(shape) != len(stride):
            raise ValueError(f"shape {shape}, strides {stride}, offset {offset} of {count}")
        begin = record.begin_of(f"data/{key}") + offset * dtype.itemsize
        held_bytes = record.members[f"data/{key}"].file_size
    except (zipfile.BadZipFile, struct.error, *UNREADABLE) as error:
        raise CheckpointError(f"{damaged} ({type(error).__name__}: {str(error)[:80]}); it is damaged") from error
    if not _is_contiguous(shape, stride):
        raise CheckpointError(f"{damaged} of contiguous numbers; save the checkpoint again")
    size = math.prod(shape)
    if offset + size > count or begin + size * dtype.itemsize > length or held_bytes < count * dtype.itemsize:
        raise CheckpointError(f"{damaged}: {size} numbers do not lie inside it; it is damaged")
    return RecordedTensor(Place(start.file, start.position_bytes + begin), shape, dtype)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the numbers of a tensor follow each other; the stride of an axis of one number means nothing."""
    if math.prod(shape) == 0:
        return True
    expected = 1
    for extent, step in zip(reversed(shape), reversed(stride), strict=True):
        if extent != 1 and step != expected:
            return False
        expected *= extent
    return True


class _ObjectUnpickler(_RecordUnpickler):
    """Unpickles any object of a record; its tensors are views of the record's other members."""

    def __init__(self, record: _Record) -> None:
        self._record = record
        self._storages: dict[str, torch.Tensor] = {}  # by key: two tensors may share one
        if "byteorder" in record.members and record.content("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        super().__init__(io.BytesIO(record.content("data.pkl")))

    def make_tensor(
        self, storage: torch.Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object
    ) -> torch.Tensor:
        """A tensor that is a view of a storage; PyTorch refuses what would lie outside it."""
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def persistent_load(self, pid: _StorageId) -> torch.Tensor:
        """The numbers of a storage, read once; ValueError where their bytes do not fit their count."""
        import torch

        _, dtype, key, _, count = pid
        if key not in self._storages:
            content = bytearray(self._record.content(f"data/{key}"))
            if len(content) != count * dtype.itemsize:
                raise ValueError(f"{len(content)} bytes for {count} numbers of {dtype}")
            numbers = torch.empty(0, dtype=dtype)
            if content:
                numbers = torch.frombuffer(content, dtype=dtype)
            self._storages[key] = numbers
        return self._storages[key]


def load_torch(file: BinaryIO, where: str) -> Any:
    """What ``torch.save`` wrote, on the CPU and with the allow-list: byte entries of a checkpoint, and ``common.pt``.

    Not ``torch.load``: its own restricted form would need Megatron's classes, and the other can be switched off for a
    whole process, as the training programs do.

    Raises:
        CheckpointError: as :func:`megatron_btx.checkpoint.safe_pickle.load_pickle`.
    """
    try:
        return load_with(_ObjectUnpickler(_Record(file)), where)
    except (zipfile.BadZipFile, OSError, struct.error, *UNREADABLE) as error:
        raise CheckpointError(f"{where}: cannot be read ({first_line(error)}); it is truncated or damaged") from error


@functools.lru_cache(maxsize=4096)
def record_frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the numbers of a contiguous tensor, which are a hole in a file here.

    The checksums of the archive are those of skipped data; PyTorch does not look at them.
    """
    import torch
    from torch.serialization import skip_data

    # In memory while that is little: the folder of temporary files may be full where that of the result is not.
    is_small = math.prod(shape) * dtype.itemsize < 64 << 20
    with io.BytesIO() if is_small else tempfile.TemporaryFile() as out:
        with skip_data():
            torch.save(torch.empty(shape, dtype=dtype), out)
        begin = _Record(out).begin_of("data/0")
        out.seek(0)
        before = out.read(begin)
        out.seek(begin + math.prod(shape) * dtype.itemsize)
        return before, out.read()
