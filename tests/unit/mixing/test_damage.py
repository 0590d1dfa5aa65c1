"""Sources that are damaged or hostile: refused with the file's name, no code of theirs run, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests.unit.mixing.checkpoints import expert_words, refused


def broken(damage: Callable[[Path], None], dense: Path, folder: Path) -> Path:
    """A copy of a good checkpoint with one thing broken in its iteration folder."""
    root = folder / "broken"
    root.mkdir()
    shutil.copytree(dense / "iter_0000010", root / "iter_0000010")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    damage(root)
    return root


# --- folders that are not what they should be -----------------------------------------------------------------


def _emptied(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def _no_tracker(root: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").unlink()


def _tracker(content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "latest_checkpointed_iteration.txt").write_bytes(content) and None


def _format(content: bytes | None) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        file = root / "iter_0000010" / "metadata.json"
        if content is None:
            file.unlink()
            (root / "iter_0000010" / ".metadata").rename(root / "iter_0000010" / "model_optim_rng.pt")
        else:
            file.write_bytes(content)

    return damage


def _index(change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        file = root / "iter_0000010" / ".metadata"
        content = change(file.read_bytes())
        file.unlink() if content is None else file.write_bytes(content)

    return damage


def _data(change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        file = root / "iter_0000010" / "__0_0.distcp"
        content = change(file.read_bytes())
        file.unlink() if content is None else file.write_bytes(content)

    return damage


def _edited_index(edit: Callable[[object], None]) -> Callable[[Path], None]:
    def change(content: bytes) -> bytes:
        index = pickle.loads(content)
        edit(index)
        return pickle.dumps(index)

    return _index(change)


def _path_outside(index) -> None:
    key = next(iter(index.storage_data))
    info = index.storage_data[key]
    index.storage_data[key] = type(info)("../../../../../../etc/passwd", 0, 16)


def _absolute_path(index) -> None:
    key = next(iter(index.storage_data))
    info = index.storage_data[key]
    index.storage_data[key] = type(info)("/etc/passwd", 0, 16)


def _negative_offset(index) -> None:
    key = next(key for key in index.storage_data if key.fqn == "output_layer.weight")
    info = index.storage_data[key]
    index.storage_data[key] = type(info)(info.relative_path, -8, info.length)


def _negative_length(index) -> None:
    key = next(key for key in index.storage_data if key.fqn == "output_layer.weight")
    info = index.storage_data[key]
    index.storage_data[key] = type(info)(info.relative_path, info.offset, -1)


def _object_without_record(index) -> None:
    for key in [key for key in index.storage_data if key.fqn.startswith("common_state")]:
        del index.storage_data[key]


def _block_without_record(index) -> None:
    del index.storage_data[next(key for key in index.storage_data if key.fqn == "decoder.layers.mlp.linear_fc2.weight")]


def _record_of_another_tensor(index) -> None:
    keys = {key.fqn: key for key in index.storage_data}
    index.storage_data[keys["output_layer.weight"]] = index.storage_data[keys["decoder.final_layernorm.weight"]]


def _record_of_an_object(index) -> None:
    keys = {key.fqn: key for key in index.storage_data}
    index.storage_data[keys["output_layer.weight"]] = index.storage_data[keys["common_state/shard_0_1"]]


def _object_record_of_a_tensor(index) -> None:
    keys = {key.fqn: key for key in index.storage_data}
    index.storage_data[keys["common_state/shard_0_1"]] = index.storage_data[keys["output_layer.weight"]]


def _another_dtype_in_the_index(index) -> None:
    from torch.distributed.checkpoint.metadata import TensorProperties

    for entry in index.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            entry.properties = TensorProperties(dtype=torch.float16)


DAMAGED = {
    "empty folder": (_emptied, ["latest_checkpointed_iteration.txt"]),
    "no tracker": (_no_tracker, ["neither latest_checkpointed_iteration.txt nor metadata.json", "iter_ folders"]),
    "tracker dangles": (_tracker(b"20"), ["latest_checkpointed_iteration.txt", "iter_0000020", "does not exist"]),
    "tracker dangles at release": (_tracker(b"release"), ["names release", "does not exist"]),
    "tracker is empty": (_tracker(b""), ["latest_checkpointed_iteration.txt", "expected an iteration number"]),
    "tracker is words": (_tracker(b"../../etc"), ["latest_checkpointed_iteration.txt", "'../../etc'"]),
    "tracker is binary": (_tracker(b"\xff\xfe\x00\x80"), ["latest_checkpointed_iteration.txt", "iteration number"]),
    "tracker is a long number": (_tracker(b"9" * 5000), ["latest_checkpointed_iteration.txt"]),
    "legacy torch format": (_format(None), ["iter_0000010", "not a torch_dist checkpoint", "--ckpt-format torch_dist"]),
    "another format": (_format(b'{"sharded_backend": "zarr"}'), ["metadata.json", "'zarr'", "'torch_dist'"]),
    "format file is no object": (_format(b"[1]"), ["metadata.json"]),
    "format file is cut": (_format(b'{"sharded'), ["metadata.json", "is not JSON"]),
    "format file is binary": (_format(b"\xff\xfe\x00\x80"), ["metadata.json", "is not JSON"]),
    "no index": (_index(lambda content: None), [".metadata", "does not exist", "incomplete"]),
    "index is empty": (_index(lambda content: b""), [".metadata", "truncated"]),
    "index is cut": (_index(lambda content: content[: len(content) // 2]), [".metadata", "truncated"]),
    "index is garbage": (_index(lambda content: b"\x80\x04" + b"\xa5garbage" * 99), [".metadata", "cannot be read"]),
    "index is another pickle": (_index(lambda content: pickle.dumps([1, 2])), [".metadata", "not the index"]),
    "data file is gone": (_data(lambda content: None), ["__0_0.distcp", "does not exist", "incomplete"]),
    "data file is cut": (_data(lambda content: content[:-5000]), ["__0_0.distcp", "truncated"]),
    "data file is empty": (_data(lambda content: b""), ["__0_0.distcp", "0 bytes", "truncated"]),
    "data file is zeros": (_data(lambda content: bytes(len(content))), ["iter_0000010", "cannot be read"]),
    "path outside": (_edited_index(_path_outside), [".metadata", "etc/passwd", "outside the checkpoint"]),
    "absolute path": (_edited_index(_absolute_path), [".metadata", "/etc/passwd", "outside the checkpoint"]),
    "negative offset": (_edited_index(_negative_offset), [".metadata", "-8"]),
    "negative length": (_edited_index(_negative_length), [".metadata", "-1"]),
    "object without record": (_edited_index(_object_without_record), ["common_state"]),
    "block without record": (_edited_index(_block_without_record), ["linear_fc2.weight", "3 of 4 blocks"]),
    "record of another tensor": (_edited_index(_record_of_another_tensor), ["output_layer.weight", "(32,)"]),
    "record of an object": (_edited_index(_record_of_an_object), ["output_layer.weight"]),
    "object with a tensor's record": (_edited_index(_object_record_of_a_tensor), ["common_state"]),
}


@pytest.mark.parametrize("case", list(DAMAGED))
def test_damaged_checkpoints(case, dense, tmp_path, capsys):
    damage, named = DAMAGED[case]
    (tmp_path / "sources").mkdir()
    root = broken(damage, dense, tmp_path / "sources")
    before = sorted(str(file) for file in root.rglob("*"))
    for experts in ({"a": dense, "b": root}, {"a": root, "b": dense}):
        message = refused(expert_words(experts), tmp_path / "out", capsys)
        for text in [*named, str(root)]:
            assert text in message
    assert sorted(str(file) for file in root.rglob("*")) == before, "a source must stay as it was"


def test_records_of_another_dtype_than_the_index_says(dense, tmp_path, capsys):
    """When all experts agree on the wrong dtype: refused at the record, not converted in passing."""
    (tmp_path / "sources").mkdir()
    root = broken(_edited_index(_another_dtype_in_the_index), dense, tmp_path / "sources")
    message = refused(expert_words({"a": root, "b": root}), tmp_path / "out", capsys)
    assert "float16" in message and "float32" in message and str(root) in message


# --- checkpoints that want to run code ------------------------------------------------------------------------


class RunsCode:
    """A pickle that runs a shell command when it is loaded by the plain unpickler."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def test_an_index_cannot_run_code(dense, tmp_path, capsys):
    mark = tmp_path / "sources" / "was here"
    (tmp_path / "sources").mkdir()
    payload = pickle.dumps(RunsCode(f"touch '{mark}'"))
    root = broken(_index(lambda content: payload), dense, tmp_path / "sources")
    message = refused(expert_words({"a": dense, "b": root}), tmp_path / "out", capsys)
    assert ".metadata" in message and "system" in message and "could run code" in message
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists(), "else this payload would prove nothing"


