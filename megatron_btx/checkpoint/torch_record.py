"""One ``torch.save`` record: where its numbers lie, and the objects that it holds.

A record is a zip archive of uncompressed members (PyTorch's documented serialization format). Knowing where the numbers
lie lets them be read at their place, in any order and by several processes, without a copy in memory.
"""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from collections.abc import Buffer
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_btx.checkpoint.safe_pickle import UNREADABLE, AllowListUnpickler, first_line
from megatron_btx.checkpoint.stored import Files, Place
from megatron_btx.common.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_UNREADABLE = (zipfile.BadZipFile, OSError, struct.error, *UNREADABLE)
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


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, files: Files, start: Place, length: int) -> None:
        super().__init__()
        self._files, self._start, self._length, self._at = files, start, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        self._files.read_into(Place(self._start.file, self._start.position_bytes + self._at), wanted)
        self._at += len(wanted)
        return len(wanted)


class _Record(zipfile.ZipFile):
    """The archive of a record; ``members`` are named without the folder that all of them lie in."""

    def __init__(self, file: BinaryIO | _Window) -> None:
        super().__init__(file)  # type: ignore[arg-type]
        self.members = {info.filename.partition("/")[2]: info for info in self.infolist()}
        if len(self.members) < len(self.infolist()):
            raise ValueError("two members have one name")

    def begin_of(self, name: str) -> int:
        """Where a member's bytes begin: told by its own header, which the archive's directory must agree with."""
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{member.filename} is compressed")
        self.open(member).close()  # compares the names, and leaves the file where the member's bytes begin
        assert self.fp is not None
        begin = self.fp.tell()
        starts = [info.header_offset for info in self.infolist()] + [self.start_dir]
        gap = min(start for start in starts if start > member.header_offset) - begin - member.file_size
        if not 0 <= gap <= _DESCRIPTOR_AT_MOST_BYTES:
            raise ValueError(f"the header of {member.filename} and the archive's directory differ")
        return begin

    def content(self, name: str) -> bytes:
        """A member's bytes, whatever its checksum: PyTorch can be told to write none, and does not look at it."""
        assert self.fp is not None
        self.fp.seek(self.begin_of(name))
        return self.fp.read(self.members[name].file_size)


class _RecordUnpickler(AllowListUnpickler):
    """Unpickles a record; tensors are views of ``storages``, which are of the device "meta" where nothing is read."""

    def __init__(self, record: _Record, where: str, is_read: bool) -> None:
        self._record, self._is_read = record, is_read
        self.storages: dict[str, torch.Tensor] = {}
        """By key: two tensors may share one."""
        if "byteorder" in record.members and record.content("byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        super().__init__(io.BytesIO(record.content("data.pkl")), where)

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of PyTorch's; for any other what the allow-list says."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            import torch

            return getattr(torch, _STORAGE_DTYPES[name])
        return super().find_class(module, name)

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> torch.Tensor:
        """A storage, of which a pickle says its dtype, key, device and count; ValueError where its bytes do not fit."""
        import torch

        _, dtype, key, _, count = pid
        if key not in self.storages:
            size_bytes = self._record.members[f"data/{key}"].file_size
            if size_bytes != count * dtype.itemsize:
                raise ValueError(f"{size_bytes} bytes for {count} numbers of {dtype}")
            numbers = torch.empty(count, dtype=dtype, device="meta")
            if self._is_read:
                numbers = torch.empty(0, dtype=dtype)
                if count:
                    numbers = torch.frombuffer(bytearray(self._record.content(f"data/{key}")), dtype=dtype)
            self.storages[key] = numbers
        return self.storages[key]


def locate_tensor(files: Files, start: Place, length: int, where: str) -> tuple[Place, torch.Tensor]:
    """Where the numbers of a record begin, and its tensor without numbers.

    Raises:
        CheckpointError: no record, damaged, or not one contiguous tensor.
    """
    damaged = f"{where}: is not a tensor's record"
    try:
        record = _Record(_Window(files, start, length))
        unpickler = _RecordUnpickler(record, where, is_read=False)
        tensor: torch.Tensor = unpickler.load()
        ((key, storage),) = unpickler.storages.items()
        if not tensor.is_contiguous():
            raise CheckpointError(f"{damaged} of contiguous numbers; save the checkpoint again")
        if tensor.storage_offset() + tensor.numel() > storage.numel():
            raise ValueError(f"{tensor.numel()} numbers do not lie inside it")
        begin = record.begin_of(f"data/{key}") + int(tensor.storage_offset()) * tensor.itemsize
    except _UNREADABLE as error:
        raise CheckpointError(f"{damaged} ({type(error).__name__}: {first_line(error)}); it is damaged") from error
    return Place(start.file, start.position_bytes + begin), tensor


def load_torch(file: BinaryIO, where: str) -> Any:
    """What ``torch.save`` wrote, on the CPU and with the allow-list: byte entries of a checkpoint, and ``common.pt``.

    Not ``torch.load``: its own restricted form would need Megatron's classes, and the other can be switched off for a
    whole process, as the training programs do.

    Raises:
        CheckpointError: as :func:`megatron_btx.checkpoint.safe_pickle.load_pickle`.
    """
    try:
        return _RecordUnpickler(_Record(file), where, is_read=True).load()
    except _UNREADABLE as error:
        raise CheckpointError(f"{where}: cannot be read ({first_line(error)}); it is truncated or damaged") from error


class _Frame(io.BytesIO):
    """Takes what is written around the numbers of a tensor, over which ``torch.save`` jumps."""

    numbers_at: int | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.numbers_at = self.tell()
        return self.numbers_at


@functools.lru_cache(maxsize=4096)
def record_frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What ``torch.save`` writes before and after the numbers of a contiguous tensor.

    The checksums of the archive are those of skipped data; PyTorch does not look at them.
    """
    import torch
    from torch.serialization import skip_data

    frame = _Frame()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), frame)
    before = frame.getvalue()[: frame.numbers_at]
    return before, frame.getvalue()[len(before) :]
