"""Checkpoints of Megatron-Bridge and NeMo 2: torch_dist tensors whose arguments stand in a YAML file beside them.

Megatron-Bridge writes ``run_config.yaml`` into each iteration, with all fields of the model; NeMo 2 writes ``weights/``
and ``context/model.yaml``, mostly with the fields alone that somebody set. The names of Python classes in them
(``_target_``) are text here: nothing is imported or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS
from megatron_btx.checkpoint.huggingface.families import POSITIVE, bad_value, check_number
from megatron_btx.checkpoint.safe_pickle import UNREADABLE
from megatron_btx.common.errors import CheckpointError
from megatron_btx.tokenizers.vocabulary import tokenizer_files

BRIDGE_FILE = "run_config.yaml"
_NEMO_FILE = Path("context") / "model.yaml"
_WEIGHTS = "weights"
_REQUIRED = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups normalization layernorm_epsilon "
    "add_bias_linear gated_linear_unit activation_func position_embedding_type share_embeddings_and_output_weights "
    "qk_layernorm seq_length"
).split()
"""Fields for which classes have values of their own."""
_NEUTRAL = (
    "softmax_scale attention_output_gate experimental_attention_variant linear_attention_freq "
    "heterogeneous_block_specs is_hybrid_model mrope_section moe_latent_size attention_chunk_size nope_layer_interval "
    "final_logit_softcapping attn_logit_softcapping scale_embeddings restore_modelopt_state"
).split()
"""Fields that change the function and that no argument says: nothing, zero and false leave it as it is."""
_LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
"""Numbers of Llama 3's rotary scaling that are fixed in Megatron 0.19, by which older classes say it."""
_FIELDS = {row.bridge or row.name: row for row in MODEL_ARGUMENTS}
_NO_TEXT = {"bf16", "fp16", "share_embeddings_and_output_weights", "gated_linear_unit", *_FIELDS} - {
    *(field for field, row in _FIELDS.items() if isinstance(row.default, str)),
    "moe_router_dtype",
}
"""Numbers and switches: "false" would count as true; and to YAML 1e-5 is a text, and 1.0e-5 a number."""
_ACTIVATIONS = {
    (True, "silu"): {"swiglu": True},
    (False, "gelu"): {},
    (False, "squared_relu"): {"squared_relu": True},
    (True, "quick_gelu"): {"quick_geglu": True},
}
"""Whether it is gated, and the function: the arguments that say so."""


class _TextLoader(yaml.SafeLoader):
    """Reads tags of Python objects as what stands under them, and makes no object of any class."""


def _untagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return str(node.value)


_TextLoader.add_multi_constructor("", _untagged)


def weights_folder(path: Path) -> Path:
    """The folder of the tensors, where ``path`` is a NeMo 2 folder; else the path itself."""
    weights = path / _WEIGHTS
    if (weights / "metadata.json").is_file() and (path / "context").is_dir():
        return weights
    return path


def description_of(folder: Path) -> Path | None:
    """The YAML file that describes the model of an iteration's folder; None where Megatron-LM wrote it."""
    if (folder / BRIDGE_FILE).is_file():
        return folder / BRIDGE_FILE
    if folder.name == _WEIGHTS and (folder.parent / "context").is_dir():
        return folder.parent / _NEMO_FILE
    return None


