"""Folders of Megatron-Bridge and NeMo 2: read where the YAML beside the tensors says the model, else refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.mixing import convert_hf
from megatron_btx.mixing.loader import open_source
from tests.support.hugging_face import same_tensors
from tests.support.mixing import write_checkpoint
from tests.unit.mixing.folders import CONFIG, FFN, HIDDEN, LAYERS, VOCABULARY, llama_folder

MODEL: dict[str, Any] = {
    "_target_": "megatron.bridge.models.llama.llama_provider.Llama3ModelProvider",
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": None,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": True,
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "position_embedding_type": "rope",
    "rotary_base": 500000,
    "rotary_percent": 1.0,
    "share_embeddings_and_output_weights": False,
    "qk_layernorm": False,
    "seq_length": 64,
    "window_size": None,
    "softmax_scale": None,
    "vocab_size": VOCABULARY,
    "params_dtype": {"_target_": "torch.float32", "_call_": False},
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.01,
    "transformer_layer_spec": {"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False},
}
"""The model section of a run_config.yaml, without what says nothing of the model's function."""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A pico Llama of Hugging Face's form, whose rotary base only a configuration can say."""
    folder = llama_folder(tmp_path_factory.mktemp("nemo") / "original", 3)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 500000.0}))
    return folder


@pytest.fixture(scope="module")
def tensors(original) -> dict[str, tuple[torch.Tensor, int]]:
    """Its tensors as Megatron stores them."""
    megatron = original.parent / "megatron"
    assert convert_hf.main(["import", "--hf-model", str(original), "--output", str(megatron)]) == 0
    reader = TorchDistReader(resolve_iteration(megatron))
    found = {key: reader.read(key, (0,) * len(stored.shape), stored.shape) for key, stored in reader.tensors.items()}
    return {key: (tensor, 1 if key.startswith("decoder.layers.") else 0) for key, tensor in found.items()}


def bridge(root: Path, tensors: dict, config: object, objects: dict | None = None) -> Path:
    """A root as Megatron-Bridge leaves it."""
    folder = write_checkpoint(root / "iter_0000007", tensors, objects or {})
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    (folder / "run_config.yaml").write_text(text)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return root


def nemo(root: Path, tensors: dict, config: object) -> Path:
    """A folder as NeMo 2 leaves it: names begin with ``module.``, the optimizer's do not."""
    named = {f"module.{key}": value for key, value in tensors.items()}
    named["optimizer.state.exp_avg.module.output_layer.weight"] = (torch.zeros(2), 0)
    write_checkpoint(root / "weights", named, {})
    (root / "context").mkdir()
    (root / "context" / "model.yaml").write_text(yaml.safe_dump(config))
    return root


def exported(folder: Path, out: Path) -> dict[str, Any]:
    """Export a folder to Hugging Face's form; its configuration."""
    assert convert_hf.main(["export", "--checkpoint", str(folder), "--output", str(out), "--verify"]) == 0
    return json.loads((out / "config.json").read_text())


def check_exported(config: dict[str, Any]) -> None:
    expected = {key: CONFIG[key] for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "torch_dtype")}
    expected |= {"rope_theta": 500000.0, "initializer_range": 0.01, "max_position_embeddings": 64}
    assert {key: config[key] for key in expected} == expected and config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("nested", [False, True])
def test_megatron_bridge_is_read(nested, original, tensors, tmp_path):
    """Bit for bit, with all fields under ``model``, or with those of the layers in a section of their own."""
    section = {"transformer": MODEL, "seq_length": 64} if nested else MODEL
    folder = bridge(tmp_path / "bridge", tensors, {"model": section, "train": {"train_iters": 7}})
    check_exported(exported(folder, tmp_path / "out"))
    assert same_tensors(original, tmp_path / "out")


def test_nemo_2_is_read(original, tensors, tmp_path):
    """The folder that holds weights and context, or the weights alone."""
    description = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": MODEL}
    folder = nemo(tmp_path / "nemo", tensors, description)
    for number, place in enumerate((folder, folder / "weights")):
        check_exported(exported(place, tmp_path / f"out{number}"))
        assert same_tensors(original, tmp_path / f"out{number}")


