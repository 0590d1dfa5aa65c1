"""What a result is on disk: a Megatron checkpoint or a Hugging Face model folder, laid out but not yet written."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint import safetensors
from megatron_btx.checkpoint.huggingface import config_writing as hf_config_writing
from megatron_btx.checkpoint.huggingface import families as hf_families
from megatron_btx.checkpoint.huggingface import shared_expert
from megatron_btx.checkpoint.iterations import RELEASE, TRACKER
from megatron_btx.checkpoint.names import DIALECTS
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.checkpoint.stored import Reader, Slot
from megatron_btx.checkpoint.torch_dist import TorchDistLayout, TorchDistReader
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.compatible import vocabulary_source
from megatron_btx.mixing.layout import LaidOutTensor, Task, lay_out
from megatron_btx.mixing.operations import RAMP, ZEROS
from megatron_btx.mixing.plan import Plan, PlannedPiece
from megatron_btx.mixing.result import megatron_args_text
from megatron_btx.tokenizers import written_files as tokenizer_files
from megatron_btx.tokenizers.export import result_tokenizer
from megatron_btx.tokenizers.vocabulary import HF_FOLDER

_WRITTEN = {"zeros": ZEROS, "ramp": RAMP}
"""What :mod:`megatron_btx.checkpoint.huggingface.shared_expert` wants in its tensors."""


@dataclasses.dataclass(frozen=True)
class Output:
    """Everything a result will hold; paths are relative to its folder."""

    format: str
    tensors: tuple[LaidOutTensor, ...]
    tasks: tuple[Task, ...]
    files: Mapping[str, int]
    """The data files and their sizes in bytes."""
    parts: tuple[tuple[str, int, bytes], ...]
    """What stands in data files beside the numbers: file, position, bytes."""
    small_files: Mapping[str, bytes]
    """Written last: without them nothing loads."""
    mark: str
    """A file that every output of this format has."""
    reader: Callable[[Path], Reader]
    """Opens a written result."""
    tokenizer: Mapping[str, Any]
    """What was done to the tokenizer and proved of it."""

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum(self.files.values()) + sum(map(len, self.small_files.values()))


def lay_out_result(plan: Plan, output_format: str, target: Path) -> Output:
    """Lay out the result of a plan as ``output_format`` says: megatron or hf.

    Raises:
        InputError: the format cannot express the model; says what it is.
    """
    if output_format == "hf":
        return _hugging_face(plan)
    return _megatron(plan, target)


# --- Megatron -------------------------------------------------------------------------------------------------


def _megatron(plan: Plan, target: Path) -> Output:
    hf_config_writing.refuse_for_megatron(plan.arguments, "the result")
    numbered = len(set(plan.sizes.mixture_layers)) > 1
    dialect = DIALECTS["stacked"]
    if numbered:
        dialect = DIALECTS["numbered"]
    tensors = tuple(lay_out(plan, dialect, with_other_names=True))
    layout = TorchDistLayout()
    tasks = []
    for tensor in tensors:
        for block in tensor.blocks:
            slot = layout.add_block(tensor.name, tensor.shape, block.offsets, block.sizes, tensor.dtype)
            tasks.append(Task(block, dataclasses.replace(slot, file=f"{RELEASE}/{slot.file}")))
    arguments, small, tokenizer = _with_hf_files(plan, target)
    common = {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    layout.add_object("common_state/shard_0_1", [common])
    for key in _extra_states(plan.sizes, bool(arguments.get("qk_layernorm")), numbered):
        layout.add_object(key, [None])
    small |= {f"{RELEASE}/{name}": content for name, content in layout.small_files().items()}
    small |= {"megatron_args.txt": megatron_args_text(arguments).encode(), TRACKER: RELEASE.encode()}
    return Output(
        "megatron",
        tensors,
        tuple(tasks),
        {f"{RELEASE}/{name}": size for name, size in layout.files.items()},
        tuple((f"{RELEASE}/{name}", position, content) for name, position, content in layout.objects),
        small,
        TRACKER,
        lambda folder: TorchDistReader(folder / RELEASE),
        tokenizer,
    )


def _with_hf_files(plan: Plan, target: Path) -> tuple[dict[str, Any], dict[str, bytes], Mapping[str, Any]]:
    """The result's arguments, the files of Hugging Face's that travel along, and what was proved of its tokenizer."""
    source = vocabulary_source(plan.mixed, plan.request)
    arguments, folder = dict(plan.arguments), source.hf_folder
    if folder is None:
        return arguments, {}, {"said": "the files that the arguments name"}
    config = safetensors.read_json(folder / safetensors.CONFIG)
    made = result_tokenizer(source.tokenizer, config, plan.request.allow_other_ids)
    travelling = dict(made.files)
    generation = tokenizer_files.generation_file(made.files, made.ids, made.rows)
    if generation is not None:
        travelling[tokenizer_files.GENERATION] = generation
    files = {f"{HF_FOLDER}/{name}": content for name, content in travelling.items()}
    files[f"{HF_FOLDER}/{safetensors.CONFIG}"] = (folder / safetensors.CONFIG).read_bytes()
    if any("tokenizer" in name or name.endswith(".model") for name in files):
        arguments["tokenizer_type"] = "HuggingFaceTokenizer"
        arguments["tokenizer_model"] = str(target.resolve() / HF_FOLDER)
    else:
        arguments["tokenizer_type"] = "NullTokenizer"
        arguments["tokenizer_model"] = None
    return arguments, files, made.record


def _extra_states(sizes: Sizes, qk_layernorm: bool, numbered: bool) -> Iterator[str]:
    """Keys of the empty extra states that a loading model asks for, and refuses to load without.

    Local and Transformer Engine layers ask for different ones; all are written, and those nobody asks for are ignored.
    """
    names = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    names += ["pre_mlp_layernorm", "input_layernorm"]
    if qk_layernorm:
        names += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    for layer, is_mixture in enumerate(sizes.mixture_layers):
        prefix, shard = "decoder.layers.", f"{layer}_{sizes.layers}"
        if numbered:
            prefix, shard = f"decoder.layers.{layer}.", "0_1"
        for name in names:
            yield f"{prefix}{name}._extra_state/shard_{shard}"
        if not is_mixture:
            for name in ("linear_fc1", "linear_fc2"):
                yield f"{prefix}mlp.{name}._extra_state/shard_{shard}"
            continue
        for expert in range(sizes.experts):
            expert_shard = f"{layer}.{expert}_{sizes.layers}.{sizes.experts}"
            if numbered:
                expert_shard = f"{expert}_{sizes.experts}"
            for name in ("linear_fc1", "linear_fc2"):
                yield f"{prefix}mlp.experts.experts.{name}._extra_state/shard_{expert_shard}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


# --- Hugging Face ---------------------------------------------------------------------------------------------


def _hugging_face(plan: Plan) -> Output:
    source = vocabulary_source(plan.mixed, plan.request)
    folder = source.hf_folder
    base = None
    if folder is not None:
        base = safetensors.read_json(folder / safetensors.CONFIG)
    config = hf_config_writing.config_from_arguments(plan.arguments, base)
    family = hf_families.family_of(config, "the result")
    dialect = DIALECTS[family.dialect]
    for planned in plan.pieces:
        if planned.piece.location(dialect, plan.sizes) is None:
            raise InputError(
                f"{planned.name}: {family.architecture} has no such tensor; write --output-format megatron"
            )
    if family.model_type == shared_expert.MODEL_TYPE:
        # Qwen2-MoE has them in every mixture layer and the model has not: they add nothing.
        added = []
        for piece, content in shared_expert.pieces(plan.sizes, shared_expert.WRITTEN_WIDTH):
            added.append(PlannedPiece(piece, piece.shape, plan.pieces[0].dtype, _WRITTEN[content]))
        plan = dataclasses.replace(plan, pieces=(*plan.pieces, *added))
    tensors = tuple(lay_out(plan, dialect, with_other_names=False))
    layout = safetensors.SafetensorsLayout([(t.name, t.shape, t.dtype) for t in tensors])
    tasks = []
    for tensor in tensors:
        whole = layout.slot(tensor.name)
        row_bytes = tensor.dtype.itemsize * math.prod(tensor.shape[1:])
        for block in tensor.blocks:
            begin = whole.position_bytes + block.offsets[0] * row_bytes
            tasks.append(Task(block, Slot(whole.file, begin, block.sizes[0] * row_bytes)))
    tokenizer = result_tokenizer(source.tokenizer, config, plan.request.allow_other_ids)
    small = layout.small_files() | dict(tokenizer.files)
    config = tokenizer_files.complete_ids(config, tokenizer.ids, tokenizer.rows)
    ids = {}
    for token in tokenizer_files.NAMES:
        if config.get(f"{token}_id") is not None:
            ids[f"{token}_id"] = config[f"{token}_id"]
    generation = tokenizer_files.generation_file(tokenizer.files, ids, tokenizer.rows)
    if generation is not None:
        small[tokenizer_files.GENERATION] = generation
    small[safetensors.CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return Output(
        "hf",
        tensors,
        tuple(tasks),
        layout.files,
        tuple(layout.objects),
        small,
        safetensors.CONFIG,
        safetensors.SafetensorsReader,
        tokenizer.record,
    )
