"""Qwen2-MoE's shared expert: what is written adds nothing anywhere, what is read leaves no trace or is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.mixing import cli, convert_hf
from tests.support.hugging_face import MODELS, config_of, logits, make_model, same_tensors, save, tensors, write_folder
from tests.unit.mixing.checkpoints import tensors as megatron_tensors

CONFIG = MODELS["qwen2_moe"]
HIDDEN, LAYERS = 32, 3
SHAPES = {"gate_proj": (1, 0), "up_proj": (1, 0), "down_proj": (0, 1)}
"""The matrices; 1 where the width stands."""


@pytest.fixture(scope="module")
def model() -> Any:
    """A Qwen2-MoE model as transformers makes it with a shared expert of width zero."""
    return make_model(CONFIG)


@pytest.fixture(scope="module")
def original(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("original") / "width-0")


@pytest.fixture(scope="module")
def imported(original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "megatron"
    assert to_megatron(original, target) == 0
    return target


@pytest.fixture(scope="module")
def written(imported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("written") / "hf"
    words = ["export", "--checkpoint", str(imported), "--output", str(target), "--verify"]
    assert convert_hf.main(words) == 0
    return target


def to_megatron(folder: Path, target: Path) -> int:
    return convert_hf.main(["import", "--hf-model", str(folder), "--output", str(target), "--verify"])


def shared(numbers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in numbers.items() if ".shared_expert" in key}


def with_width(original: Path, target: Path, width: int, **changes: torch.Tensor | None) -> Path:
    """A copy with shared experts of zeros; ``changes`` are tensors of layer 1, None for one that is left out."""
    numbers = {key: tensor for key, tensor in tensors(original).items() if ".shared_expert." not in key}
    for layer in range(LAYERS):
        for name, axes in SHAPES.items():
            shape = [width if axis else HIDDEN for axis in axes]
            numbers[f"model.layers.{layer}.mlp.shared_expert.{name}.weight"] = torch.zeros(shape)
    for name, tensor in changes.items():
        key = f"model.layers.1.mlp.shared_expert{'_' if name == 'gate' else '.'}{name}.weight"
        assert numbers.pop(key) is not None
        if tensor is not None:
            numbers[key] = tensor
    return write_folder(target, config_of(original) | {"shared_expert_intermediate_size": width}, numbers)


def test_what_is_written(written):
    """Zeros of a width that servers can cut, under gates that are nowhere zero."""
    assert config_of(written)["shared_expert_intermediate_size"] == 256
    found = shared(tensors(written))
    assert len(found) == 4 * LAYERS
    for key, tensor in found.items():
        if key.endswith("_gate.weight"):
            assert tensor.shape == (1, HIDDEN) and tensor.min() == 1 and tensor.max() < 2
            assert len(tensor.unique()) == HIDDEN, "equal numbers give zero where a hidden state's mean is zero"
        else:
            assert sorted(tensor.shape) == [HIDDEN, 256] and not tensor.any()
            assert tensor.shape[0] == (HIDDEN if "down_proj" in key else 256)


def test_transformers_computes_the_same_bits(model, written, older):
    assert torch.equal(logits(written), logits(model))
    older_logits, _ = older.load(written)
    assert torch.allclose(older_logits, logits(model), atol=1e-5)


def test_the_manifest_has_these_tensors_too(written, capsys):
    manifest = json.loads((written / "manifest.json").read_text())
    found = {key: entry["operation"] for key, entry in manifest["tensors"].items() if ".shared_expert" in key}
    assert {key: "ramp" if key.endswith("_gate.weight") else "zeros" for key in found} == found
    assert len(found) == 4 * LAYERS
    assert cli.main(["--verify", "--output", str(written)]) == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("width", [0, 1, 64, 256, 5632])
def test_zeros_of_any_width_leave_no_trace(width, original, imported, written, tmp_path):
    """The same Megatron checkpoint, whatever the width; and from there the same model folder."""
    folder = with_width(original, tmp_path / "source", width)
    assert to_megatron(folder, tmp_path / "megatron") == 0
    one, other = megatron_tensors(tmp_path / "megatron"), megatron_tensors(imported)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    flags = [(place / "megatron_args.txt").read_text() for place in (tmp_path / "megatron", imported)]
    assert flags[0].replace(str(tmp_path / "megatron"), str(imported)) == flags[1] and "shared" not in flags[0]
    words = ["export", "--checkpoint", str(tmp_path / "megatron"), "--output", str(tmp_path / "back")]
    assert convert_hf.main(words) == 0
    assert same_tensors(tmp_path / "back", written) and config_of(tmp_path / "back") == config_of(written)


def test_its_own_result_is_read_back(written, imported, tmp_path):
    assert to_megatron(written, tmp_path / "megatron") == 0
    one, other = megatron_tensors(tmp_path / "megatron"), megatron_tensors(imported)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_zeros_stay_zeros_when_the_mixture_is_trained_further(written):
    """What users tune in transformers can come back: every gradient has a factor of zero."""
    from tests.support.hugging_face import loaded

    model = loaded(written).train()
    tokens = torch.arange(1, 33)[None]
    model(tokens, labels=tokens).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if ".shared_expert" in name}
    assert len(found) == 4 * LAYERS and not any(grad.any() for grad in found.values())


def _one_number(shape: tuple[int, int], number: float) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor[-1, -1] = number
    return tensor


REFUSED: dict[str, tuple[int, dict[str, torch.Tensor | None], str]] = {
    "a number in the gate's matrix": (64, {"gate_proj": _one_number((64, HIDDEN), 1e-30)}, "other numbers than zero"),
    "a number in up": (64, {"up_proj": _one_number((64, HIDDEN), -1.0)}, "other numbers than zero"),
    "a number in down": (64, {"down_proj": _one_number((HIDDEN, 64), 1.0)}, "other numbers than zero"),
    "not a number": (64, {"down_proj": _one_number((HIDDEN, 64), float("nan"))}, "other numbers than zero"),
    "a gate that is not finite": (64, {"gate": _one_number((1, HIDDEN), float("inf"))}, "NaN or infinite"),
    "a gate of NaN over nothing": (0, {"gate": _one_number((1, HIDDEN), float("nan"))}, "NaN or infinite"),
    "a matrix is missing": (64, {"up_proj": None}, "is missing"),
    "a gate is missing": (64, {"gate": None}, "is missing"),
    "another width is stored": (0, {"up_proj": torch.zeros(64, HIDDEN)}, "[64, 32] is stored"),
    "another hidden size": (64, {"gate": torch.ones(1, 16)}, "[1, 16] is stored"),
    "eight bits": (64, {"up_proj": torch.zeros(64, HIDDEN, dtype=torch.int8)}, "is stored as I8"),
}


@pytest.mark.parametrize("width, changes, said", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(width, changes, said, original, tmp_path, capsys):
    folder = with_width(original, tmp_path / "source", width, **changes)
    assert to_megatron(folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.shared_expert" in error and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_shared_expert_where_the_architecture_has_none(tmp_path, capsys):
    """Qwen3-MoE would not load it; it is no leftover to be ignored."""
    source = save(make_model(MODELS["qwen3_moe"]), tmp_path / "model")
    extra = {"model.layers.0.mlp.shared_expert.up_proj.weight": torch.ones(8, HIDDEN)}
    folder = write_folder(tmp_path / "source", config_of(source), tensors(source) | extra)
    assert to_megatron(folder, tmp_path / "out") == 2
    assert "shared_expert.up_proj.weight is no tensor of the model" in capsys.readouterr().err
