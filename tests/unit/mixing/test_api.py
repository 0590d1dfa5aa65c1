"""The door of the library: what a notebook calls does what the command does, says nothing, and returns what it made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.mixing import cli, convert_hf
from megatron_btx.mixing.api import check_result, convert, mix
from tests.unit.mixing.checkpoints import expert_words
from tests.unit.mixing.folders import llama_folder

HIDDEN = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two Hugging Face models."""
    folder = tmp_path_factory.mktemp("models")
    return {name: llama_folder(folder / name, seed) for seed, name in enumerate("ab")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a result, the manifest with all its hashes among them."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_mix_does_what_the_command_does(models, tmp_path, capsys):
    """The same bytes in every file, for settings that are all not the defaults; nothing is printed."""
    rows = tmp_path / "rows.npy"
    np.save(rows, np.ones((4, HIDDEN), np.float32))
    result = mix(
        models,
        tmp_path / "out",
        method="split",
        chunks=2,
        topk=3,
        weights={"a": 2.0},
        router_init=rows,
        pad_vocabulary=64,
        output_format="hf",
        verify=True,
    )
    assert capsys.readouterr() == ("", "")
    assert result.folder == tmp_path / "out" and result.arguments_file is None
    assert result.manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert result.manifest["method"] == "split" and result.manifest["router"]["init"] == str(rows)
    assert result.summary.startswith("split: ") and "tensors equal what their rules give" in result.verification
    words = [*expert_words(models), "--method=split", "--chunks=2", "--moe-router-topk=3", "--weight=a=2.0"]
    words += [f"--router-init={rows}", "--pad-vocab-to-multiple-of=64", "--output-format=hf", "--verify"]
    assert cli.main([*words, "--output", str(tmp_path / "command")]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "command")
    assert result.summary in capsys.readouterr().out
    assert check_result(tmp_path / "out") == len(result.manifest["tensors"])


def test_layers_and_fields_are_given_as_on_the_command_line(models, tmp_path):
    """A list for the layers; a field by Hugging Face's name."""
    result = mix(models, tmp_path / "out", layer_frequency=[0, 1], take={"rope_theta": "b"})
    assert result.arguments_file == tmp_path / "out" / "megatron_args.txt"
    assert "--moe-layer-freq [0,1]" in result.arguments_file.read_text().replace("'", "")
    assert result.manifest["take"] == {"rotary_base": "b"}


def test_convert_takes_the_other_format(models, tmp_path, capsys):
    """Import, then export: the same files as by the command, and back to the first model's bytes."""
    imported = convert(models["a"], tmp_path / "megatron")
    assert imported.manifest["format"] == "megatron"
    exported = convert(tmp_path / "megatron", tmp_path / "hf")
    assert exported.manifest["format"] == "hf"
    assert capsys.readouterr() == ("", "")
    words = ["export", "--checkpoint", str(tmp_path / "megatron"), "--output", str(tmp_path / "command")]
    assert convert_hf.main(words) == 0
    assert contents(tmp_path / "hf") == contents(tmp_path / "command")


def test_a_dry_run_writes_nothing(models, tmp_path):
    """It needs no output, and its summary is the plan."""
    result = mix(models, dry_run=True)
    assert result.folder is None and result.manifest == {} and "tensors as megatron" in result.summary
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "no output": ({}, "--output is missing"),
    "unknown method": ({"method": "merge"}, "--method merge: expected one of btx, "),
    "unknown format": ({"output_format": "gguf"}, "--output-format gguf: expected megatron or hf"),
    "unknown vocabulary": ({"vocabulary": "both"}, "--vocab both: expected same or union"),
    "too many experts per token": ({"topk": 3}, "--moe-router-topk 3: expected 1 to 2"),
    "no standard deviation": ({"router_std": 0.0}, "--router-std 0.0: expected a number above 0"),
    "one field by two names": ({"take": {"rope_theta": "a", "rotary_base": "b"}}, "--take rotary_base= is given twice"),
    "a list of another length": ({"layer_frequency": [1]}, "--moe-layer-freq [1]: expected 2 numbers"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_the_command_refuses_is_raised(case, models, tmp_path):
    """What argparse would have refused, too."""
    settings, message = WRONG[case]
    output = None if case == "no output" else tmp_path / "out"
    with pytest.raises(InputError) as error:
        mix(models, output, **settings)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_is_not_asked(models, tmp_path, monkeypatch):
    """In a task of several the door still works alone: whoever calls it says which process does."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert mix(models, tmp_path / "out").folder == tmp_path / "out"
