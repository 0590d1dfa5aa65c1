"""Reader and layout against PyTorch's own: any block of any tensor, however it was cut."""

from __future__ import annotations

import copyreg
import io
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_btx.checkpoint import torch_dist
from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.safe_pickle import load_pickle
from megatron_btx.checkpoint.stored import Files, Place, bytes_of, read_box
from megatron_btx.checkpoint.torch_dist import TorchDistLayout, TorchDistReader
from megatron_btx.checkpoint.torch_record import locate_tensor, record_frame
from megatron_btx.common.errors import CheckpointError
from tests.support.mixing import write_checkpoint


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    cut = {name: (tensor, min(1, tensor.dim() - 1)) for name, tensor in tensors.items()}
    write_checkpoint(folder, cut, {"state/shard_0_1": [{"n": 1}]})


TENSORS = {
    "a": torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "c": torch.arange(7),
}


def test_pytorch_reads_what_was_laid_out(tmp_path):
    write(tmp_path / "x", TENSORS)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(found, checkpoint_id=str(tmp_path / "x"), no_dist=True)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_the_reader_reads_what_pytorch_writes(tmp_path):
    """Any slice, across any blocks; objects too."""
    dcp.save(dict(TENSORS), checkpoint_id=str(tmp_path / "y"), no_dist=True)
    write(tmp_path / "x", TENSORS)
    numbers = random.Random(0)
    for reader in (TorchDistReader(tmp_path / "x"), TorchDistReader(tmp_path / "y")):
        for name, tensor in TENSORS.items():
            assert reader.tensors[name].shape == tuple(tensor.shape) and reader.tensors[name].dtype == tensor.dtype
            for _ in range(20):
                offsets = tuple(numbers.randrange(n) for n in tensor.shape)
                sizes = tuple(numbers.randint(1, n - o) for n, o in zip(tensor.shape, offsets, strict=True))
                place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                assert torch.equal(reader.read(name, offsets, sizes), tensor[place])
    assert TorchDistReader(tmp_path / "x").read_object("state/shard_0_1") == [{"n": 1}]


def test_several_data_files(tmp_path, monkeypatch):
    """Past the size of a file the next one begins; PyTorch and the reader find everything."""
    monkeypatch.setattr(torch_dist, "DATA_FILE_BYTES", 3000)
    write(tmp_path / "x", TENSORS)
    assert len(list((tmp_path / "x").glob("*.distcp"))) > 3
    test_pytorch_reads = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(test_pytorch_reads, checkpoint_id=str(tmp_path / "x"), no_dist=True)
    reader = TorchDistReader(tmp_path / "x")
    for name, tensor in TENSORS.items():
        assert torch.equal(test_pytorch_reads[name], tensor)
        assert torch.equal(reader.read(name, (0,) * tensor.dim(), tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,), (3, 4), (2, 3, 4)])
def test_a_record_made_around_its_numbers_is_torch_saves(shape, dtype):
    """Byte for byte what torch.save writes, but for the checksums of the archive; found again by its place."""
    tensor = torch.randn(shape).to(dtype)
    before, after = record_frame(shape, dtype)
    record = before + bytes(bytes_of(tensor)) + after
    out = io.BytesIO()
    torch.save(tensor, out)
    assert len(record) == len(out.getvalue())
    found = torch.load(io.BytesIO(record))
    assert found.dtype == dtype and torch.equal(found, tensor)


def test_numbers_are_found_in_records_of_any_kind(tmp_path):
    """Parameters and views too, wherever the record begins; what is not contiguous is refused by name."""
    wide = torch.arange(24.0).reshape(4, 6)
    for tensor in (wide, torch.nn.Parameter(wide), wide[1:3]):
        out = io.BytesIO()
        torch.save(tensor, out)
        (tmp_path / "data").write_bytes(b"12345" + out.getvalue() + b"more")
        place, found = locate_tensor(Files(), Place(tmp_path / "data", 5), len(out.getvalue()), "here")
        read = read_box(Files(), place, found.shape, (1, 2), (1, 3), found.dtype)
        assert torch.equal(read, tensor.detach()[1:2, 2:5])
    out = io.BytesIO()
    torch.save(wide.T, out)
    (tmp_path / "data").write_bytes(out.getvalue())
    with pytest.raises(CheckpointError, match="here: is not a tensor's record of contiguous numbers"):
        locate_tensor(Files(), Place(tmp_path / "data", 0), len(out.getvalue()), "here")


def test_nothing_loads_without_the_index(tmp_path):
    """Without its index a folder is no checkpoint, for us and for PyTorch."""
    write(tmp_path / "x", TENSORS)
    (tmp_path / "x" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        TorchDistReader(tmp_path / "x")
    with pytest.raises(CheckpointException, match=r"metadata (read failed|is None)"):
        dcp.load({"a": torch.zeros(2, 2)}, checkpoint_id=str(tmp_path / "x"), no_dist=True)


def test_paths_that_stand_for_an_iteration(dense, tmp_path):
    """Root, iteration folder, release."""
    assert resolve_iteration(dense) == dense / "iter_0000010"
    assert resolve_iteration(dense / "iter_0000005") == dense / "iter_0000005"
    (tmp_path / "release").symlink_to(dense / "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(" release\n")
    assert resolve_iteration(tmp_path) == tmp_path / "release"
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_iteration(dense / "latest_checkpointed_iteration.txt")


def test_an_index_of_every_pytorch():
    """Version 2.15 also tells a tensor's strides, which older ones and Megatron's ``torch.empty`` refuse."""
    layout = TorchDistLayout()
    layout.add_block("weight", (2, 3), (0, 0), (2, 3), torch.float32)
    index = layout.small_files()[".metadata"]
    seen = []

    class Watching(pickle.Unpickler):
        def find_class(self, module, name):
            if name != "TensorProperties":
                return super().find_class(module, name)
            return type(name, (), {"__setstate__": lambda self, state: seen.append(state)})

    Watching(io.BytesIO(index)).load()
    assert [len(state) for state in seen] == [5]

    class Newer(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, TensorProperties):
                return copyreg.__newobj__, (TensorProperties,), (*value.__getstate__()[:5], (3, 1))
            return NotImplemented

    newer = io.BytesIO()
    Newer(newer).dump(pickle.loads(index))
    for content in (index, newer.getvalue()):
        read = load_pickle(io.BytesIO(content), "index")
        for metadata in (read, pickle.loads(pickle.dumps(read))):
            assert metadata.state_dict_metadata["weight"].properties.dtype == torch.float32
        properties = read.state_dict_metadata["weight"].properties
        assert torch.empty((2, 3), **vars(properties), device="meta").dtype == torch.float32
