"""Folders as strangers have them: read as transformers reads them, or refused with the cause and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_btx.common.errors import InputError
from megatron_btx.data.tokenizers import TokenizerSettings
from megatron_btx.mixing import convert_hf
from megatron_btx.mixing.loader import open_source
from tests.support.hugging_face import VOCABULARY, logits
from tests.unit.mixing.folders import CONFIG, in_shards, llama_folder, llama_tensors, safetensors_bytes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 13587\n"
EMBEDDING = "model.embed_tokens.weight"


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Import a folder, expect its one-line refusal and nothing left behind."""
    out = folder.parent / "out"
    assert convert_hf.main(["import", "--hf-model", str(folder), "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not out.exists()
    return line


def embedding(folder: Path | str) -> torch.Tensor:
    """The embedding that is read."""
    source = open_source("model", folder)
    return source.read("embedding.weight", 0, source.pieces["embedding.weight"].shape[0])


def _with_old_shards(folder: Path, seed: int) -> None:
    """An index and a shard of another save beside the single file."""
    kept = (folder / WEIGHTS).read_bytes()
    in_shards(folder, {SHARD: llama_tensors(seed)})
    (folder / WEIGHTS).write_bytes(kept)


# --- two sets of weights --------------------------------------------------------------------------------------


def test_two_sets_of_weights_are_refused(tmp_path, capsys):
    folder = llama_folder(tmp_path / "model", 1)
    _with_old_shards(folder, 2)
    line = refusal(folder, capsys)
    assert f"{WEIGHTS}, which transformers reads" in line and INDEX in line and "remove the one" in line


def test_another_name_of_the_activation_is_the_same(tmp_path):
    folder = llama_folder(tmp_path / "model", 1)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_act": "swish"}))
    assert open_source("model", folder).arguments["swiglu"]


def test_another_name_of_the_type_is_the_same(tmp_path):
    """torch and transformers know float32 as float, and float16 as half."""
    folder = llama_folder(tmp_path / "model", 1)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float"}))
    assert open_source("model", folder).arguments["params_dtype"] == "float32"


def test_an_index_without_its_shards_says_nothing_beside_the_weights(tmp_path):
    """As transformers reads it: the single file, whatever index lies beside it."""
    folder = llama_folder(tmp_path / "model", 1)
    _with_old_shards(folder, 2)
    (folder / SHARD).unlink()
    assert torch.equal(embedding(folder), llama_tensors(1)[EMBEDDING])
    assert (folder / INDEX) not in open_source("model", folder).reader.files()


def test_the_single_file_is_what_transformers_reads(older, tmp_path):
    """In both versions, with whole shards of another save beside: the tests above stand on it."""
    folders = [llama_folder(tmp_path / name, 1) for name in ("plain", "odd")]
    for folder in folders:
        _configured(vocab_size=VOCABULARY)(folder)
        (folder / WEIGHTS).write_bytes(safetensors_bytes(_with_more_rows(1)))
    in_shards(folders[1], {SHARD: _with_more_rows(2)})
    (folders[1] / WEIGHTS).write_bytes((folders[0] / WEIGHTS).read_bytes())
    for load in (logits, lambda folder: older.load(folder)[0]):
        plain, odd = map(load, folders)
        assert torch.equal(plain, odd)


def _with_more_rows(seed: int) -> dict[str, torch.Tensor]:
    rows = torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(seed))
    return llama_tensors(seed) | dict.fromkeys((EMBEDDING, "lm_head.weight"), rows)


# --- what stands in place of a model --------------------------------------------------------------------------

Change = Callable[[Path], object]


def _file(name: str, content: bytes = b"x" * 100) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def _instead(name: str, content: bytes = b"x" * 100) -> Change:
    """A file in place of the weights."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        _file(name, content)(folder)

    return change


def _alone(name: str, content: bytes = b"x" * 100) -> Change:
    """A file in place of the weights and the configuration."""

    def change(folder: Path) -> None:
        (folder / "config.json").unlink()
        _instead(name, content)(folder)

    return change


def _configured(**fields: object) -> Change:
    return _file("config.json", json.dumps(CONFIG | fields).encode())


FOLDERS: dict[str, tuple[Change, list[str]]] = {
    "weights are a pointer": (_file(WEIGHTS, POINTER), [f"{WEIGHTS}: is a pointer of Git LFS", "lfs pull"]),
    "a shard is a pointer": (_instead(SHARD, POINTER), [f"{SHARD}: is a pointer of Git LFS", "lfs pull"]),
    "the configuration is a pointer": (_file("config.json", POINTER), ["config.json: is a pointer", "lfs pull"]),
    "tokenizer.json is a pointer": (_file("tokenizer.json", POINTER), ["tokenizer.json: is a pointer", "lfs pull"]),
    "tokenizer.model is a pointer": (_file("tokenizer.model", POINTER), ["tokenizer.model: is a pointer", "lfs pull"]),
    "an adapter alone": (_alone("adapter_config.json"), ["adapter_config.json (a LoRA", "merge it first"]),
    "an adapter beside a configuration": (_instead("adapter_model.safetensors"), ["adapter_model.safetensors (a LoRA"]),
    "an adapter beside a model": (_file("adapter_config.json"), ["adapter_config.json (a LoRA", "merge_and_unload"]),
    "DeepSpeed's shards": (
        _instead("global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ["global_step9/bf16_zero_pp", "DeepSpeed", "zero_to_fp32.py --safe_serialization"],
    ),
    "DeepSpeed's script": (_alone("zero_to_fp32.py"), ["DeepSpeed", "zero_to_fp32.py"]),
    "FSDP's shards": (_instead("pytorch_model_fsdp_0/__0_0.distcp"), ["FSDP", "accelerate merge-weights"]),
    "FSDP's one file": (_alone("pytorch_model_fsdp.bin"), ["FSDP", "accelerate merge-weights"]),
    "GGUF": (_alone("model-q4_k_m.gguf"), ["model-q4_k_m.gguf", "llama.cpp", "Hugging Face form"]),
    "Meta's own form": (_alone("consolidated.00.pth"), ["consolidated.00.pth", "Hugging Face form"]),
    "Mistral's own form": (_alone("consolidated.safetensors"), ["consolidated.safetensors", "Hugging Face form"]),
    "a variant": (_instead("model.fp16.safetensors"), ["model.fp16.safetensors", "variant="]),
    "parts without an index": (_instead("model-00001-of-00002.safetensors"), ["without an index", f"fetch {INDEX}"]),
    "pickled parts": (_instead("pytorch_model-00001-of-00002.bin"), ["can run code", "save_pretrained"]),
    "weights for TensorFlow": (_instead("tf_model.h5"), ["tf_model.h5", "another library"]),
    "a download that was cut": (_instead(f"{WEIGHTS}.incomplete"), ["unfinished download", "fetch the model again"]),
    "GPTQ": (_configured(quantization_config={"quant_method": "gptq", "bits": 4}), ["gptq", "dequantize"]),
    "compressed": (_configured(compression_config={"format": "int"}), ["unquantized", "dequantize"]),
    "a dtype that no tensor has": (
        _configured(torch_dtype="bfloat16"),
        ["torch_dtype is 'bfloat16'", "float32, as its tensors are", 'set it to "float32"'],
    ),
    "a dtype of transformers 5": (
        _configured(torch_dtype=None, dtype="float16"),
        ["dtype is 'float16'", "float32, as its tensors are"],
    ),
}


@pytest.mark.parametrize("case", list(FOLDERS))
def test_what_is_no_plain_model_is_refused_with_its_remedy(case, tmp_path, capsys):
    change, named = FOLDERS[case]
    folder = llama_folder(tmp_path / "model", 1)
    change(folder)
    line = refusal(folder, capsys)
    assert all(text in line for text in [*named, str(folder)]), line


def test_a_pointer_beside_a_megatron_checkpoint_is_refused(tmp_path, capsys):
    """What travels along is what the export gets."""
    folder, out = llama_folder(tmp_path / "model", 1), tmp_path / "megatron"
    assert convert_hf.main(["import", "--hf-model", str(folder), "--output", str(out)]) == 0
    (out / "huggingface" / "tokenizer.json").write_bytes(POINTER)
    assert convert_hf.main(["export", "--checkpoint", str(out), "--output", str(tmp_path / "back")]) == 2
    assert "tokenizer.json: is a pointer of Git LFS" in capsys.readouterr().err


HARMLESS: dict[str, Change] = {
    "Mistral's own form beside": _file("consolidated.safetensors"),
    "GGUF beside": _file("model-q8_0.gguf"),
    "pickled weights beside": _file("pytorch_model.bin"),
    "states of a trainer beside": _file("global_step9/mp_rank_00_model_states.pt"),
    "a finished download": _file(f"{WEIGHTS}.incomplete"),
}


@pytest.mark.parametrize("case", list(HARMLESS))
def test_other_forms_beside_the_weights_change_nothing(case, tmp_path):
    folder = llama_folder(tmp_path / "model", 1)
    HARMLESS[case](folder)
    assert torch.equal(embedding(folder), llama_tensors(1)[EMBEDDING])


def test_without_a_stated_dtype_that_of_the_tensors_counts(tmp_path):
    folder = llama_folder(tmp_path / "model")
    _configured(torch_dtype=None)(folder)
    tensors = {name: tensor.bfloat16() for name, tensor in llama_tensors(1).items()}
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors))
    arguments = open_source("model", folder).arguments
    assert (arguments["params_dtype"], arguments["bf16"]) == ("bfloat16", True)


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_a_pointer_is_no_tokenizer_for_texts(kind, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    place = tmp_path if kind == "HuggingFaceTokenizer" else tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match=r"tokenizer\.model: is a pointer of Git LFS.*lfs pull"):
        TokenizerSettings(kind, str(place)).check()


def test_equal_copies_of_a_tensor_are_one(tmp_path, capsys):
    """Whichever shard the index names; a copy with other numbers, or of another form, is no copy."""
    held = llama_tensors(1)
    shards = {"model-1.safetensors": held, "model-2.safetensors": {EMBEDDING: held[EMBEDDING]}}
    for number, named in enumerate(shards):
        folder = llama_folder(tmp_path / f"model{number}", 2)
        in_shards(folder, shards, dict.fromkeys(held, "model-1.safetensors") | {EMBEDDING: named})
        if number == 0:  # the second shard must be one of the index's
            in_shards(
                folder,
                shards
                | {"model-2.safetensors": {EMBEDDING: held[EMBEDDING], "model.norm.weight": held["model.norm.weight"]}},
                dict.fromkeys(held, "model-1.safetensors") | {"model.norm.weight": "model-2.safetensors"},
            )
        assert torch.equal(embedding(folder), held[EMBEDDING])
    for other in (held[EMBEDDING] + 1, held[EMBEDDING].bfloat16(), held[EMBEDDING][:-1]):
        in_shards(folder, shards | {"model-2.safetensors": {EMBEDDING: other}})
        assert f"{EMBEDDING} is in model-1.safetensors as well, with other numbers" in refusal(folder, capsys)
