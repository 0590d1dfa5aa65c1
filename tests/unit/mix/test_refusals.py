"""What the converter refuses: one line that names what, where and the remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests.mixing import mix, rewrite
from tests.runner import REPOSITORY
from tests.unit.mix.checkpoints import expert_words, refused


def broken(damage: Callable[[Path], None], dense: Path, folder: Path) -> Path:
    """A copy of a good checkpoint with one thing broken in its iteration folder."""
    root = folder / "broken"
    root.mkdir()
    shutil.copytree(dense / "iter_0000010", root / "iter_0000010")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    damage(root)
    return root


# --- the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["0 expert given", "at least 2", "--expert NAME=PATH"]),
        (["--expert=a={dense}"], ["1 expert given", "at least 2"]),
        (["--expert=a={dense}", "--expert=a={dense}"], ["--expert a=", "given twice"]),
        (["--expert=a={dense}", "--expert={dense}"], ["--expert", "{dense}", "expected NAME=PATH"]),
        (["--expert=a={dense}", "--expert==x"], ["--expert =x", "expected NAME=PATH"]),
        (["--expert=a={dense}", "--expert=b="], ["--expert b=", "expected NAME=PATH"]),
        (["--expert=a={dense}", "--expert=b=/no/where"], ["/no/where", "no such folder"]),
        (["--expert=a={dense}", "--expert=b={dense}", "--moe-router-topk=3"], ["--moe-router-topk 3", "1 to 2"]),
        (["--expert=a={dense}", "--expert=b={dense}", "--moe-router-topk=0"], ["--moe-router-topk 0", "1 to 2"]),
        (["--expert=a={dense}", "--expert=b={dense}", "--moe-router-topk=-1"], ["--moe-router-topk -1", "1 to 2"]),
    ],
)
def test_bad_command_lines(words, named, dense, tmp_path, capsys):
    message = refused([word.format(dense=dense) for word in words], tmp_path / "out", capsys)
    for text in named:
        assert text.format(dense=dense) in message


def test_no_output_is_named(dense, capsys):
    from megatron_btx.mix.cli import main

    assert main(expert_words({"a": dense, "b": dense})) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--output is missing" in error and "--dry-run" in error


def test_bad_values_of_flags_are_argparses(tmp_path):
    """Unknown flags and values that are no numbers: usage and exit code 2."""
    from megatron_btx.mix.cli import main

    for words in (["--no-such-flag"], ["--moe-router-topk", "two"], ["--method", "upcycle"]):
        with pytest.raises(SystemExit) as end:
            main([*words, "--output", str(tmp_path / "out")])
        assert end.value.code == 2


def test_the_tool_itself(tmp_path):
    """The script under tools/ exits with 2 and one line, before torch is imported for nothing."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "convert_experts.py")]
    run = subprocess.run([*tool, "--expert", "math"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "error: --expert math: expected NAME=PATH, as --expert math=runs/math/checkpoint"
    ]
    check = "import sys, megatron_btx.mix.cli as c; c.parser(); assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)


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


# --- models that do not fit together --------------------------------------------------------------------------

FC1 = "decoder.layers.mlp.linear_fc1.weight"


OTHER_ARGUMENTS = {
    "norm epsilon": ({"layernorm_epsilon": 1e-6}, ["layernorm_epsilon", "--norm-epsilon", "1e-05", "1e-06"]),
    "rotary base": ({"rotary_base": 500000}, ["--rotary-base", "10000", "500000"]),
    "hidden size": ({"hidden_size": 64}, ["--hidden-size", "32", "64"]),
    "ffn size": ({"ffn_hidden_size": 96}, ["--ffn-hidden-size", "48", "96"]),
    "rope scaling": ({"use_rope_scaling": True}, ["--use-rope-scaling", "False", "True"]),
    "normalization": ({"normalization": "LayerNorm"}, ["--normalization", "'RMSNorm'", "'LayerNorm'"]),
    "window": ({"window_size": (8, 0)}, ["--window-size", "None", "(8, 0)"]),
    "clamped activation": ({"activation_func_clamp_value": 7.0}, ["--activation-func-clamp-value", "None", "7.0"]),
    "offset of the gate": ({"glu_linear_offset": 1.0}, ["--glu-linear-offset", "0.0", "1.0"]),
    "layers without rope": ({"no_rope_freq": 4}, ["--no-rope-freq", "None", "4"]),
    "layers without window": ({"window_attn_skip_freq": 2}, ["--window-attn-skip-freq", "None", "2"]),
    "mup": ({"use_mup": True}, ["--use-mup", "False", "True"]),
}


@pytest.mark.parametrize("case", list(OTHER_ARGUMENTS))
def test_other_model_arguments(case, dense, tmp_path, capsys):
    """Equal shapes, another function: the flag, both values and both names."""
    arguments, named = OTHER_ARGUMENTS[case]
    (tmp_path / "sources").mkdir()
    other = rewrite(dense, tmp_path / "sources" / "other", arguments=arguments)
    message = refused(expert_words({"left": dense, "right": other}), tmp_path / "out", capsys)
    for text in [*named, "left", "right", "one seed"]:
        assert text in message


OTHER_TENSORS = {
    "missing key": (lambda key, t: None if key == "output_layer.weight" else t, ["output_layer.weight", "missing in"]),
    "other shape": (
        lambda key, t: t[:64] if key == "output_layer.weight" else t,
        ["output_layer.weight", "[128, 32]", "[64, 32]"],
    ),
    "other dtype": (lambda key, t: t.double() if key == FC1 else t, [FC1, "float32", "float64"]),
}


@pytest.mark.parametrize("case", list(OTHER_TENSORS))
def test_other_tensors(case, dense, tmp_path, capsys):
    """In either order: the key and what each expert has."""
    change, named = OTHER_TENSORS[case]
    (tmp_path / "sources").mkdir()
    other = rewrite(dense, tmp_path / "sources" / "other", change)
    for experts in ({"left": dense, "right": other}, {"right": other, "left": dense}):
        message = refused(expert_words(experts), tmp_path / "out", capsys)
        for text in [*named, "left", "right"]:
            assert text in message


def renamed(dense: Path, target: Path, pattern: str, replacement: str) -> Path:
    """A copy in whose index one key has another name."""
    import re

    shutil.copytree(dense / "iter_0000010", target)
    file = target / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.state_dict_metadata = {re.sub(pattern, replacement, k): v for k, v in index.state_dict_metadata.items()}
    index.storage_data = {
        type(k)(re.sub(pattern, replacement, k.fqn), k.offset, k.index): v for k, v in index.storage_data.items()
    }
    file.write_bytes(pickle.dumps(index))
    return target


def test_a_key_that_no_rule_takes(dense, tmp_path, capsys):
    """An architecture we do not know is refused by name, even when all experts have it."""
    (tmp_path / "sources").mkdir()
    odd = renamed(dense, tmp_path / "sources" / "odd", r"^output_layer\.weight$", "output_layer.scale")
    message = refused(expert_words({"a": odd, "b": odd}), tmp_path / "out", capsys)
    assert "output_layer.scale" in message and "0 rules" in message and str(odd) in message


def test_a_rule_that_finds_no_key(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    odd = rewrite(dense, tmp_path / "sources" / "odd", lambda key, t: None if key.startswith("embedding") else t)
    message = refused(expert_words({"a": odd, "b": odd}), tmp_path / "out", capsys)
    assert "word_embeddings" in message and str(odd) in message


def test_numbered_layers(dense, tmp_path, capsys):
    """Layers that are not stacked in one key are recognised, never guessed."""
    (tmp_path / "sources").mkdir()
    odd = renamed(dense, tmp_path / "sources" / "odd", r"^decoder\.layers\.mlp", "decoder.layers.0.mlp")
    message = refused(expert_words({"a": dense, "b": odd}), tmp_path / "out", capsys)
    assert "numbered layers" in message and "decoder.layers.0.mlp" in message


def test_a_mixture_is_no_expert(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    mixture = mix({"a": dense, "b": dense}, tmp_path / "sources" / "mix")
    message = refused(expert_words({"a": dense, "b": mixture}), tmp_path / "out", capsys)
    assert "b (" in message and "mixture of 2 experts" in message and "dense" in message


# --- tokenizers -----------------------------------------------------------------------------------------------


def tokenizer_pair(tmp_path: Path, dense: Path, names: tuple[str, str], contents: tuple[bytes, bytes], **more: object):
    """Two experts whose stored arguments name tokenizer files of the same name in two folders."""
    made = {}
    for number, (name, content) in enumerate(zip(("left", "right"), contents, strict=True)):
        folder = tmp_path / "sources" / name
        folder.mkdir(parents=True)
        (folder / names[number]).write_bytes(content)
        arguments = {key: str(folder / names[number]) if value is Path else value for key, value in more.items()}
        made[name] = rewrite(dense, folder / "checkpoint", arguments=arguments)
    return made


SENTENCEPIECE = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": Path}


def test_tokenizers_of_other_content(dense, tmp_path, capsys):
    experts = tokenizer_pair(tmp_path, dense, ("t.model", "t.model"), (b"one", b"two"), **SENTENCEPIECE)
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    for text in ("tokenizers differ", "left", "right", "--allow-other-tokenizer", "sha256"):
        assert text in message
    mix(experts, tmp_path / "out", "--allow-other-tokenizer")


def test_tokenizers_of_equal_content_elsewhere(dense, tmp_path):
    """Never by path: other folder, other file name, same bytes."""
    experts = tokenizer_pair(tmp_path, dense, ("t.model", "other.model"), (b"one", b"one"), **SENTENCEPIECE)
    mix(experts, tmp_path / "out")


def test_a_tokenizer_that_is_gone(dense, tmp_path, capsys):
    experts = tokenizer_pair(tmp_path, dense, ("t.model", "t.model"), (b"one", b"one"), **SENTENCEPIECE)
    (tmp_path / "sources" / "right" / "t.model").unlink()
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    assert "right" in message and "t.model" in message and "--allow-other-tokenizer" in message


@pytest.mark.parametrize("argument", ["vocab_file", "merge_file"])
def test_vocabulary_files_are_compared_too(argument, dense, tmp_path, capsys):
    """Byte-pair tokenizers name their files in other arguments than tokenizer_model."""
    more = {"tokenizer_type": "GPT2BPETokenizer", "tokenizer_model": None, argument: Path}
    experts = tokenizer_pair(tmp_path, dense, ("v", "v"), (b"one", b"two"), **more)
    assert "tokenizers differ" in refused(expert_words(experts), tmp_path / "out", capsys)


def test_other_kinds_and_sizes_of_tokenizer(dense, tmp_path, capsys):
    (tmp_path / "sources").mkdir()
    other = rewrite(dense, tmp_path / "sources" / "other", arguments={"vocab_size": 97})
    message = refused(expert_words({"left": dense, "right": other}), tmp_path / "out", capsys)
    assert "NullTokenizer of 96" in message and "NullTokenizer of 97" in message


# --- the output -----------------------------------------------------------------------------------------------


def test_an_output_that_exists(experts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("mine")
    message = refused(expert_words(experts), tmp_path / "out", capsys)
    assert str(tmp_path / "out") in message and "exists already" in message and "--overwrite" in message
    assert (tmp_path / "out" / "keep").read_text() == "mine"


@pytest.mark.parametrize("target", ["{root}", "{root}/iter_0000010", "{root}/..", "{root}/../link"])
def test_an_output_that_holds_a_source(target, dense, tmp_path, capsys):
    """Even with --overwrite, by another spelling of the path, or through a link."""
    root = shutil.copytree(dense, tmp_path / "folder" / "root")
    (tmp_path / "folder" / "link").symlink_to(root)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    output = Path(target.format(root=root))
    message = refused([*expert_words({"a": root, "b": dense}), "--overwrite"], output, capsys)
    assert "holds the expert a" in message
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_overwrite_replaces_nothing_but_a_checkpoint(experts, tmp_path, capsys):
    """A typing error in --output must not remove somebody's folder."""
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    message = refused([*expert_words(experts), "--overwrite"], tmp_path / "home", capsys)
    assert "home" in message and "not a checkpoint" in message
    assert (tmp_path / "home" / "thesis").is_dir()


def test_an_output_in_a_folder_that_cannot_be_made(experts, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = [*expert_words(experts)]
    from megatron_btx.mix.cli import main

    assert main([*words, "--output", str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "file") in error


def test_readers_know_nothing_of_a_foreign_index(dense):
    """The good checkpoint that all damaged ones were copied from is read without complaint."""
    assert len(TorchDistReader(dense / "iter_0000010").tensors) > 9
    assert json.loads((dense / "iter_0000010" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
