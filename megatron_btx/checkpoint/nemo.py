"""Checkpoints of Megatron-Bridge and NeMo 2: torch_dist tensors whose arguments stand in a YAML file beside them.

Megatron-Bridge writes ``run_config.yaml`` into each iteration, with all fields of the model; NeMo 2 writes ``weights/``
and ``context/model.yaml``, mostly with the fields alone that somebody set. The names of Python classes in them
(``_target_``) are text here: nothing is imported or run.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.checkpoint.arguments import MODEL_ARGUMENTS
from megatron_btx.checkpoint.huggingface.families import COUNT, MEGATRON_LLAMA3, POSITIVE, check_number
from megatron_btx.checkpoint.safe_pickle import UNREADABLE
from megatron_btx.common.errors import CheckpointError
from megatron_btx.tokenizers.vocabulary import tokenizer_files

BRIDGE_FILE = "run_config.yaml"
_NEMO_FILE = Path("context") / "model.yaml"
_WEIGHTS = "weights"
_AT_MOST_BYTES = 16 << 20

_FIELDS = {
    "num_experts": "num_moe_experts",
    "use_rope_scaling": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
"""Megatron's arguments whose field in its configuration classes has another name."""
_REQUIRED = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups normalization layernorm_epsilon "
    "add_bias_linear gated_linear_unit activation_func position_embedding_type share_embeddings_and_output_weights "
    "qk_layernorm seq_length"
).split()
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
_OPTIONAL_SIZES = ("num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings")
_SWITCHES = ("bf16", "fp16", "rope_scaling")
_NESTED_AT_MOST = 8
_NO_TEXT = re.compile(r"true|false|yes|no|on|off|[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?\.?(nan|inf)", re.IGNORECASE)
"""Switches and numbers, which are none where they stand in quotes. To YAML 1e-5 is a text, and 1.0e-5 a number."""
_ACTIVATIONS = {
    (True, "silu"): "swiglu",
    (False, "gelu"): "",
    (False, "squared_relu"): "squared_relu",
    (True, "quick_gelu"): "quick_geglu",
}
"""Whether it is gated, and the function: the argument that says so."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "softmax_scale": (None,),
    "attention_output_gate": (None, False),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "heterogeneous_block_specs": (None, False),
    "is_hybrid_model": (None, False),
    "mrope_section": (None,),
    "moe_latent_size": (None,),
    "attention_chunk_size": (None,),
    "nope_layer_interval": (None, 0),
    "final_logit_softcapping": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "scale_embeddings": (None, False),
    "restore_modelopt_state": (None, False),
}
"""Fields that change the function and that no argument says, with the values that leave it as it is."""


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
        CheckpointError: it cannot be read, leaves open what shapes the model, or says what no argument does.
    """
    config = _read(file)
    model = _model_of(config, file)
    missing = [name for name in _REQUIRED if name not in model]
    if missing:
        kind = str(model.get("_target_") or "its class").rpartition(".")[2]
        raise CheckpointError(
            f"{file}: does not say {', '.join(missing)}, for which {kind} has values of its own that are not known "
            f"here; {_remedy(file)}"
        )
    for name, neutral in _NEUTRAL.items():
        if model.get(name) not in neutral:
            raise CheckpointError(
                f"{file}: {name} is {reprlib.repr(model[name])}, expected {neutral[0]!r}, which no argument of "
                f"Megatron's says; {_remedy(file)}"
            )
    _check_values(model, file)
    arguments = _same_fields(model) | _activation(model, file) | _rope(model, file)
    heads, groups = model["num_attention_heads"], model["num_query_groups"]
    dtype = _dtype_name(model)
    arguments |= {
        "group_query_attention": groups not in (None, heads),
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


def _dtype_name(model: Mapping[str, Any]) -> str:
    if model.get("bf16"):
        return "bfloat16"
    if model.get("fp16"):
        return "float16"
    return _target(model.get("params_dtype")) or "float32"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: does not exist; without it the model's arguments are not known; {_remedy(file)}"
        )
    if file.stat().st_size > _AT_MOST_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, expected a description of some kilobytes")
    try:
        content = yaml.load(file.read_bytes(), _TextLoader)  # a subclass of the safe loader
    except (yaml.YAMLError, *UNREADABLE) as error:
        raise CheckpointError(f"{file}: is not YAML ({' '.join(str(error).split())}); it is damaged") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected a mapping; it is damaged")
    return content


