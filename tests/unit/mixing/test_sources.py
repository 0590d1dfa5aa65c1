"""Whatever wrote the experts: other layouts, older argument files, other architectures. With the real Megatron."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_btx.runner.run_dir import read_evaluation
from tests.support import pico
from tests.support.mixing import mix, rewrite
from tests.support.runner import Zygote, read_losses
from tests.unit.mixing.checkpoints import byte_entry, expert_words, refused, same_bits, tensors

LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
    "pp2-vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    "dp2-distributed": "--use-distributed-optimizer",
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_experts_saved_under_another_layout(layout, experts, zygote, corpus, tmp_path):
    """The same weights saved by two ranks, cut otherwise: the same mix to the last bit."""
    arguments = [*pico.train(corpus, 1), "--lr", "0", "--pretrained-checkpoint", str(experts["wiki"])]
    arguments += ["--save", str(tmp_path / "again"), "--save-interval", "1", *LAYOUTS[layout].split()]
    zygote.run(2, arguments, tmp_path / "log")
    again, source = tensors(tmp_path / "again"), tensors(experts["wiki"])
    assert all(same_bits(again[key], source[key]) for key in source), "a learning rate of zero moves nothing"
    expected = tensors(mix(experts, tmp_path / "expected"))
    found = tensors(mix({**experts, "wiki": tmp_path / "again"}, tmp_path / "found"))
    assert all(same_bits(found[key], expected[key]) for key in expected)


def with_common_pt(source: Path, target: Path) -> Path:
    """A copy in the form of older versions: no common_state in the index, but a file common.pt."""
    shutil.copytree(source, target)
    torch.save(byte_entry(target, "common_state/shard_0_1")[0], target / "common.pt")
    index = pickle.loads((target / ".metadata").read_bytes())
    del index.state_dict_metadata["common_state/shard_0_1"]
    index.storage_data = {key: info for key, info in index.storage_data.items() if key.fqn != "common_state/shard_0_1"}
    (target / ".metadata").write_bytes(pickle.dumps(index))
    return target


def test_arguments_in_common_pt(dense, experts, tmp_path):
    """Megatron up to 0.16: the same mix, the same stored arguments."""
    older = with_common_pt(dense / "iter_0000010", tmp_path / "older")
    found = mix({"a": older, "b": experts["math"]}, tmp_path / "found")
    expected = mix({"a": dense, "b": experts["math"]}, tmp_path / "expected")
    assert all(same_bits(tensor, tensors(expected)[key]) for key, tensor in tensors(found).items())
    one, other = (vars(byte_entry(path, "common_state/shard_0_1")[0]["args"]) for path in (found, expected))
    assert one == other and one["num_experts"] == 2
    assert (found / "megatron_args.txt").read_text() == (expected / "megatron_args.txt").read_text()


def model(changes: str, without: str) -> list[str]:
    """The pico model's flags with some changed: appended, or taken out with their values."""
    words, removed = list(pico.MODEL), without.split()
    kept: list[str] = []
    skipping = False
    for word in words:
        skipping = word in removed if word.startswith("--") else skipping
        if not skipping:
            kept.append(word)
    return kept + changes.split()


ARCHITECTURES = {
    # As GPT-2: LayerNorm and biases everywhere, learned positions, tied embeddings, ungated, every head its own key.
    "gpt2": model(
        "--normalization LayerNorm --position-embedding-type learned_absolute",
        "--swiglu --untie-embeddings-and-output-weights --disable-bias-linear --group-query-attention "
        "--num-query-groups --normalization --position-embedding-type",
    ),
    # As Qwen: biases in attention alone, QK norm, another epsilon and rotary base, and head size.
    "qwen": model(
        "--add-qkv-bias --qk-layernorm --norm-epsilon 1e-3 --rotary-base 500 --kv-channels 16", "--norm-epsilon"
    ),
    # As Llama 3.2: tied, scaled rotary positions, squared ReLU for good measure.
    "llama": model(
        "--use-rope-scaling --rope-scaling-factor 4 --squared-relu", "--untie-embeddings-and-output-weights --swiglu"
    ),
}


