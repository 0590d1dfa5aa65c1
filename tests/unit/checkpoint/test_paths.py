"""What a path may be: ``~``, folders of the hub's cache, names of its models, blanks."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_btx.checkpoint.paths import model_path
from megatron_btx.common.errors import CheckpointError
from megatron_btx.mixing.loader import open_source
from tests.unit.mixing.folders import llama_folder


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A model in the hub's cache, as huggingface_hub lays it out: files are links to blobs."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    place = cache / "models--org--pico"
    made = llama_folder(tmp_path / "made")
    snapshot = place / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    for file in made.iterdir():
        file.rename(place / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc123")
    return place


def test_home_is_known_though_the_shell_does_not_see_it(tmp_path, monkeypatch):
    """As in ``--expert math=~/models/math``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    llama_folder(tmp_path / "models" / "math")
    assert open_source("math", "~/models/math").folder == tmp_path / "models" / "math"


def test_a_folder_of_the_cache_stands_for_its_snapshot(cached):
    assert open_source("model", cached).folder == cached / "snapshots" / "abc123"


def test_a_name_is_found_in_the_cache(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/pico", "https://huggingface.co/org/pico", "https://huggingface.co/org/pico/tree/main"):
        assert open_source("model", name).folder == cached / "snapshots" / "abc123"


def test_a_folder_of_the_same_name_comes_first(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama_folder(Path("org/pico"))
    assert open_source("model", "org/pico").folder == Path("org/pico")


def test_refs_main_chooses_among_snapshots(cached):
    (cached / "snapshots" / "0000").mkdir()
    assert model_path(cached).name == "abc123"


@pytest.mark.parametrize("reference", ["gone", None])
def test_several_snapshots_without_a_choice_are_refused(reference, cached):
    (cached / "snapshots" / "def456").mkdir()
    (cached / "refs" / "main").unlink()
    if reference:
        (cached / "refs" / "main").write_text(reference)
    with pytest.raises(CheckpointError, match=r"with one snapshot of the main revision.*give one of its snapshots"):
        open_source("model", cached)


def test_one_snapshot_needs_no_choice(cached):
    (cached / "refs" / "main").unlink()
    assert model_path(cached).name == "abc123"


def test_a_cache_without_a_snapshot_says_how_to_fetch_it(cached):
    (cached / "snapshots" / "abc123").rename(cached / "elsewhere")
    with pytest.raises(CheckpointError, match="with one snapshot.*hf download org/pico"):
        open_source("model", cached)


def test_a_name_that_is_not_there_says_how_to_fetch_it(cached):
    with pytest.raises(CheckpointError) as refusal:
        open_source("model", "org/other-7B")
    assert "no such folder" in str(refusal.value) and str(cached.parent) in str(refusal.value)
    assert "hf download org/other-7B" in str(refusal.value)


@pytest.mark.parametrize("name, told", [("config.json", "whole model"), ("m.gguf", "made from"), ("m.nemo", "unpack")])
def test_a_file_is_no_folder(name, told, tmp_path):
    folder = llama_folder(tmp_path / "model")
    (folder / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: is a file and no such folder; .*{told}"):
        open_source("model", folder / name)


def test_blanks_in_a_path(tmp_path):
    folder = llama_folder(tmp_path / "my models" / "math expert")
    assert open_source("math", str(folder)).folder == folder
