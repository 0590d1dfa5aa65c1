"""Opening the sources of a mix: which format a path holds, what its arguments say, how its tensors are named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint import nemo, safetensors
from megatron_btx.checkpoint import unsupported as kinds
from megatron_btx.checkpoint.huggingface import config as hf_config
from megatron_btx.checkpoint.huggingface import families as hf_families
from megatron_btx.checkpoint.huggingface.foreign_names import unwrap_names
from megatron_btx.checkpoint.iterations import is_checkpoint, resolve_iteration, root_of
from megatron_btx.checkpoint.names import DIALECTS, IGNORED_MEGATRON, Dialect
from megatron_btx.checkpoint.paths import model_path
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import CheckpointError
from megatron_btx.mixing.sources import Source
from megatron_btx.tokenizers.path import HF_FOLDER, locate_tokenizer
from megatron_btx.tokenizers.vocabulary import TOKENIZER_FILES

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_OTHER_SIZES = (
    "num_query_groups", "kv_channels", "padded_vocab_size", "vocab_size", "max_position_embeddings", "num_experts",
    "moe_ffn_hidden_size",
)  # fmt: skip
_LAYERS_AT_MOST = 10_000


def _sizes(name: str, folder: Path, arguments: Mapping[str, Any]) -> Sizes:
    """The sizes that stored arguments say.

    Raises:
        CheckpointError: one is missing, of another type, or impossible beside the others.
    """
    where = f"{name} ({folder})"
    for argument in (*_SIZES, *_OTHER_SIZES):
        value = arguments.get(argument)
        if value is None and argument in _OTHER_SIZES:
            continue
        if type(value) is not int or value <= 0:
            raise CheckpointError(
                f"{where}: its stored arguments say {argument} = {value!r}, expected a positive number"
            )
    _check_layers(arguments["num_layers"], where)
    for argument in TOKENIZER_FILES:
        if not isinstance(arguments.get(argument), str | Path | None):
            raise CheckpointError(f"{where}: its stored arguments say {argument} = {arguments[argument]!r}, no path")
    frequency = arguments.get("moe_layer_freq", 1)
    if not _is_frequency(frequency):
        raise CheckpointError(f"{where}: its stored arguments say moe_layer_freq = {frequency!r}, expected numbers")
    sizes = Sizes.of(arguments)
    if sizes.heads % sizes.groups or len(sizes.mixture_layers) != sizes.layers:
        raise CheckpointError(
            f"{where}: its stored arguments say {sizes.heads} heads in {sizes.groups} query groups, and moe_layer_freq "
            f"= {arguments.get('moe_layer_freq')!r} for {sizes.layers} layers, which is impossible"
        )
    return sizes


def _is_frequency(value: object) -> bool:
    """Whether a value is a whole number, or a list of such."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(type(number) is int for number in value)
    return type(value) is int


def _check_layers(layers: object, where: str) -> None:
    """Much is counted per layer: a slip of the keyboard would take all memory before anything else could refuse it."""
    if isinstance(layers, int) and layers > _LAYERS_AT_MOST:
        raise CheckpointError(f"{where}: its configuration says {layers} layers, expected {_LAYERS_AT_MOST} at most")


def open_source(name: str, path: str | Path) -> Source:
    """Open a Megatron checkpoint (its root, or one iteration) or a Hugging Face model folder.

    Raises:
        CheckpointError: it cannot be read, or is of a form that is not supported; says what to do.
    """
    path = nemo.weights_folder(model_path(path))
    if path.is_dir() and (safetensors.is_model_folder(path) or not is_checkpoint(path)):
        kinds.check_kind(path)
    if path.is_dir() and safetensors.is_model_folder(path):
        return _open_folder(name, path)
    if not is_checkpoint(path):
        safetensors.refuse_without_config(path)
    return _open_checkpoint(name, resolve_iteration(path))


def _open_folder(name: str, folder: Path) -> Source:
    """A Hugging Face model folder."""
    where = f"{name} ({folder / safetensors.CONFIG})"
    config = safetensors.read_json(folder / safetensors.CONFIG)
    _check_layers(config.get("num_hidden_layers"), where)
    arguments = hf_config.arguments_from_config(config, where)
    reader = safetensors.SafetensorsReader(folder)
    reader.tensors = unwrap_names(reader.tensors, f"{name} ({folder})")
    family = hf_families.family_of(config, where)
    arguments |= hf_config.dtype_arguments(config, where, reader.dtypes())
    dialect = DIALECTS[family.dialect]
    if any(key.endswith(".mlp.experts.gate_up_proj") for key in reader.tensors):
        dialect = DIALECTS["fused_moe"]
    return Source(name, folder, reader, arguments, dialect, _sizes(name, folder, arguments), config)


def _open_checkpoint(name: str, folder: Path) -> Source:
    """One iteration of a Megatron checkpoint."""
    reader = TorchDistReader(folder)
    root = root_of(folder)
    kinds.refuse_placeholders(root / HF_FOLDER)
    arguments = locate_tokenizer(_arguments_of(reader, f"{name} ({folder})"), root)
    sizes = _sizes(name, folder, arguments)
    return Source(name, root, reader, arguments, _megatron_dialect(reader.tensors), sizes)


def _arguments_of(reader: TorchDistReader, where: str) -> dict[str, Any]:
    """The stored arguments, else those that Megatron-Bridge or NeMo 2 describe; names lose NeMo's ``module.``."""
    model = {}
    for key in reader.tensors:
        if not any(re.fullmatch(pattern, key) for pattern in IGNORED_MEGATRON):
            model[key] = key
    renamed = {old: new for new, old in unwrap_names(model, where).items()}
    reader.tensors = {renamed.get(key, key): stored for key, stored in reader.tensors.items()}
    description = nemo.description_of(reader.folder)
    if description is None or reader.has_arguments():
        return reader.arguments()
    embedding = reader.tensors.get("embedding.word_embeddings.weight")
    rows = 0
    if embedding is not None and embedding.shape:
        rows = embedding.shape[0]
    return nemo.read_arguments(description, rows)


def _megatron_dialect(keys: Iterable[str]) -> Dialect:
    """Recognised from the keys, never guessed from a version."""
    dialect = DIALECTS["stacked"]
    for key in keys:
        if re.fullmatch(r"decoder\.layers\.\d+\..*(\.weight_w|\.experts\.experts\.\d+\..*)", key):
            return DIALECTS["singleton"]
        if re.match(r"decoder\.layers\.\d+\.", key):
            dialect = DIALECTS["numbered"]
    return dialect