class Architecture:
    """One architecture: a checkpoint of it whose every tensor is far from its initialisation, and losses of models."""

    def __init__(self, name: str, zygote: Zygote, corpus: Path, folder: Path) -> None:
        self.name, self.zygote, self.corpus, self.folder = name, zygote, corpus, folder
        self.train("made", "--save", str(folder / "made"), "--save-interval", "1")
        generator = torch.Generator().manual_seed(3)
        self.dense = rewrite(
            folder / "made", folder / "dense", lambda key, t: t + 0.05 * torch.randn(t.shape, generator=generator)
        )
        self.dense_loss = self.loss("dense", self.dense)

    def train(self, name: str, *more: str) -> float:
        """The loss of the first step of training."""
        arguments = [*ARCHITECTURES[self.name], *pico.TRAINING, "--train-iters", "1", *more]
        arguments += ["--train-data-path", str(self.corpus), "--data-cache-path", str(self.folder / "cache")]
        arguments += ["--btx-metrics", str(self.folder / f"{name}.jsonl")]
        self.zygote.run(1, arguments, self.folder / f"log-{name}")
        return read_losses(self.folder / f"{name}.jsonl")[1]

    def loss(self, name: str, checkpoint: Path, *more: str) -> float:
        """The loss of the first step from a checkpoint; under evaluation where Megatron cannot train.

        Its local mixture layers add the second bias in place to a view, which autograd forbids (core/transformer/mlp.py
        in 0.19.2); Transformer Engine's layers do without.
        """
        if self.name != "gpt2":
            return self.train(name, "--pretrained-checkpoint", str(checkpoint), *more)
        output = self.folder / f"{name}.json"
        arguments = [*ARCHITECTURES[self.name], "--micro-batch-size", "2", *more, "--btx-eval-output", str(output)]
        arguments += ["--btx-eval-tokens", "1024", "--btx-eval-data", f"text={self.corpus}"]
        arguments += ["--btx-eval-model", f"{name}={checkpoint}"]
        self.zygote.run(1, arguments, self.folder / f"log-{name}", entry="megatron_btx.evaluation.program")
        return read_evaluation(output).models[name].losses["text"]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def architecture(request, zygote, corpus, tmp_path_factory) -> Architecture:
    return Architecture(request.param, zygote, corpus, tmp_path_factory.mktemp(request.param))


PARTS = {
    "gpt2": [
        "mlp.experts.experts.linear_fc1.bias",
        "mlp.experts.experts.linear_fc2.bias",
        "pre_mlp_layernorm.bias",
        "mlp.linear_fc1.layer_norm_bias",
        "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.bias",
        "mlp.router.bias",
    ],
    "qwen": [
        "self_attention.linear_qkv.bias",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
    ],
    "llama": [],
}


def test_equal_experts_are_the_dense_model(architecture):
    """Mixed and loaded by Megatron: the dense model's loss; every part is in the mix."""
    name, source = architecture.name, architecture.dense
    mixture = mix({"a": source, "b": source, "c": source}, architecture.folder / "mix")
    keys = set(tensors(mixture))
    assert {f"decoder.layers.{part}" for part in PARTS[name]} <= keys
    assert ("decoder.layers.mlp.router.bias" in keys) == (name == "gpt2")
    assert ("output_layer.weight" in keys) == (name == "qwen")
    assert ("embedding.position_embeddings.weight" in keys) == (name == "gpt2")
    moe = "--num-experts 3 --moe-router-topk 2 --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall"
    assert architecture.loss("mix", mixture, *moe.split()) == pytest.approx(architecture.dense_loss, abs=1e-6)


def test_the_average_of_equal_experts_is_the_dense_model(architecture):
    """--method average: loads as a dense model, with the very same loss."""
    source = architecture.dense
    average = mix({"a": source, "b": source, "c": source}, architecture.folder / "average", "--method", "average")
    assert architecture.loss("average", average) == architecture.dense_loss


def test_a_shared_expert_is_refused_by_name(zygote, corpus, tmp_path, capsys):
    """Megatron trains mixtures with one; no method says what becomes of it."""
    arguments = [*pico.train(corpus, 1, moe=True), "--moe-shared-expert-intermediate-size", "16"]
    arguments += ["--moe-shared-expert-gate", "--save", str(tmp_path / "sources" / "shared"), "--save-interval", "1"]
    zygote.run(1, arguments, tmp_path / "sources" / "log")
    shared = tmp_path / "sources" / "shared"
    words = [*expert_words({"a": shared, "b": shared}), "--method", "average"]
    message = refused(words, tmp_path / "out", capsys)
    assert "mlp.shared_experts." in message and "without --moe-shared-expert-intermediate-size" in message
