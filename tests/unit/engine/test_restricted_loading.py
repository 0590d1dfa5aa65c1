"""A stranger's checkpoint runs no code: neither under our reader's check, nor when PyTorch unpickles for Megatron."""

from __future__ import annotations

import collections
import io
import pickle
import random
import signal
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.datasets.utils import compile_helpers
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_btx.checkpoint import torch_dist
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.engine.checks import refuse
from megatron_btx.engine.checks.arguments import of_formats
from megatron_btx.engine.checks.start import check_against_checkpoint, checkpoint_to_load
from megatron_btx.engine.fallback import choose_checkpoint
from megatron_btx.engine.restricted_loading import loading_failed, restrict_unpickling
from tests.support.hostile import Call, byte_entries, payload, plant, read_index
from tests.support.mixing import write_checkpoint

KEYS = (
    "decoder.layers.self_attention.linear_qkv._extra_state",
    "rng_state",
    "optimizer",
    "rerun_state_machine_state",
    "opt_param_scheduler",
    "modelopt_state",
    "common_state",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An iteration folder with one tensor and one entry of each kind that is not a tensor."""
    objects: dict[str, object] = {f"{key}/shard_0_1": None for key in KEYS}
    objects["common_state/shard_0_1"] = [{"args": Namespace(num_layers=1), "iteration": 3}]
    return write_checkpoint(tmp_path / "root" / "iter_0000003", {"weight": (torch.ones(2, 2), 0)}, objects)


@pytest.fixture
def restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a training program's, until the test ends."""
    monkeypatch.setattr(filesystem, "pickle", pickle)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    restrict_unpickling()


def load(folder: Path, name: str) -> object:
    """One byte entry as Megatron gets it: loaded by PyTorch."""
    wanted = {name: io.BytesIO()}
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return wanted[name]


@pytest.mark.parametrize("key", [*KEYS, "something_new"])
def test_our_check_refuses_a_payload_in_any_entry(key, folder, tmp_path):
    name = plant(folder, key, payload(tmp_path))
    with pytest.raises(CheckpointError, match="could run code") as refusal:
        TorchDistReader(folder).check_objects()
    assert name in str(refusal.value) and "posix.mkdir" in str(refusal.value) and not (tmp_path / "ran").exists()


def test_our_check_refuses_a_payload_in_older_common_states(folder, tmp_path):
    """Megatron reads ``common.pt`` wherever it is there, and so do we."""
    torch.save(payload(tmp_path), folder / "common.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        TorchDistReader(folder).check_objects()
    torch.save({"args": Namespace(num_layers=2)}, folder / "common.pt")
    assert TorchDistReader(folder).arguments() == {"num_layers": 2}


def test_our_check_reads_every_record_of_an_entry(folder, tmp_path):
    """An index can name two records for one entry, the first of them harmless, and make an entry look like a tensor."""
    name = plant(folder, "rng_state", payload(tmp_path))
    index = read_index(folder)
    harmless = index.storage_data[MetadataIndex("optimizer/shard_0_1")]
    index.storage_data = {MetadataIndex(name, torch.Size([0])): harmless, **index.storage_data}
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="could run code"):
        TorchDistReader(folder).check_objects()
    index.state_dict_metadata[name].__dict__["chunks"] = []
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="could run code"):
        TorchDistReader(folder).check_objects()


@pytest.mark.parametrize("key", KEYS)
def test_pytorch_itself_refuses_what_the_check_has_not_seen(key, folder, tmp_path, restricted):
    """Also where a function of Megatron's is called, which the converter reads as an inert value."""
    for value, named in ((payload(tmp_path), "posix.mkdir"), (Call(compile_helpers), "compile_helpers")):
        name = plant(folder, key, value)
        with pytest.raises(CheckpointException) as failure:
            load(folder, name)
        line = str(loading_failed("the/folder", failure.value))
        assert line.startswith("the/folder: ") and named in line and "\n" not in line
        assert not (tmp_path / "ran").exists()


def test_bytes_are_no_addresses_of_objects(folder, restricted):
    """NumPy's own constructor, which Megatron allows, would make objects out of any bytes, and Python follow them."""
    for kind in ("O", Call(numpy.dtype, "O")):
        name = plant(folder, "rng_state", Call(numpy.ndarray, (1,), kind, b"A" * 8))
        with pytest.raises(CheckpointException) as failure:
            load(folder, name)
        line = str(loading_failed("x", failure.value))
        assert line.startswith("x: holds a pickle that is not of plain values") and "\n" not in line
        with pytest.raises(CheckpointError, match="rng_state"):
            TorchDistReader(folder).check_objects()


def test_bytes_are_no_addresses_in_megatrons_own_unpickler(restricted):
    """It reads the extra states of FP8, and NumPy's own constructor is on its list."""
    from megatron.core.safe_globals import SafeUnpickler

    for value in (Call(numpy.ndarray, (1,), "O", b"A" * 8), Call(numpy.ndarray, (1,), "u1", b"A" * 8)):
        with pytest.raises(pickle.UnpicklingError, match="raw addresses"):
            SafeUnpickler(io.BytesIO(pickle.dumps(value))).load()
    honest = numpy.arange(3.0)
    assert (SafeUnpickler(io.BytesIO(pickle.dumps(honest, 4))).load() == honest).all()


