"""Reader and writer against PyTorch's own: any block of any tensor, however it was cut."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_btx.checkpoint import torch_dist
from megatron_btx.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, blocks_of, resolve_iteration
from megatron_btx.errors import CheckpointError

SHAPES = [((), 0), ((5,), 0), ((3, 4), 0), ((3, 4), 1), ((2, 3, 4, 5), 2), ((4, 7, 2), 1), ((2, 3), 2), ((1, 1, 1), 1)]


@pytest.mark.parametrize(("shape", "leading"), SHAPES)
@pytest.mark.parametrize("at_most_bytes", [1, 16, 40, 1 << 20])
def test_blocks_cover_a_tensor_once(shape, leading, at_most_bytes):
    """In the order of memory, none twice, none left out, none larger than asked unless one row is."""
    count = torch.zeros(shape)
    order = []
    for offsets, sizes in blocks_of(shape, 4, leading, at_most_bytes):
        place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        count[place] += 1
        order.append(torch.arange(count.numel()).reshape(shape)[place].reshape(-1))
        rows = sizes[leading] if len(sizes) > leading else 1
        assert sizes[:leading] == (1,) * leading
        assert rows == 1 or 4 * torch.Size(sizes).numel() <= at_most_bytes
    assert (count == 1).all()
    assert torch.equal(torch.cat(order), torch.arange(count.numel()))


def write(folder: Path, tensors: dict[str, torch.Tensor], at_most_bytes: int = 64) -> None:
    writer = TorchDistWriter(folder)
    for name, tensor in tensors.items():
        for offsets, sizes in blocks_of(tuple(tensor.shape), tensor.element_size(), 1, at_most_bytes):
            place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            writer.write_block(name, tuple(tensor.shape), offsets, tensor[place])
    writer.write_object("state/shard_0_1", [{"n": 1}])
    writer.close()


TENSORS = {
    "a": torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "c": torch.arange(7),
}


def test_pytorch_reads_what_the_writer_writes(tmp_path):
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


def test_nothing_loads_before_the_writer_is_closed(tmp_path):
    """Without its index a folder is no checkpoint, for us and for PyTorch."""
    writer = TorchDistWriter(tmp_path / "x")
    writer.write_block("a", (2, 2), (0, 0), torch.ones(2, 2))
    writer._file.flush()
    with pytest.raises(CheckpointError, match="incomplete"):
        TorchDistReader(tmp_path / "x")
    with pytest.raises(CheckpointException, match="metadata read failed"):
        dcp.load({"a": torch.zeros(2, 2)}, checkpoint_id=str(tmp_path / "x"), no_dist=True)
    writer.close()
    assert TorchDistReader(tmp_path / "x").read("a", (0, 0), (2, 2)).sum() == 4


def test_paths_that_stand_for_an_iteration(dense, tmp_path):
    """Root, iteration folder, release."""
    assert resolve_iteration(dense) == dense / "iter_0000010"
    assert resolve_iteration(dense / "iter_0000005") == dense / "iter_0000005"
    (tmp_path / "release").symlink_to(dense / "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(" release\n")
    assert resolve_iteration(tmp_path) == tmp_path / "release"
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_iteration(dense / "latest_checkpointed_iteration.txt")
