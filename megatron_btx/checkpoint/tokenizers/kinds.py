"""Refusals of folders that hold no plain model: adapters, quantised weights, other forms, unfinished downloads.

The files decide. Every refusal says how to get a plain model.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from megatron_btx.checkpoint.tokenizers.files import is_pointer
from megatron_btx.checkpoint.tokenizers.vocabulary import TOKENIZER_FOLDER_FILES
from megatron_btx.ground.errors import CheckpointError, InputError
from megatron_btx.ground.files import read_json_object

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_READ_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")
_NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"}
_NO_WEIGHTS |= {"rng_state.pth", "scaler.pt"}


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One form of a model that is not read."""

    patterns: tuple[str, ...]
    """Files that show it."""
    what: str
    remedy: str
    """May name ``{folder}`` and ``{found}``, the file's folder in it."""


_KINDS = (
    _Kind(
        ("pytorch_model_fsdp_*/*.distcp", "*/__0_0.distcp", "pytorch_model_fsdp*.bin"),
        "so it is what FSDP saves in shards",
        "bring it together first: accelerate merge-weights {found} {folder}/merged, and put config.json and the "
        "tokenizer beside",
    ),
    _Kind(
        ("zero_to_fp32.py", "global_step*/*_states.pt", "*_model_states.pt", "*_optim_states.pt"),
        "so it is what DeepSpeed saves in shards",
        "bring it together first: python {folder}/zero_to_fp32.py {folder} {folder}/merged --safe_serialization, and "
        "put config.json and the tokenizer beside",
    ),
    _Kind(
        ("consolidated*.safetensors", "consolidated*.pth", "params.json"),
        "so it is in the form of its publisher's own programs",
        "take the model's Hugging Face form (mostly in a repository of its own, -hf), or convert it with "
        "transformers' convert_mistral_weights_to_hf.py or convert_llama_weights_to_hf.py",
    ),
    _Kind(
        ("model.*.safetensors", "model.safetensors.index.*.json"),
        "which is one variant of the weights under another name",
        "load the model with transformers and its variant=, and save it with save_pretrained",
    ),
    _Kind(
        ("model-*-of-*.safetensors",),
        "which is a part of the weights, and no index that names all parts",
        "fetch model.safetensors.index.json, too",
    ),
    _Kind(
        ("*.gguf",),
        "which is in a form for llama.cpp, mostly quantised",
        "take the model that it was made from, with safetensors",
    ),
    _Kind(
        ("*.bin", "*.pth", "*.pt", "*.ckpt"),
        "pickled weights, which can run code and are not read",
        "load the model with transformers and save it with save_pretrained, which writes safetensors: python -c "
        '"import transformers as t; t.AutoModelForCausalLM.from_pretrained({folder!r}, '
        "torch_dtype='auto').save_pretrained({folder!r} + '-safetensors')\", and copy the tokenizer",
    ),
    _Kind(
        ("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "onnx/*.onnx"),
        "which are weights for another library",
        "take the model with safetensors, or load it with transformers 4.57 (from_tf or from_flax) and save it with "
        "save_pretrained",
    ),
)
"""Told by files where no plain weights lie; the first that fits counts."""


def check_kind(folder: Path) -> None:
    """Refuse a folder that is no plain model, or whose files are not what their names say.

    Raises:
        CheckpointError: names the file that shows it, and the remedy.
    """
    refuse_placeholders(folder)
    _refuse_adapter(folder)
    _refuse_unfinished(folder)
    if any(os.path.lexists(folder / name) for name in _WEIGHTS):
        return
    for kind in _KINDS:
        for pattern in kind.patterns:
            for file in sorted(folder.glob(pattern)):
                if file.name not in _NO_WEIGHTS and not (file.parent / "metadata.json").exists():  # else Megatron's
                    remedy = kind.remedy.format(folder=str(folder), found=file.parent)
                    raise CheckpointError(f"{folder}: holds {file.relative_to(folder)}, {kind.what}; {remedy}")


def refuse_placeholders(place: Path) -> None:
    """Refuse what Git LFS leaves where files were not fetched: a short text that names the file.

    Args:
        place: a folder with a model or a tokenizer, or a file of one.

    Raises:
        CheckpointError: names the first such file, how many there are, and the command.
    """
    pointers = [file for file in _list_files(place) if is_pointer(file)]
    if pointers:
        more = ""
        if len(pointers) > 1:
            more = f" ({len(pointers)} files are)"
        folder = pointers[0].parent
        raise CheckpointError(
            f"{pointers[0]}: is a pointer of Git LFS in place of the file{more}; fetch what it points to: "
            f"git -C {folder} lfs pull"
        )


def _list_files(place: Path) -> list[Path]:
    """The files of a folder that are read, or the file itself."""
    found = {place}
    if place.is_dir():
        for pattern in (*_READ_FILES, *TOKENIZER_FOLDER_FILES):
            found.update(place.glob(pattern))
    return sorted(filter(Path.is_file, found))


def _refuse_adapter(folder: Path) -> None:
    """A LoRA is a difference to a model: mixed without it, or with the model alone, it would be lost."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    found = [name for name in names if os.path.lexists(folder / name)]
    if not found:
        return
    base = _base_of(folder / "adapter_config.json")
    if any(os.path.lexists(folder / name) for name in _WEIGHTS):
        where = "beside the model, which may lack what it adds"
        other = ", or take its files away if the weights hold it already"
    else:
        where, other = f"alone, a difference to the model {base or 'it was trained on'}", ""
    raise CheckpointError(
        f"{folder}: holds {found[0]}, a LoRA or another adapter {where}; merge it first{other}: python -c "
        f'"import peft; peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload()'
        f'.save_pretrained({str(folder) + "-merged"!r})", and copy the tokenizer'
    )


def _base_of(file: Path) -> str:
    """The model that an adapter was trained on; "" where its file does not say."""
    try:
        content = read_json_object(file, "")
    except InputError:
        return ""
    return str(content.get("base_model_name_or_path") or "")


def _refuse_unfinished(folder: Path) -> None:
    """A download that was cut short, unless the whole file came later."""
    for suffix in _UNFINISHED:
        for file in sorted(folder.glob(f"*{suffix}")):
            if not file.with_name(file.name.removesuffix(suffix)).exists():
                raise CheckpointError(f"{file}: is an unfinished download; fetch the model again until it is whole")
