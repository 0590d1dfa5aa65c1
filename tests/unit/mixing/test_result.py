"""What lies beside the tensors of a mix: entries, stored arguments, flags, manifest; and that --verify sees damage."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from megatron_btx.common.errors import CheckpointError
from megatron_btx.mixing.cli import main
from megatron_btx.mixing.staging import Workplace
from megatron_btx.mixing.verify import check_manifest
from tests.support import pico
from tests.support.mixing import mix, planned, rewrite, verify
from tests.unit.mixing.checkpoints import byte_entry, expert_words, index, refused, tensors

LAYERS = range(pico.LAYERS)
COMMON = "common_state/shard_0_1"


@pytest.fixture(scope="module")
def mixed(experts, tmp_path_factory) -> Path:
    return mix(experts, tmp_path_factory.mktemp("result") / "mix", "--router-seed", "42")


def entries(path: Path) -> set[str]:
    """All keys of a checkpoint that are not the optimizer's."""
    return {key for key in index(path).state_dict_metadata if not key.startswith("optimizer.")}


def test_megatrons_convention_for_converted_weights(mixed):
    """A tracker that says release, and the folder it names with index, format file and data."""
    assert (mixed / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert sorted(file.name for file in mixed.iterdir()) == [
        "latest_checkpointed_iteration.txt",
        "manifest.json",
        "megatron_args.txt",
        "release",
    ]
    assert json.loads((mixed / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_the_extra_states_of_transformer_engine_layers(mixed):
    """The keys that Transformer Engine's mixture layers ask for, spelled out: loading fails where one is missing."""
    expected = {"decoder.final_layernorm._extra_state/shard_0_1"}
    for layer in LAYERS:
        for module in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "self_attention.core_attention",
            "pre_mlp_layernorm",
        ):
            expected.add(f"decoder.layers.{module}._extra_state/shard_{layer}_{pico.LAYERS}")
        for expert in range(3):
            for matrix in ("linear_fc1", "linear_fc2"):
                place = f"shard_{layer}.{expert}_{pico.LAYERS}.3"
                expected.add(f"decoder.layers.mlp.experts.experts.{matrix}._extra_state/{place}")
    assert expected <= entries(mixed)
    for key in expected:
        assert byte_entry(mixed, key) == [None]


def test_what_megatron_itself_saves_is_there(experts, zygote, corpus, tmp_path):
    """Every key of a mixture that Megatron made and saved with local layers is in a mix of as many experts."""
    arguments = [*pico.train(corpus, 1, moe=True), "--save", str(tmp_path / "own"), "--save-interval", "1"]
    zygote.run(1, [*arguments, "--num-experts", "3", "--no-save-optim", "--no-save-rng"], tmp_path / "log")
    own = entries(tmp_path / "own") - {key for key in entries(tmp_path / "own") if key.startswith("rerun_state")}
    mixture = mix(experts, tmp_path / "mix")
    assert own <= entries(mixture)
    for key, tensor in tensors(tmp_path / "own").items():
        assert tensors(mixture)[key].shape == tensor.shape


def test_stored_arguments_describe_the_mixture(experts, mixed):
    """The experts' arguments, a mixture's settings, nothing of the experts' runs."""
    (state,) = byte_entry(mixed, COMMON)
    stored = vars(state["args"])
    wanted = {
        "num_experts": 3,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": 48,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "hidden_size": 32,
        "num_layers": pico.LAYERS,
        "swiglu": True,
        "normalization": "RMSNorm",
        "padded_vocab_size": pico.PADDED_VOCABULARY,
        "iteration": 0,
        "consumed_train_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    assert {name: stored[name] for name in wanted} == wanted
    assert state["iteration"] == 0
    assert not {"optimizer", "opt_param_scheduler", "rerun_state_machine"} & set(state)
    (source,) = byte_entry(experts["code"], COMMON)
    assert vars(source["args"])["consumed_train_samples"] == 40, "else the zero above means nothing"


def test_stored_arguments_are_of_builtin_types(mixed):
    """PyTorch's restricted loader takes them with nothing allowed but the namespace."""
    entry = index(mixed).storage_data
    (info,) = (i for key, i in entry.items() if key.fqn == COMMON)
    with (mixed / "release" / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        record = file.read(info.length)
    with torch.serialization.safe_globals([argparse.Namespace]):
        ((state),) = torch.load(io.BytesIO(record), weights_only=True)

    def check(name, value):
        if isinstance(value, (list, tuple)):
            for part in value:
                check(name, part)
        else:
            assert type(value) in (bool, int, float, str, type(None)), f"{name} is a {type(value)}"

    for name, value in vars(state["args"]).items():
        check(name, value)


def test_top_1_stores_the_full_softmax(dense, tmp_path):
    """With one expert per token, softmax over it alone would be constant; Megatron refuses that."""
    (state,) = byte_entry(mix({"a": dense, "b": dense}, tmp_path / "mix", "--moe-router-topk", "1"), COMMON)
    assert state["args"].moe_router_topk == 1 and state["args"].moe_router_pre_softmax is True


def test_flags_are_one_a_line_and_describe_the_model(mixed):
    """megatron_args.txt: what of the model's command line must be there, once each."""
    text = (mixed / "megatron_args.txt").read_text()
    lines = [shlex.split(line) for line in text.splitlines()]
    flags = {words[0]: words[1:] for words in lines}
    assert len(flags) == len(lines)
    for word in pico.MODEL:
        # The pico model's epsilon is Megatron's default, which needs no flag.
        if word.startswith("--") and word != "--norm-epsilon":
            assert word in flags, word
    expected = {
        "--num-experts": ["3"],
        "--moe-router-dtype": ["fp32"],
        "--moe-ffn-hidden-size": ["48"],
        "--moe-token-dispatcher-type": ["alltoall"],
        "--num-query-groups": ["2"],
        "--swiglu": [],
        "--disable-bias-linear": [],
        "--seq-length": ["32"],
        "--ckpt-format": ["torch_dist"],
        "--tokenizer-type": ["NullTokenizer"],
        "--vocab-size": ["96"],
        "--padded-vocab-size": ["128"],
    }
    assert {flag: flags[flag] for flag in expected} == expected


def hash_by_blocks(tensor, blocks) -> str:
    """The hash of a tensor as the manifest defines it: of its blocks' hashes, where there are several."""
    numbers = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    parts = [numbers[tuple(slice(o, o + s) for o, s in zip(b["offsets"], b["sizes"], strict=True))] for b in blocks]
    assert sum(part.numel() for part in parts) == tensor.numel()
    hashes = [hashlib.sha256(part.contiguous().numpy().tobytes()) for part in parts]
    assert [h.hexdigest() for h in hashes] == [b["sha256"] for b in blocks]
    return (
        hashes[0].hexdigest() if len(hashes) == 1 else hashlib.sha256(b"".join(h.digest() for h in hashes)).hexdigest()
    )


def test_the_manifest_tells_the_truth(experts, mixed):
    """Hashes of contents and of the experts' indices, recomputed; names, order, seed, rules."""
    manifest = json.loads((mixed / "manifest.json").read_text())
    result = tensors(mixed)
    assert set(manifest["tensors"]) == set(result)
    for key, tensor in result.items():
        told = manifest["tensors"][key]
        assert told["sha256"] == hash_by_blocks(tensor, told["blocks"]), key
        assert told["shape"] == list(tensor.shape) and told["dtype"] == "float32"
    assert manifest["method"] == "btx" and manifest["router"] == {"init": "normal", "seed": 42, "std": 0.02}
    assert [expert["name"] for expert in manifest["experts"]] == list(experts)
    for told in manifest["experts"]:
        digest = hashlib.sha256((Path(told["path"]) / ".metadata").read_bytes()).hexdigest()
        assert told["index_sha256"] == digest
    operations = {key: told["operation"] for key, told in manifest["tensors"].items()}
    assert operations["decoder.layers.mlp.router.weight"] == "router"
    assert operations["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == "move"
    assert operations["output_layer.weight"] == "average"


def test_hashes_of_bf16_tensors(dense, tmp_path):
    """The bytes as stored, also where numpy has no such type."""
    half = rewrite(dense, tmp_path / "half", lambda key, tensor: tensor.bfloat16(), {"bf16": True})
    mixture = mix({"a": half, "b": half}, tmp_path / "mix")
    manifest = json.loads((mixture / "manifest.json").read_text())
    for key, tensor in tensors(mixture).items():
        assert manifest["tensors"][key]["sha256"] == hash_by_blocks(tensor, manifest["tensors"][key]["blocks"])


SEED_42 = {"router_seed": 42}


def flip_a_bit_of(folder: Path, key: str) -> None:
    """Flip the lowest bit of one byte in the middle of a tensor's last block of numbers."""
    entry = [(k, info) for k, info in index(folder).storage_data.items() if k.fqn == key][-1]
    file = folder / "release" / entry[1].relative_path
    content = bytearray(file.read_bytes())
    start, end = entry[1].offset, entry[1].offset + entry[1].length
    numbers = torch.load(io.BytesIO(content[start:end]), weights_only=True)
    place = content.index(numbers.numpy().tobytes(), start, end) + numbers.nbytes // 2
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.mlp.experts.experts.linear_fc2.weight",
        "decoder.layers.mlp.router.weight",
        "decoder.layers.pre_mlp_layernorm.weight",
        "output_layer.weight",
    ],
)
def test_verify_finds_one_flipped_bit(key, experts, mixed, tmp_path):
    """PyTorch reads the damaged file without a word; the comparison names the tensor."""
    damaged = shutil.copytree(mixed, tmp_path / "damaged")
    verify(experts, damaged, **SEED_42)
    check_manifest(damaged)
    flip_a_bit_of(damaged, key)
    for check in (lambda: verify(experts, damaged, **SEED_42), lambda: check_manifest(damaged)):
        with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
            check()


def test_verify_finds_a_missing_tensor(experts, dense, tmp_path):
    """A result of other rules is not this plan's result."""
    other = mix({"a": dense, "b": dense}, tmp_path / "mix", "--method", "average")
    with pytest.raises(CheckpointError, match="planned and stored tensors differ"):
        verify(experts, other, **SEED_42)


def test_verify_on_the_command_line(experts, tmp_path, capsys):
    """--verify says what it compared."""
    assert main([*expert_words(experts), "--output", str(tmp_path / "mix"), "--verify"]) == 0
    assert "verified: all 11 tensors" in capsys.readouterr().out


def test_a_result_that_fails_verification_is_not_published(experts, tmp_path, capsys, monkeypatch):
    """Damage while writing, seen by --verify: one line, and no output that loads."""
    honest, slot = (
        Workplace.write,
        next(
            task.slot
            for task in planned(experts, tmp_path / "mix")[1].tasks
            if task.block.tensor == "output_layer.weight"
        ),
    )

    def lying(self, file, position, content):
        content = bytes(content)
        honest(
            self, file, position, bytes([content[0] ^ 1]) + content[1:] if position == slot.position_bytes else content
        )

    monkeypatch.setattr(Workplace, "write", lying)
    message = refused([*expert_words(experts), "--verify"], tmp_path / "mix", capsys)
    assert "output_layer.weight" in message
