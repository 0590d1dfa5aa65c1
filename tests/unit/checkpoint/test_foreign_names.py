"""Names that wrappers give to tensors, and keys of configurations that nobody here knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.checkpoint.huggingface.config import arguments_from_config
from megatron_btx.checkpoint.huggingface.foreign_names import unwrap_names
from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.mixing.loader import open_source
from tests.unit.mixing.folders import CONFIG, llama_folder, llama_tensors, safetensors_bytes

WRAPPED = {
    "data parallel": lambda name: "module." + name,
    "torch.compile": lambda name: "_orig_mod." + name,
    "compiled and data parallel": lambda name: "module._orig_mod." + name,
    "an adapter's model": lambda name: "base_model.model." + name,
    "FSDP": lambda name: "_fsdp_wrapped_module." + name,
    "a multimodal model of old": lambda name: "language_model." + name,
    "a multimodal model of today": lambda name: (
        name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
    ),
    "FSDP in each layer": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointing in each layer": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "a compiled layer": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
}


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    llama_folder(folder)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


@pytest.mark.parametrize("wrapper", list(WRAPPED))
def test_wrapped_names_are_read_as_what_they_wrap(wrapper, tmp_path):
    plain = llama_tensors(1)
    folder = _write(tmp_path / "model", {WRAPPED[wrapper](name): tensor for name, tensor in plain.items()})
    source = open_source("model", folder)
    assert source.reader.tensors.keys() == plain.keys()
    assert torch.equal(source.read("layers.1.ffn.up.weight", 0, 24), plain["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("word", ["module.", "base_model.model.", "language_model."])
def test_a_word_before_some_names_is_refused(word, tmp_path):
    tensors = {name if "norm" in name else word + name: tensor for name, tensor in llama_tensors(1).items()}
    with pytest.raises(CheckpointError, match=rf"model \(.*has '{word}' before its name.*has not.*save the wrapped"):
        open_source("model", _write(tmp_path / "model", tensors))


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(CheckpointError, match=r"_orig_mod\.a and a are one tensor under two names"):
        unwrap_names({"a": 1, "_orig_mod.a": 2}, "here")


@pytest.mark.parametrize("name", ["q_proj.lora_A.default.weight", "q_proj.base_layer.weight"])
def test_parts_of_an_adapter_are_refused(name, tmp_path):
    tensors = llama_tensors(1)
    tensors[f"base_model.model.model.layers.0.self_attn.{name}"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=rf"{name} is a part of a LoRA.*merge it first"):
        open_source("model", _write(tmp_path / "model", tensors))


# --- keys of config.json --------------------------------------------------------------------------------------

UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "a cap of the logits": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, expected None or 0"),
    "a cap of attention": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "a scale of the logits": ({"logit_scale": 0.0625}, "logit_scale is 0.0625, expected None or 1"),
    "Granite's scales": ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
    "Granite's logits": ({"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    "a scale of attention": ({"attention_multiplier": 0.015}, "attention_multiplier is 0.015"),
    "MiniCPM's scales": ({"scale_depth": 1.4}, "scale_depth is 1.4"),
    "clipped projections": ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    "layers without positions": ({"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]"),
    "chunks": ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192"),
    "attention both ways": ({"is_causal": False}, "is_causal is False, expected true"),
    "half rotated": ({"rotary_pct": 0.25}, "rotary_pct is 0.25"),
    "a window of a Llama": ({"sliding_window": 4096}, "sliding_window is 4096, expected none"),
    "windows by layer": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is 'sliding_attention'",
    ),
    "other layers": ({"layer_types": ["linear_attention"] * 2}, "layer_types is 'linear_attention'"),
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"}}, "auto_map names code"),
    "a rotary scaling nobody knows": ({"rope_scaling": {"rope_type": "ntk-abc", "factor": 2.0}}, "is 'ntk-abc'"),
    "a scaling of transformers 5 alone": ({"rope_scaling": {"rope_type": "proportional"}}, "is 'proportional'"),
    "a scaling of another architecture": ({"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_type is 'mrope'"),
    "a factor without a type": ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor is 4.0, expected none"),
    "a field of unknown meaning": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_slow": 3}},
        "rope_scaling.beta_slow is 3, expected none of that name in a rotary scaling of type 'linear'",
    ),
    "a factor that is no number": ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor is '4'"),
    "a length beside the scaling": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
        "original_max_position_embeddings is 32",
    ),
}


@pytest.mark.parametrize("case", list(UNKNOWN))
def test_keys_that_change_the_function_are_refused_by_name(case):
    keys, message = UNKNOWN[case]
    with pytest.raises(InputError, match=f"^here: .*{message}.*; .+"):
        arguments_from_config(CONFIG | keys, "here")


def test_keys_without_effect_are_passed_over():
    """Neutral values, what is about generating text or training alone, and where a model came from."""
    harmless = {
        "final_logit_softcapping": None,
        "logit_scale": 1.0,
        "is_causal": True,
        "torch_dtype": "torch.float32",
        "residual_multiplier": 1,
        "no_rope_layers": [],
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "auto_map": {"AutoTokenizer": "tokenization_x.X"},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "finetuned": True},
        "unsloth_version": "2025.3",
        "temperature": 0.6,
        "transformers_version": "4.40.0",
    }
    plain, with_keys = (arguments_from_config(json.loads(json.dumps(CONFIG | keys)), "here") for keys in ({}, harmless))
    assert plain == {key: value for key, value in with_keys.items() if key != "hf_rope_scaling"}
