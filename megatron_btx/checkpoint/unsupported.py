"""Refusals of folders that hold no plain model: adapters, quantised weights, other forms, unfinished downloads.

The files decide. One message serves all forms: what was found, what is expected, and the way there in a few words.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_btx.common.errors import CheckpointError
from megatron_btx.tokenizers.vocabulary import TOKENIZER_FOLDER_FILES, is_pointer

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_READ_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_MERGE = "bring it together with {}"
_SAVE = "load it with transformers and save it with save_pretrained"
_PUBLISHED = "take the model's Hugging Face form, mostly in a repository of its own"
_FORMS = {
    "adapter_config.json adapter_model.*": (
        "a LoRA or another adapter",
        "merge it first, with merge_and_unload() of peft, or take its files away if the weights hold it already",
    ),
    "pytorch_model_fsdp_*/*.distcp */__0_0.distcp pytorch_model_fsdp*.bin": (
        "what FSDP saves in shards",
        _MERGE.format("accelerate merge-weights"),
    ),
    "zero_to_fp32.py global_step*/*_states.pt *_model_states.pt *_optim_states.pt": (
        "what DeepSpeed saves in shards",
        _MERGE.format("its zero_to_fp32.py --safe_serialization"),
    ),
    "consolidated*.safetensors consolidated*.pth params.json": ("the form of its publisher's programs", _PUBLISHED),
    "model.*.safetensors model.safetensors.index.*.json": ("a variant of the weights", f"{_SAVE} (variant=)"),
    "model-*-of-*.safetensors": ("a part of the weights without an index", f"fetch {_WEIGHTS[1]}, too"),
    "*.gguf": ("a form for llama.cpp, mostly quantised", _PUBLISHED),
    "pytorch_model*.bin model*.bin model*.pt model*.pth *.ckpt": ("pickled weights, which can run code", _SAVE),
    "tf_model*.h5 flax_model*.msgpack *.onnx onnx/*.onnx": ("weights for another library", _PUBLISHED),
}
"""Files, as patterns, that show a form that is not read: what it is, and the way to one that is. The first counts."""
_ADAPTER = next(iter(_FORMS))


def check_kind(folder: Path) -> None:
    """Refuse a folder that is no plain model, or whose files are not what their names say.

    Raises:
        CheckpointError: names the file that shows it, and the remedy.
    """
    refuse_placeholders(folder)
    for suffix in (".incomplete", ".part", ".crdownload", ".aria2"):
        for file in sorted(folder.glob(f"*{suffix}")):
            if not file.with_name(file.name.removesuffix(suffix)).exists():
                raise CheckpointError(f"{file}: is an unfinished download; fetch the model again until it is whole")
    has_weights = any(os.path.lexists(folder / name) for name in _WEIGHTS)
    for patterns, (form, remedy) in _FORMS.items():
        if has_weights and patterns != _ADAPTER:  # an adapter beside a model may be what the model lacks
            continue
        for pattern in patterns.split():
            for file in sorted(folder.glob(pattern)):
                if not (file.parent / "metadata.json").exists():  # else of a Megatron checkpoint
                    raise CheckpointError(
                        f"{folder}: holds {file.relative_to(folder)} ({form}), expected a plain model in safetensors "
                        f"or torch_dist; {remedy}"
                    )


def refuse_placeholders(place: Path) -> None:
    """Refuse what Git LFS leaves where files were not fetched: a short text that names the file.

    Args:
        place: a folder with a model or a tokenizer, or a file of one.

    Raises:
        CheckpointError: names the first such file, and the command.
    """
    files = {place}
    for pattern in (*_READ_FILES, *TOKENIZER_FOLDER_FILES):
        files.update(place.glob(pattern))
    for file in sorted(filter(Path.is_file, files)):
        if is_pointer(file):
            raise CheckpointError(
                f"{file}: is a pointer of Git LFS in place of the file; fetch it: git -C {file.parent} lfs pull"
            )
