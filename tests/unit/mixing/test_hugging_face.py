"""Hugging Face models to Megatron and back: bits, logits and losses, against transformers and the real Megatron."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.mixing import convert_hf
from tests.support.hugging_face import (
    DENSE,
    MODELS,
    assert_equal_logits,
    config_of,
    generated,
    loaded,
    logits,
    loss_in_megatron,
    loss_in_transformers,
    make_model,
    same_tensors,
    save,
    tensors,
    write_folder,
)
from tests.unit.mixing.checkpoints import tensors as megatron_tensors


def to_megatron(folder: Path, target: Path) -> Path:
    """Import a model folder."""
    assert convert_hf.main(["import", "--hf-model", str(folder), "--output", str(target), "--verify"]) == 0
    return target


def to_hugging_face(checkpoint: Path, target: Path) -> Path:
    """Export a Megatron checkpoint."""
    assert convert_hf.main(["export", "--checkpoint", str(checkpoint), "--output", str(target), "--verify"]) == 0
    return target


@dataclasses.dataclass(frozen=True)
class Trip:
    """One model: as transformers made and saved it, in Megatron's form, and back."""

    model: Any
    original: Path
    megatron: Path
    back: Path


Trips = Callable[[str], Trip]


@pytest.fixture(scope="module")
def trips(tmp_path_factory: pytest.TempPathFactory) -> Trips:
    folder = tmp_path_factory.mktemp("trips")

    @functools.cache
    def trip(name: str) -> Trip:
        model = make_model(MODELS[name])
        original = save(model, folder / name)
        megatron = to_megatron(original, folder / f"{name}-megatron")
        return Trip(model, original, megatron, to_hugging_face(megatron, folder / f"{name}-back"))

    return trip


def rows_differ(tensor: torch.Tensor) -> bool:
    """Whether no two rows of a tensor (numbers of a vector) are alike."""
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[:, None]
    return tensor.numel() == 0 or len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("name", list(MODELS))
def test_there_and_back(name, trips):
    """Every tensor has the same bits, and transformers computes the same logits and the same text."""
    trip = trips(name)
    assert all(rows_differ(t) for t in trip.model.state_dict().values()), "equal rows would hide swaps"
    left, right = tensors(trip.original), tensors(trip.back)
    assert left.keys() == right.keys()
    # A shared expert that adds nothing: no other format has it (test_shared_expert.py).
    meaningless = {key for key in left if ".shared_expert" in key}
    assert bool(meaningless) == (name == "qwen2_moe")
    for key in left.keys() - meaningless:
        assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), key
    before, after = logits(trip.model), logits(trip.back)
    assert_equal_logits(after, before)
    assert torch.equal(after, before), "the same bits in the same class"
    assert generated(loaded(trip.back)) == generated(trip.model)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_older_transformers_loads_what_is_written(name, trips, older):
    trip = trips(name)
    found, tokens = older.load(trip.back)
    assert_equal_logits(found, logits(trip.model))
    assert tokens == generated(trip.model)


# Windows need Transformer Engine in Megatron, and so a GPU.
@pytest.mark.parametrize("name", [*(name for name in DENSE if name != "mistral"), "mixtral", "qwen2_moe", "qwen3_moe"])
def test_megatron_computes_the_loss_of_transformers(name, trips, zygote, corpus, tmp_path):
    """The real Megatron, with the flags that lie beside the checkpoint: the same loss on the same tokens."""
    trip = trips(name)
    found = loss_in_megatron(zygote, trip.megatron, corpus, tmp_path)
    assert found == pytest.approx(loss_in_transformers(trip.model, corpus), abs=1e-5)


# --- other forms of sources -----------------------------------------------------------------------------------


def same_in_megatron(left: Path, right: Path) -> bool:
    """Whether two Megatron checkpoints hold the same model."""
    one, other = megatron_tensors(left), megatron_tensors(right)
    return one.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in one.items())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_experts(name, trips, tmp_path):
    """The names that transformers 5 has in memory, all experts in one tensor: the same checkpoint."""
    trip = trips(name)
    numbers = {k: v for k, v in trip.model.state_dict().items() if k != "lm_head.weight" or not tied(name)}
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in numbers)
    fused = write_folder(tmp_path / "fused", config_of(trip.original), numbers)
    assert same_in_megatron(to_megatron(fused, tmp_path / "out"), trip.megatron)


def tied(name: str) -> bool:
    """Whether a model's head is its embedding."""
    return MODELS[name]["tie_word_embeddings"]


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_sharded_sources(name, trips, tmp_path):
    """Several files with an index, as transformers cuts them."""
    trip = trips(name)
    sharded = save(trip.model, tmp_path / "sharded", shard_bytes=30_000)
    assert len(list(sharded.glob("model-*-of-*.safetensors"))) > 2
    assert same_in_megatron(to_megatron(sharded, tmp_path / "out"), trip.megatron)