def _model_of(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The fields of the model, wherever the version puts them: under ``model``, ``config``, ``transformer``."""
    if isinstance(config.get("peft"), Mapping):
        raise CheckpointError(
            f"{file}: peft is {_target(config['peft']) or 'given'}, so it holds a LoRA or another adapter; merge it "
            "first, with Megatron-Bridge's scripts for merging adapters"
        )
    found: dict[str, Any] = {}
    section: Any = config.get("model", config)
    for _ in range(_NESTED_AT_MOST):  # a section can name itself
        if not isinstance(section, Mapping):
            break
        found |= section
        section = section.get("transformer", section.get("config"))
    return found


def _check_values(model: Mapping[str, Any], file: Path) -> None:
    """Refuse sizes that are none, and numbers and switches that are texts: ``"false"`` would count as true."""
    for name in _SIZES:
        check_number(str(file), name, model[name], COUNT)
    for name in _OPTIONAL_SIZES:
        if model.get(name) is not None:
            check_number(str(file), name, model[name], COUNT)
    for name in ("layernorm_epsilon", "rotary_base"):
        if not isinstance(model.get(name), str | None):
            check_number(str(file), name, model[name], POSITIVE)
    used = {_FIELDS.get(argument.name, argument.name) for argument in MODEL_ARGUMENTS}
    for name in sorted(used | {*_REQUIRED, *_SWITCHES}):
        value = model.get(name)
        if isinstance(value, str) and _NO_TEXT.fullmatch(value):
            raise CheckpointError(
                f"{file}: {name} is the text {value!r}, expected a number or true or false: write it without quotes, "
                "and 1e-5 as 1.0e-5"
            )
    window = model.get("window_size")
    if window is not None and not (isinstance(window, list) and all(type(size) is int for size in window)):
        raise CheckpointError(f"{file}: window_size is {window!r}, expected two whole numbers or null")


def _same_fields(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments and the configuration classes call alike, or nearly so."""
    found = {}
    for argument in MODEL_ARGUMENTS:
        field = _FIELDS.get(argument.name, argument.name)
        if field in model:
            found[argument.name] = model[field]
    if found.get("window_size"):
        found["window_size"] = tuple(found["window_size"])
    return found


def _activation(model: Mapping[str, Any], file: Path) -> dict[str, Any]:
    function = _target(model["activation_func"])
    gated = bool(model["gated_linear_unit"])
    if (gated, function) not in _ACTIVATIONS:
        found = repr(function)
        if gated:
            found += " and gated"
        raise CheckpointError(
            f"{file}: activation_func is {found}, which no argument of Megatron's says; {_remedy(file)}"
        )
    argument = _ACTIVATIONS[gated, function]
    if not argument:
        return {}
    return {argument: True}


def _rope(model: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Llama 3's scaling, which older classes say by its four numbers."""
    if "low_freq_factor" not in model:
        return {"use_rope_scaling": bool(model.get("rope_scaling"))}
    fixed = {
        "old_context_len": MEGATRON_LLAMA3["original_max_position_embeddings"],
        "low_freq_factor": MEGATRON_LLAMA3["low_freq_factor"],
        "high_freq_factor": MEGATRON_LLAMA3["high_freq_factor"],
    }
    for key, value in fixed.items():
        if model.get(key) != value:
            raise CheckpointError(f"{file}: {key} is {model.get(key)!r}, expected {value} as fixed in Megatron")
    factor = check_number(str(file), "scale_factor", model.get("scale_factor"), POSITIVE)
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
    if file.name == BRIDGE_FILE:
        return (
            "convert it with Megatron-Bridge (AutoBridge.from_hf_pretrained(MODEL).export_ckpt(FOLDER, OUT)) and give "
            "the Hugging Face folder"
        )
    return (
        "convert it with NeMo (llm.export_ckpt(FOLDER, target='hf', output_path=OUT)) and give the Hugging Face folder"
    )
