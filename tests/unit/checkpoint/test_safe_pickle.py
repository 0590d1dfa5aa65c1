"""Damaged or hostile bytes end in a CheckpointError that names the file: never in code that runs, never in a crash."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from megatron_btx.checkpoint.safe_pickle import load_pickle
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.checkpoint.torch_record import load_torch
from megatron_btx.common.errors import CheckpointError
from tests.support.hostile import Call

FLIPS = 400


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """At most 2 GiB more for this process: damaged bytes can ask for any amount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used_pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used_pages * resource.getpagesize() + (2 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    "target",
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch", "storage.os.system"),
        ("torch", "hub.SomeStorage"),
        ("torch.hub", "SomeStorage"),
        ("torch.hub", "load"),
        ("numpy", "load"),
        ("megatron.training", "x.y"),
        ("megatron_btx.common.errors", "os.system"),
        ("importlib", "import_module"),
    ],
)
def test_what_the_list_does_not_hold(target):
    """Every global that is not needed is refused by name, in both protocols' spellings."""
    module, name = target
    plain = f"c{module}\n{name}\n(S'x'\ntR.".encode()
    stacked = b"\x80\x04" + _unicode(module) + _unicode(name) + b"\x93" + _unicode("x") + b"\x85R."
    for payload in (plain, stacked):
        with pytest.raises(CheckpointError, match="could run code"):
            load_pickle(io.BytesIO(payload), "the file")


ADDRESSES = numpy.array([0x4141414141414141]).tobytes()
OBJECTS = {
    "made": Call(numpy.ndarray, (1,), "O", ADDRESSES),
    "made of a dtype": Call(numpy.ndarray, (1,), Call(numpy.dtype, "O"), ADDRESSES),
    "structured": Call(numpy.ndarray, (1,), Call(numpy.dtype, "i8,O"), ADDRESSES * 2),
    "numbers": Call(numpy.ndarray, (1,), "i8", ADDRESSES),
    "a dtype": Call(numpy.dtype, "O"),
    "a list of dtypes": Call(numpy.dtype, [("x", "O")]),
    "filled": numpy.array([None, 3], dtype=object),
    "a number": Call(type(numpy.float64(1)).__reduce__(numpy.float64(1))[0], Call(numpy.dtype, "O"), ADDRESSES),
}


@pytest.mark.parametrize("case", list(OBJECTS))
def test_bytes_are_no_addresses_of_objects(case):
    """NumPy would make an array of objects out of any bytes, and Python would follow them."""
    for protocol in (2, 4):
        with pytest.raises(CheckpointError, match="the file: "):
            load_pickle(io.BytesIO(pickle.dumps(OBJECTS[case], protocol)), "the file")
        with pytest.raises(CheckpointError, match="the file: "):
            torch.save(OBJECTS[case], file := io.BytesIO(), pickle_protocol=protocol)
            load_torch(file, "the file")


def test_a_dtype_that_a_pickle_changed_is_made_anew():
    """What a pickle sets in a dtype is its byte order, and nothing that says how memory is read."""
    structured = numpy.dtype("i8,O").__reduce__()[2]
    empty = numpy.zeros(0).__reduce__()

    class Changed:
        def __reduce__(self):
            return (numpy.dtype, ("i8", False, True), structured)

    class Filled:
        def __reduce__(self):
            return (*empty[:2], (1, (1,), Changed(), False, ADDRESSES))

    try:
        found = load_pickle(io.BytesIO(pickle.dumps(Filled(), 2)), "x")
    except CheckpointError:
        return
    assert found.dtype == numpy.dtype("i8") and found.tobytes() == ADDRESSES


@pytest.mark.parametrize("kind", ["?", "b", "<i4", ">i4", ">f8", "F", "S3", "U2", "M8[ns]", "m8[s]"])
def test_arrays_and_numbers_survive(kind):
    array = numpy.array([[1, 0, 1], [1, 1, 0]]).astype(kind)
    for order in (array, array.T):
        content = pickle.dumps((order, order[0, 0]), 2)
        (found, number), (expected, _) = load_pickle(io.BytesIO(content), "x"), pickle.loads(content)
        assert numpy.array_equal(found, order) and found.dtype == expected.dtype and number == order[0, 0]
        again = pickle.loads(pickle.dumps(found))
        assert type(again) is numpy.ndarray and numpy.array_equal(again, order)


def _unicode(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def test_megatrons_own_classes_come_back_inert():
    """An enum of Megatron's is readable without Megatron, and equal only to itself."""
    payload = b"cmegatron.core.enums\nModelType\n(I%d\ntR."
    one, again, other = (load_pickle(io.BytesIO(payload % n), "x") for n in (1, 1, 2))
    assert one == again and one != other
    assert type(one).__name__ == "ModelType" and type(one).__bases__[0].__name__ == "ForeignValue"


def test_plain_values_survive():
    value = {"a": [1, 2.5, None, True, "x", (1, 2), {3}], "t": torch.arange(6).reshape(2, 3)}
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    found = load_torch(file, "x")
    assert torch.equal(found.pop("t"), value.pop("t")) and found == value


def test_nothing_but_a_checkpoint_error_comes_out_of_a_damaged_index(dense, tmp_path):
    """Hundreds of flipped bytes and cuts of the index: read as before, or refused with the file's name."""
    folder = shutil.copytree(dense / "iter_0000010", tmp_path / "iter_0000010")
    honest, random_ = (folder / ".metadata").read_bytes(), random.Random(0)
    refused = 0
    for number in range(FLIPS):
        content = bytearray(honest)
        for _ in range(random_.choice((1, 1, 3, 20))):
            content[random_.randrange(len(content))] = random_.randrange(256)
        if number % 5 == 0:
            content = content[: random_.randrange(len(content))]
        (folder / ".metadata").write_bytes(content)
        try:
            with little_memory():
                TorchDistReader(folder).arguments()
        except CheckpointError as error:
            refused += 1
            assert str(folder) in str(error)
    assert refused > FLIPS // 10


def test_nothing_but_a_checkpoint_error_comes_out_of_a_damaged_entry(dense):
    """The same for the record of the arguments, in its pickle and in its archive."""
    reader, random_ = TorchDistReader(dense / "iter_0000010"), random.Random(1)
    honest = reader._record_of(reader._objects["common_state/shard_0_1"][0])
    refused = 0
    for number in range(FLIPS):
        content = bytearray(honest)
        for _ in range(random_.choice((1, 1, 3, 20))):
            content[random_.randrange(len(content))] = random_.randrange(256)
        if number % 5 == 0:
            content = content[: random_.randrange(len(content))]
        try:
            with little_memory():
                load_torch(io.BytesIO(content), "the entry")
        except CheckpointError as error:
            refused += 1
            assert "the entry" in str(error)
    assert refused > FLIPS // 10


def test_another_pickles_garbage():
    """Bytes that are no pickle at all, and pickles that end in the middle."""
    whole = pickle.dumps({"a": list(range(100))})
    for payload in (b"", b"\x00" * 50, b"PK\x03\x04garbage", b"\x80\x05.", *(whole[:cut] for cut in range(1, 40))):
        with pytest.raises(CheckpointError, match="the file"):
            load_pickle(io.BytesIO(payload), "the file")
        with pytest.raises(CheckpointError, match="the file"):
            load_torch(io.BytesIO(payload), "the file")