def test_the_tokenizer_beside_is_found(tensors, tmp_path):
    folder = nemo(tmp_path / "nemo", tensors, {"config": MODEL})
    (folder / "context" / "nemo_tokenizer").mkdir()
    (folder / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")
    arguments = open_source("model", folder).arguments
    assert arguments["tokenizer_model"] == str(folder / "context" / "nemo_tokenizer")


def test_stored_arguments_come_first(original, tensors, tmp_path):
    """Where Megatron-LM's own arguments are there, a file beside them says nothing new."""
    reader = TorchDistReader(resolve_iteration(original.parent / "megatron"))
    objects = {"common_state/shard_0_1": [reader.common_state()]}
    folder = bridge(tmp_path / "both", tensors, {"model": MODEL | {"rotary_base": 7}}, objects)
    assert open_source("model", folder).arguments["rotary_base"] == 500000


def test_llama_3_scaling_by_its_numbers(tensors, tmp_path):
    numbers = {"scale_factor": 32.0, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
    folder = bridge(tmp_path / "bridge", tensors, {"model": MODEL | numbers})
    config = exported(folder, tmp_path / "out")
    assert (config["rope_scaling"]["rope_type"], config["rope_scaling"]["factor"]) == ("llama3", 32.0)


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in MODEL.items() if key not in names}


REFUSED: dict[str, tuple[object, str]] = {
    "fields that are not said": (
        {"model": _without("num_layers", "qk_layernorm")},
        "does not say num_layers, qk_layernorm, for which Llama3ModelProvider has values of its own.*export_ckpt",
    ),
    "another activation": (
        {"model": MODEL | {"activation_func": {"_target_": "megatron.core.fusions.fast_gelu"}}},
        "activation_func is 'fast_gelu', expected .* with gated_linear_unit True",
    ),
    "a softmax of its own": ({"model": MODEL | {"softmax_scale": 0.1}}, "softmax_scale is 0.1, expected none"),
    "another Llama 3 scaling": (
        {"model": MODEL | {"scale_factor": 8.0, "low_freq_factor": 2, "high_freq_factor": 4, "old_context_len": 8192}},
        "low_freq_factor is 2, expected 1",
    ),
    "an adapter": (
        {"model": MODEL, "peft": {"_target_": "megatron.bridge.peft.lora.LoRA"}},
        "peft is 'LoRA'.*merge",
    ),
    "a size that is none of the tensors'": ({"model": MODEL | {"ffn_hidden_size": 48}}, "do not belong together"),
    "no YAML": ("model: [", "is not YAML"),
    "a list": ([1, 2], "holds a list, expected a mapping"),
    "without bottom": ("[" * 5000, "is not YAML"),
    "a section within itself": (
        yaml.safe_dump({"model": _without("num_layers")}) + "  config: &a\n    config: *a\n",
        "does not say num_layers",
    ),
    "a switch of words": ({"model": MODEL | {"bf16": "false"}}, "bf16 is 'false', expected.*without quotes"),
    "shared in words": ({"model": MODEL | {"share_embeddings_and_output_weights": "no"}}, "is 'no', expected a number"),
    "a number in quotes": (
        {"model": MODEL | {"layernorm_epsilon": "1e-5"}},
        "is '1e-5', expected a number",
    ),
    "a size of words": ({"model": MODEL | {"num_layers": "2"}}, "num_layers is '2', expected a number"),
    "a size of a fraction": ({"model": MODEL | {"hidden_size": 16.0}}, "hidden_size = 16.0, expected a positive"),
    "heads in a list": ({"model": MODEL | {"num_query_groups": [2]}}, "num_query_groups = .2., expected a positive"),
    "a scaling without its factor": (
        {"model": MODEL | {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}},
        "scale_factor is missing, expected a number",
    ),
    "a switch that is none": ("a: !!bool x", "is not YAML"),
    "a time that is none": ("a: !!timestamp x", "is not YAML"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_known_is_refused(case, tensors, tmp_path):
    config, message = REFUSED[case]
    folder = bridge(tmp_path / "bridge", tensors, config)
    with pytest.raises(InputError, match=message):
        open_source("model", folder)


def test_a_nemo_folder_without_its_description(tensors, tmp_path):
    folder = nemo(tmp_path / "nemo", tensors, {"config": MODEL})
    (folder / "context" / "model.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"model\.yaml: does not exist.*llm\.export_ckpt"):
        open_source("model", folder)


def test_nothing_in_a_description_runs(tensors, tmp_path):
    """Tags of Python objects and names of callables stay text."""
    mark = tmp_path / "was here"
    hostile = (
        f"x: !!python/object/apply:os.mkdir ['{mark}']\ny: {{_target_: os.mkdir, _args_: ['{mark}'], _call_: true}}\n"
    )
    folder = bridge(tmp_path / "bridge", tensors, hostile + yaml.safe_dump({"model": MODEL}))
    assert open_source("model", folder).sizes.hidden == HIDDEN
    assert not mark.exists()
    shutil.rmtree(folder)
