"""A model's parts are what its configuration and its tensors both say: what one has alone is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.mixing import convert_hf
from megatron_btx.mixing.loader import open_source
from tests.support.mixing import mix, rewrite
from tests.unit.mixing.checkpoints import expert_words, refused
from tests.unit.mixing.folders import CONFIG, FFN, HIDDEN, llama_folder, llama_tensors, safetensors_bytes

LAYER = "model.layers.1."
QKV = {f"{LAYER}self_attn.{name}_proj.bias": torch.zeros(size) for name, size in zip("qkv", (16, 8, 8), strict=True)}
QKV |= {key.replace("layers.1", "layers.0"): tensor for key, tensor in QKV.items()}
QK_NORMS = {f"model.layers.{layer}.self_attn.{name}_norm.weight": torch.ones(4) for layer in (0, 1) for name in "qk"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 4}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
SURPLUS: dict[str, tuple[dict[str, Any], str, torch.Tensor]] = {
    "bias of a query": ({"bias": True}, f"{LAYER}self_attn.q_proj.bias", torch.zeros(HIDDEN)),
    "bias of a query, said in vain": ({"qkv_bias": True}, f"{LAYER}self_attn.q_proj.bias", torch.zeros(HIDDEN)),
    "bias of an output": ({}, f"{LAYER}self_attn.o_proj.bias", torch.zeros(HIDDEN)),
    "bias of a gate": ({}, f"{LAYER}mlp.gate_proj.bias", torch.zeros(FFN)),
    "bias of a norm": ({}, f"{LAYER}input_layernorm.bias", torch.zeros(HIDDEN)),
    "bias of the last norm": ({}, "model.norm.bias", torch.zeros(HIDDEN)),
    "bias of the head": ({}, "lm_head.bias", torch.zeros(CONFIG["vocab_size"])),
    "norm of queries": ({}, f"{LAYER}self_attn.q_norm.weight", torch.ones(4)),
    "norm of queries in a Mistral": (MISTRAL, f"{LAYER}self_attn.q_norm.weight", torch.ones(4)),
    "router": ({}, f"{LAYER}mlp.gate.weight", torch.ones(4, HIDDEN)),
    "a third layer": ({}, "model.layers.2.input_layernorm.weight", torch.ones(HIDDEN)),
    "norm of queries in a Qwen2": (QWEN2, f"{LAYER}self_attn.q_norm.weight", torch.ones(4)),
    "output bias of a Qwen2": (QWEN2, f"{LAYER}self_attn.o_proj.bias", torch.zeros(HIDDEN)),
    "bias of a query in a Qwen3": (QWEN3, f"{LAYER}self_attn.q_proj.bias", torch.zeros(HIDDEN)),
}
ABSENT: dict[str, tuple[dict[str, Any], str]] = {
    "biases of a Qwen2": (QWEN2, "self_attn.q_proj.bias"),
    "norms of a Qwen3": (QWEN3, "self_attn.q_norm.weight"),
}


def folder_of(folder: Path, config: Mapping[str, Any], more: Mapping[str, torch.Tensor]) -> Path:
    """A pico model of a configuration, with the tensors of a Llama and more."""
    own = {"qwen2": QKV, "qwen3": QK_NORMS}.get(config.get("model_type", ""), {})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    held = llama_tensors() | (own if more else {}) | more
    (folder / "model.safetensors").write_bytes(safetensors_bytes(held))
    return folder


@pytest.mark.parametrize("case", SURPLUS)
def test_a_tensor_that_the_configuration_does_not_have(case, tmp_path, capsys):
    """Another family has it: that is no reason to take it."""
    config, key, tensor = SURPLUS[case]
    folder = folder_of(tmp_path / "model", config, {key: tensor})
    message = refused(expert_words({"a": folder, "b": folder}), tmp_path / "out", capsys)
    assert f"{key} is no tensor of the model" in message and str(folder) in message
    assert convert_hf.main(["import", "--hf-model", str(folder), "--output", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("case", ABSENT)
def test_a_part_of_the_configuration_without_tensors(case, tmp_path, capsys):
    """The result's configuration would say it, and a program that loads it would make something up."""
    config, key = ABSENT[case]
    folder = folder_of(tmp_path / "model", config, {})
    assert f"{key} is missing" in refused(expert_words({"a": folder, "b": folder}), tmp_path / "out", capsys)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint with biases on query, key and value."""
    place = tmp_path_factory.mktemp("imported")
    source = str(folder_of(place / "qwen2", QWEN2, QKV))
    assert convert_hf.main(["import", "--hf-model", source, "--output", str(place / "megatron")]) == 0
    return place / "megatron"


MEGATRON = {
    "no biases": ({"add_qkv_bias": False}, "linear_qkv.bias is no tensor of the model"),
    "biases everywhere": ({"add_bias_linear": True}, "linear_proj.bias is missing"),
    "norms of queries": ({"qk_layernorm": True}, "q_layernorm.weight is missing"),
    "LayerNorm": ({"normalization": "LayerNorm"}, "layer_norm_bias is missing"),
    "positions": ({"position_embedding_type": "learned_absolute"}, "position_embeddings.weight is missing"),
}


@pytest.mark.parametrize("case", MEGATRON)
def test_stored_arguments_that_say_other_parts(case, imported, tmp_path, capsys):
    arguments, said = MEGATRON[case]
    (tmp_path / "sources").mkdir()
    other = rewrite(imported, tmp_path / "sources" / "other", arguments=arguments)
    assert said in refused(expert_words({"a": other, "b": other}), tmp_path / "out", capsys)


def test_a_norm_under_both_its_names(tmp_path, capsys):
    """Mixtures are written with both; where they differ, nobody knows which of the two is meant."""
    mixture = mix({name: llama_folder(tmp_path / name, n) for n, name in enumerate("ab")}, tmp_path / "mix")
    open_source("mix", rewrite(mixture, tmp_path / "same"))
    other = rewrite(mixture, tmp_path / "other", lambda key, t: t + 1 if "pre_mlp_layernorm" in key else t)
    message = refused([*expert_words({"mix": other}), "--method", "copy"], tmp_path / "out", capsys)
    assert "pre_mlp_layernorm.weight is stored and is not decoder.layers.mlp.linear_fc1.layer_norm_weight" in message


def test_models_without_a_tokenizer_are_alike_in_both_formats(tmp_path, capsys):
    """Megatron's form of a folder without a tokenizer names the kind of none."""
    folder = llama_folder(tmp_path / "a", 1)
    assert convert_hf.main(["import", "--hf-model", str(folder), "--output", str(tmp_path / "b")]) == 0
    mix({"a": folder, "b": tmp_path / "b"}, tmp_path / "mix", "--dry-run")
    mix({"b": tmp_path / "b", "a": folder}, tmp_path / "mix", "--dry-run")