@pytest.mark.parametrize("where", ["common_state/shard_0_1", "output_layer.weight"])
def test_an_entry_cannot_run_code(where, dense, tmp_path, capsys):
    """The same payload as the record of the arguments, and as the record of a tensor."""
    (tmp_path / "sources").mkdir()
    mark = tmp_path / "sources" / "was here"

    def damage(root: Path) -> None:
        folder = root / "iter_0000010"
        index = pickle.loads((folder / ".metadata").read_bytes())
        torch.save([RunsCode(f"touch '{mark}'")], folder / "evil.distcp")
        key = next(key for key in index.storage_data if key.fqn == where)
        info = index.storage_data[key]
        index.storage_data[key] = type(info)("evil.distcp", 0, (folder / "evil.distcp").stat().st_size)
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    root = broken(damage, dense, tmp_path / "sources")
    message = refused(expert_words({"a": dense, "b": root}), tmp_path / "out", capsys)
    assert where in message and "system" in message
    assert not mark.exists()
    torch.load(root / "iter_0000010" / "evil.distcp", weights_only=False)
    assert mark.exists(), "else this payload would prove nothing"


def test_common_pt_cannot_run_code(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    mark = tmp_path / "sources" / "was here"

    def damage(root: Path) -> None:
        _edited_index(_no_common_state)(root)
        torch.save({"args": RunsCode(f"touch '{mark}'")}, root / "iter_0000010" / "common.pt")

    root = broken(damage, dense, tmp_path / "sources")
    message = refused(expert_words({"a": dense, "b": root}), tmp_path / "out", capsys)
    assert "common.pt" in message and "system" in message
    assert not mark.exists()


def _no_common_state(index) -> None:
    _object_without_record(index)
    for key in [key for key in index.state_dict_metadata if key.startswith("common_state")]:
        del index.state_dict_metadata[key]


def test_no_arguments_at_all(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    root = broken(_edited_index(_no_common_state), dense, tmp_path / "sources")
    message = refused(expert_words({"a": dense, "b": root}), tmp_path / "out", capsys)
    assert "neither common_state nor common.pt" in message and str(root) in message


def test_readers_know_nothing_of_a_foreign_index(dense):
    """The good checkpoint that all damaged ones were copied from is read without complaint."""
    assert len(TorchDistReader(dense / "iter_0000010").tensors) > 9
    assert json.loads((dense / "iter_0000010" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