def test_sharded_results(trips, tmp_path, monkeypatch):
    """Results over the limit are cut in files with an index, which transformers follows."""
    monkeypatch.setattr("megatron_btx.checkpoint.safetensors.SHARD_BYTES", 30_000)
    trip = trips("qwen3")
    back = to_hugging_face(trip.megatron, tmp_path / "back")
    files = list(back.glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and not (back / "model.safetensors").exists()
    assert same_tensors(back, trip.original)
    assert torch.equal(logits(back), logits(trip.model))


def test_leftover_rotary_frequencies(trips, tmp_path):
    """Old checkpoints carry them; they follow from the configuration."""
    trip = trips("llama")
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
    old = write_folder(tmp_path / "old", config_of(trip.original), tensors(trip.original) | extra)
    assert same_in_megatron(to_megatron(old, tmp_path / "out"), trip.megatron)


def test_a_head_stored_beside_a_tied_embedding(trips, tmp_path):
    """Some savers write it a second time: it is the embedding."""
    trip = trips("llama-tied")
    head = {"lm_head.weight": trip.model.state_dict()["lm_head.weight"]}
    assert not head.keys() & tensors(trip.original).keys()
    folder = write_folder(tmp_path / "head", config_of(trip.original), tensors(trip.original) | head)
    assert same_in_megatron(to_megatron(folder, tmp_path / "out"), trip.megatron)


def test_a_head_that_contradicts_tied_embeddings(trips, tmp_path, capsys):
    """The two transformers disagree about such a folder; it is refused rather than guessed."""
    trip = trips("llama-tied")
    head = trip.model.state_dict()["lm_head.weight"].clone()
    head[-1, -1] += 1e-6
    changed = tensors(trip.original) | {"lm_head.weight": head}
    folder = write_folder(tmp_path / "head", config_of(trip.original), changed)
    words = ["import", "--hf-model", str(folder), "--output", str(tmp_path / "out")]
    assert convert_hf.main(words) == 2
    error = capsys.readouterr().err
    assert "lm_head.weight" in error and "ties" in error and error.count("\n") == 1


def test_each_direction_takes_its_own_kind_of_source(trips, tmp_path, capsys):
    trip = trips("llama")
    for words in (["import", "--hf-model", trip.megatron], ["export", "--checkpoint", trip.original]):
        assert convert_hf.main([*map(str, words), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "import takes a Hugging Face model folder, export a Megatron checkpoint" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_half_precision_is_moved_bit_for_bit(name, dtype, tmp_path):
    model = make_model(MODELS[name] | {"torch_dtype": dtype}, seed=1)
    original = save(model, tmp_path / "original", dtype)
    assert {t.dtype for t in tensors(original).values()} == {getattr(torch, dtype)}
    megatron = to_megatron(original, tmp_path / "megatron")
    assert {t.dtype for t in megatron_tensors(megatron).values()} == {getattr(torch, dtype)}
    flag = {"bfloat16": "--bf16", "float16": "--fp16"}[dtype]
    assert flag in (megatron / "megatron_args.txt").read_text().split()
    back = to_hugging_face(megatron, tmp_path / "back")
    assert same_tensors(original, back) and config_of(back)["torch_dtype"] == dtype
    assert torch.equal(logits(back), logits(model))


def test_configurations_of_both_transformers_are_one(trips, tmp_path):
    """A folder as transformers 4 wrote it (torch_dtype, rope_theta, rope_scaling) gives the same checkpoint."""
    for name in ("llama-tied", "mixtral"):
        trip = trips(name)
        architecture = config_of(trip.original)["architectures"]
        old = write_folder(tmp_path / name, MODELS[name] | {"architectures": architecture}, tensors(trip.original))
        assert "rope_parameters" in config_of(trip.original)
        out = to_megatron(old, tmp_path / f"{name}-out")
        assert same_in_megatron(out, trip.megatron)
        assert (out / "megatron_args.txt").read_text() == (trip.megatron / "megatron_args.txt").read_text()


# --- what travels along ---------------------------------------------------------------------------------------


def with_text_files(source: Path, target: Path) -> tuple[Path, dict[str, bytes]]:
    """A copy with the files that make tokens and text of a model."""
    shutil.copytree(source, target)
    files = {
        "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}',
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "generation_config.json": b'{"temperature": 0.5, "do_sample": true, "eos_token_id": [2, 3]}',
    }
    for name, content in files.items():
        (target / name).write_bytes(content)
    return target, files


def test_tokenizer_and_generation_files_travel_along(trips, tmp_path):
    """To Megatron's checkpoint and, from there or directly, to a model folder: byte for byte."""
    source, files = with_text_files(trips("llama").original, tmp_path / "source")
    (source / "training_args.bin").write_bytes(b"no part of the model")
    megatron = to_megatron(source, tmp_path / "megatron")
    flags = shlex.split((megatron / "megatron_args.txt").read_text())
    assert flags[flags.index("--tokenizer-type") + 1] == "HuggingFaceTokenizer"
    tokenizer = Path(flags[flags.index("--tokenizer-model") + 1])
    back = to_hugging_face(megatron, tmp_path / "back")
    for folder in (tokenizer, back):
        found = {name: (folder / name).read_bytes() for name in files}
        generation = json.loads(found.pop("generation_config.json"))
        assert found == {name: content for name, content in files.items() if name in found}
        given = {"temperature": 0.5, "do_sample": True, "eos_token_id": [2, 3]}
        assert generation == given | ({"bos_token_id": 1} if folder == back else {}), "completed, nothing replaced"
        assert not (folder / "training_args.bin").exists()
    assert config_of(back)["eos_token_id"] == 2 and config_of(back)["bos_token_id"] == 1
    assert loaded(back).generation_config.eos_token_id == [2, 3]
