"""Pico Hugging Face folders made by hand, byte by byte where a test wants them wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LAYERS, HIDDEN, FFN, VOCABULARY = 2, 16, 24, 32
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}
_CODES |= {torch.float8_e4m3fn: "F8_E4M3"}


def llama_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a pico Llama that fits :data:`CONFIG`, in fp32."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (HIDDEN // 2, HIDDEN) for name in "kv"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (HIDDEN, FFN)}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def header_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The header of a safetensors file that holds these tensors one after the other."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    return header


def safetensors_bytes(tensors: Mapping[str, torch.Tensor], header: object = None) -> bytes:
    """A safetensors file; with ``header`` (bytes, or what becomes JSON) instead of the one that fits."""
    text = header if isinstance(header, bytes) else json.dumps(header or header_of(tensors)).encode()
    numbers = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    return len(text).to_bytes(8, "little") + text + numbers


def llama_folder(folder: Path, seed: int = 0) -> Path:
    """A good model folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(llama_tensors(seed)))
    return folder


def in_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]], weight_map: object = None) -> None:
    """Make a folder's weights several files and an index; ``weight_map`` instead of the one that fits."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    for file, tensors in shards.items():
        (folder / file).write_bytes(safetensors_bytes(tensors))
    found = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {}, "weight_map": found if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