def read_arguments(file: Path, rows: int) -> dict[str, Any]:
    """Megatron's arguments of a model that such a file describes.

    Args:
        file: what :func:`description_of` found.
        rows: of the embedding that is stored.

    Raises:
        InputError: it cannot be read, leaves open what shapes the model, or says what no argument does.
    """
    config, where = _read(file), str(file)
    if isinstance(config.get("peft"), Mapping):
        remedy = "merge the adapter first, with Megatron-Bridge's scripts for that"
        raise bad_value(where, "peft", _target(config["peft"]), "none", remedy)
    model, remedy = _model_of(config), _remedy(file)
    missing = [name for name in _REQUIRED if name not in model]
    if missing:
        raise CheckpointError(
            f"{file}: does not say {', '.join(missing)}, for which {_target(model) or 'its class'} has values of its "
            f"own; {remedy}"
        )
    for name in _NEUTRAL:
        if model.get(name):
            raise bad_value(where, name, model[name], "none, for no argument of Megatron's says it", remedy)
    for name in sorted(_NO_TEXT):
        if isinstance(model.get(name), str):
            expected = "a number or true or false"
            raise bad_value(where, name, model[name], expected, "write it without quotes, and 1e-5 as 1.0e-5")
    gated, function = bool(model["gated_linear_unit"]), _target(model["activation_func"])
    if (gated, function) not in _ACTIVATIONS:
        expected = f"one that Megatron's arguments say with gated_linear_unit {gated}"
        raise bad_value(where, "activation_func", function, expected, remedy)
    dtype = _target(model.get("params_dtype")) or "float32"
    for switch, name in (("fp16", "float16"), ("bf16", "bfloat16")):
        if model.get(switch):
            dtype = name
    arguments = {row.name: model[field] for field, row in _FIELDS.items() if field in model}
    if isinstance(arguments.get("window_size"), list):
        arguments["window_size"] = tuple(arguments["window_size"])
    arguments |= _ACTIVATIONS[gated, function] | _llama3_rope(model, where)
    arguments |= {
        "group_query_attention": model["num_query_groups"] not in (None, model["num_attention_heads"]),
        "untie_embeddings_and_output_weights": not model["share_embeddings_and_output_weights"],
        "padded_vocab_size": rows,
        "vocab_size": model.get("vocab_size") or rows,
        "seq_length": model["seq_length"],
        "max_position_embeddings": model.get("max_position_embeddings") or model["seq_length"],
        "params_dtype": dtype,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }
    for name in ("attention_dropout", "hidden_dropout", "init_method_std"):
        if name in model:
            arguments[name] = model[name]
    return arguments | _tokenizer(config, file)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: does not exist, and nothing else says the model's arguments; {_remedy(file)}")
    try:
        content = yaml.load(file.read_bytes(), _TextLoader)  # a subclass of the safe loader
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise CheckpointError(f"{file}: is not YAML ({' '.join(str(error).split())}); it is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected a mapping; it is damaged")
    return content


def _model_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the model, wherever the version puts them: under ``model``, ``config``, ``transformer``."""
    found: dict[str, Any] = {}
    section: Any = config.get("model", config)
    for _ in range(8):  # a section can name itself
        if isinstance(section, Mapping):
            found |= section
            section = section.get("transformer", section.get("config"))
    return found


def _llama3_rope(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "low_freq_factor" not in model:
        return {"use_rope_scaling": bool(model.get("rope_scaling"))}
    for field, fixed in _LLAMA3.items():
        if model.get(field) != fixed:
            raise bad_value(where, field, model.get(field), f"{fixed} as fixed in Megatron", "correct it there")
    factor = check_number(where, "scale_factor", model.get("scale_factor"), POSITIVE)
    return {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}


def _tokenizer(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The tokenizer that lies in the folder, else the one that the run was given."""
    root = file.parent
    for place in (root / "tokenizer", root.parent / "tokenizer", root / "nemo_tokenizer", root):
        if tokenizer_files(place):
            return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(place)}
    section = config.get("tokenizer")
    if not isinstance(section, Mapping):
        return {}
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    return {name: section[name] for name in names if isinstance(section.get(name), str)}


def _target(value: object) -> str:
    """The last word of a Python name, as text or under ``_target_``: ``torch.nn.functional.silu`` is ``silu``."""
    if isinstance(value, Mapping):
        value = value.get("_target_")
    return str(value or "").rpartition(".")[2]


def _remedy(file: Path) -> str:
    exporter = "NeMo (llm.export_ckpt)"
    if file.name == BRIDGE_FILE:
        exporter = "Megatron-Bridge (AutoBridge, export_ckpt)"
    return f"convert it with {exporter} and give the Hugging Face folder"
