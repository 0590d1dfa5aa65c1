"""Refusals of folders that hold no plain model: adapters, quantised weights, other forms, unfinished downloads.

The files decide. Every refusal says how to get a plain model.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.common.files import read_json_object
from megatron_btx.tokenizers.vocabulary import TOKENIZER_FOLDER_FILES, is_pointer

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_READ_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")
_NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt"}
_NO_WEIGHTS |= {"rng_state.pth", "scaler.pt"}


_MERGE = "bring it together first: {}, and put config.json and the tokenizer beside"
_SAVE_AGAIN = (
    "load the model with transformers (variant= names one variant of several) and save it with save_pretrained, which "
    'writes safetensors: python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained({folder!r}, '
    "torch_dtype='auto').save_pretrained({folder!r} + '-safetensors')\", and copy the tokenizer"
)
_PUBLISHED = "take the model's Hugging Face form with safetensors, mostly in a repository of its own"
_KINDS = {
    ("pytorch_model_fsdp_*/*.distcp", "*/__0_0.distcp", "pytorch_model_fsdp*.bin"): (
        "so it is what FSDP saves in shards",
        _MERGE.format("accelerate merge-weights {found} {folder}/merged"),
    ),
    ("zero_to_fp32.py", "global_step*/*_states.pt", "*_model_states.pt", "*_optim_states.pt"): (
        "so it is what DeepSpeed saves in shards",
        _MERGE.format("python {folder}/zero_to_fp32.py {folder} {folder}/merged --safe_serialization"),
    ),
    ("consolidated*.safetensors", "consolidated*.pth", "params.json"): (
        "so it is in the form of its publisher's own programs",
        _PUBLISHED,
    ),
    ("model.*.safetensors", "model.safetensors.index.*.json"): (
        "which is one variant of the weights under another name",
        _SAVE_AGAIN,
    ),
    ("model-*-of-*.safetensors",): (
        "which is a part of the weights, and no index that names all parts",
        "fetch model.safetensors.index.json, too",
    ),
    ("*.gguf",): ("which is in a form for llama.cpp, mostly quantised", _PUBLISHED),
    ("*.bin", "*.pth", "*.pt", "*.ckpt"): ("pickled weights, which can run code and are not read", _SAVE_AGAIN),
    ("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "onnx/*.onnx"): (
        "which are weights for another library",
        _PUBLISHED,
    ),
}
"""Files that show a form that is not read, where no plain weights lie: what it is, and the remedy. The first counts.

A remedy may name ``{folder}`` and ``{found}``, the file's folder in it.
"""


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
    for patterns, (what, remedy) in _KINDS.items():
        for file in itertools.chain.from_iterable(sorted(folder.glob(pattern)) for pattern in patterns):
            if file.name not in _NO_WEIGHTS and not (file.parent / "metadata.json").exists():  # else Megatron's
                advice = remedy.format(folder=str(folder), found=file.parent)
                raise CheckpointError(f"{folder}: holds {file.relative_to(folder)}, {what}; {advice}")


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