def test_what_pytorch_cannot_rebuild_is_one_line(folder, restricted):
    """Its restricted form knows fewer containers than ours: nothing of Megatron's holds them."""
    name = plant(folder, "optimizer", collections.defaultdict(list, {"lr": [0.1]}))
    TorchDistReader(folder).check_objects()
    with pytest.raises(CheckpointException) as failure:
        load(folder, name)
    line = str(loading_failed("x", failure.value))
    assert line.startswith("x: holds a pickle that is not of plain values") and "defaultdict" in line


def test_pytorch_itself_refuses_other_files(folder, tmp_path, restricted):
    """The index, which has no restricted form of PyTorch's, and files that are loaded whole."""
    torch.save(payload(tmp_path), folder / "common.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "common.pt", weights_only=False)
    index = read_index(folder)
    index.planner_data = payload(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointException) as failure:
        load(folder, "rng_state/shard_0_1")
    assert "could run code" in str(loading_failed("x", failure.value))
    assert not (tmp_path / "ran").exists()


ORDINARY = {
    "arguments": Namespace(
        model_type=ModelType.encoder_or_decoder,
        attention_backend=AttnBackend.auto,
        masks=[AttnMaskType.causal],
        exit_signal=signal.SIGTERM,
        rerun_mode=RerunMode.DISABLED,
        params_dtype=torch.bfloat16,
        data_cache_path=Path("/somewhere"),
        layers={1, 2},
        frozen=frozenset({3}),
        loss_scale=numpy.float64(2.5),
        count=numpy.int64(3),
        nothing=None,
    ),
    "random": {"random_rng_state": random.getstate(), "torch_rng_state": torch.get_rng_state()},
    "groups": collections.OrderedDict(param_groups=[{"lr": [0.1]}]),
}


def test_what_megatron_stores_passes_both(folder, restricted):
    """Enums, arrays, scalars, random states and the bytes of Transformer Engine's first extra states."""
    for key, value in ORDINARY.items():
        plant(folder, key, value)
    plant(folder, "numpy_state", {"np_rng_state": numpy.random.get_state()})
    plant(folder, "arrays", [numpy.zeros((2, 2), kind) for kind in "?bBhHiIqQefdFD"])
    plant(folder, "te", [io.BytesIO(b"state")])
    shared = torch.arange(6.0)
    plant(folder, "tensors", [shared[2:], shared.view(2, 3).t(), torch.zeros(0), torch.ones(2, dtype=torch.bfloat16)])
    reader = TorchDistReader(folder)
    reader.check_objects()
    for name in byte_entries(folder):
        key, _, _ = name.partition("/")
        found = load(folder, name)
        if key == "random":
            assert torch.equal(found["torch_rng_state"], ORDINARY["random"]["torch_rng_state"])
            assert found["random_rng_state"] == ORDINARY["random"]["random_rng_state"]
        elif key in ORDINARY:
            assert found == ORDINARY[key]
        elif key == "numpy_state":
            assert all(map(numpy.array_equal, found["np_rng_state"], numpy.random.get_state()))
        elif key == "te":
            assert found[0].getvalue() == reader.read_object(name)[0].getvalue() == b"state"
        elif key == "tensors":
            for theirs, ours in zip(found, reader.read_object(name), strict=True):
                assert torch.equal(theirs, ours) and theirs.dtype == ours.dtype and theirs.stride() == ours.stride()


def test_every_checkpoint_that_megatron_would_load_is_looked_at(folder, tmp_path):
    """``--ckpt-step`` names another iteration than the tracker, and a newer non-persistent one goes before both."""
    root = folder.parent
    given = Namespace(load=str(root), pretrained_checkpoint=None, ckpt_step=None, finetune=False)
    given.non_persistent_ckpt_type, given.non_persistent_global_ckpt_dir = "global", None
    assert checkpoint_to_load(given) is None
    given.ckpt_step = 3
    assert checkpoint_to_load(given) == (str(folder), True)
    (root / "latest_checkpointed_iteration.txt").write_text("9")
    assert checkpoint_to_load(given) == (str(folder), True)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    assert checkpoint_to_load(given) == (str(root), True)
    given.save, given.ckpt_step, given.load = None, None, str(tmp_path / "run")
    given.non_persistent_global_ckpt_dir = str(root)
    (root / "latest_checkpointed_iteration.txt").write_text("3")
    choose_checkpoint(given)
    assert checkpoint_to_load(given) == (str(root), True)
    plant(folder, "rng_state", payload(tmp_path))
    with pytest.raises(CheckpointError, match="could run code"):
        check_against_checkpoint(given)


def test_formats_that_could_not_be_read_again():
    """A run that saved in another format could not be resumed."""
    given = Namespace(save="x", load=None, pretrained_checkpoint=None, ckpt_format="torch")
    with pytest.raises(InputError, match="--ckpt-format torch: "):
        refuse(of_formats(given))
    given.save = None
    refuse(of_formats(given))


def test_many_equal_entries_are_unpickled_once(tmp_path, monkeypatch):
    """The extra states of a large model are thousands, and all alike."""
    objects = {f"decoder.layers.{n}.mlp._extra_state/shard_0_1": None for n in range(1000)}
    reader = TorchDistReader(write_checkpoint(tmp_path / "iter_0000001", {}, objects))
    looked_at: list[str] = []
    monkeypatch.setattr(torch_dist, "load_torch", lambda record, name: looked_at.append(name))
    reader.check_objects()
    assert len(looked_at) == 1
