"""Proof of a result: one flipped bit anywhere is found and named, by itself and when the result is mixed again."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_btx.mixing.cli import main
from tests.support.mixing import mix
from tests.unit.mixing.checkpoints import expert_words, refused
from tests.unit.mixing.folders import llama_folder

PLACES = 40
TOKENIZER = {
    "tokenizer.json": '{"model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}',
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two Hugging Face models with tokenizer files."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: llama_folder(folder / name, seed) for seed, name in enumerate("ab")}
    for model in made.values():
        for name, content in TOKENIZER.items():
            (model / name).write_text(content)
    return made


@pytest.fixture(scope="module", params=["megatron", "hf"])
def result(request, models, tmp_path_factory) -> Path:
    """An average, in either format; for Hugging Face in several files with an index."""
    from megatron_btx.checkpoint import safetensors

    folder = tmp_path_factory.mktemp("result")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "SHARD_BYTES", 8000)
        return mix(models, folder / "out", "--method", "average", "--output-format", request.param)


@pytest.fixture
def copy(result, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(result, tmp_path / "sources" / "out")


def stretches(folder: Path) -> dict[str, list[tuple[int, int, str]]]:
    """For each file of numbers, where its tensors lie, from the manifest."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for name, tensor in json.loads((folder / "manifest.json").read_text())["tensors"].items():
        for block in tensor["blocks"]:
            found.setdefault(block["file"], []).append((block["position"], block["bytes"], name))
    return found


def bits(folder: Path) -> Iterator[tuple[Path, int, str]]:
    """Places of every kind: a file, a byte of it, and the tensor whose number that is ("" for none)."""
    random_, numbers = random.Random(3), stretches(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for number in range(PLACES):
        file = files[number % len(files)]
        held = numbers.get(str(file.relative_to(folder)), [])
        if held and random_.random() < 0.7:
            begin, size, name = random_.choice(held)
            yield file, begin + random_.randrange(size), name
        else:
            frame = set(range(file.stat().st_size))
            for begin, size, _ in held:
                frame -= set(range(begin, begin + size))
            yield file, random_.choice(sorted(frame)), ""


def flip(file: Path, at: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        (value,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([value ^ 1 << bit]))


def checked(folder: Path, capsys) -> str:
    """Check an old output; returns the one line of its refusal, or "" where all is well."""
    capsys.readouterr()
    code = main(["--verify", "--output", str(folder)])
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) in ((0, 0), (2, 1)), lines
    return lines[0] if lines else ""


def test_every_kind_of_file_is_there(copy):
    names = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()}
    if (copy / "release").is_dir():
        expected = {"latest_checkpointed_iteration.txt", "megatron_args.txt", "release/.metadata"}
        expected |= {"release/metadata.json", "release/__0_0.distcp", "huggingface/tokenizer.json"}
    else:
        expected = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
        assert sum(name.endswith(".safetensors") for name in names) > 2
    assert names > expected | {"manifest.json"}


def test_one_flipped_bit_is_found_and_named(copy, capsys):
    assert checked(copy, capsys) == ""
    random_, kinds = random.Random(4), set()
    for file, at, tensor in bits(copy):
        bit = random_.randrange(8)
        flip(file, at, bit)
        message = checked(copy, capsys)
        assert file.name in message and tensor in message, (file, at, bit, message)
        kinds.add((file.name, bool(tensor)))
        flip(file, at, bit)
    assert len(kinds) >= 8
    assert checked(copy, capsys) == ""


def test_a_manifest_that_was_changed_is_never_believed(copy, capsys):
    """Each of its kinds of value, and its keys: a flipped bit must not make it look like none, or like another's."""
    file, random_ = copy / "manifest.json", random.Random(5)
    content = file.read_bytes()
    places = [content.index(key) + n for key in (b'"form"', b'"manifest_sha256"', b'"files"') for n in range(8)]
    for at in [*places, *(random_.randrange(len(content)) for _ in range(PLACES))]:
        for bit in (0, 5, 7):
            flip(file, at, bit)
            message = checked(copy, capsys)
            assert "manifest.json" in message, (at, bit, message)
            flip(file, at, bit)


def test_a_source_with_one_flipped_bit_is_refused(copy, models, tmp_path, capsys):
    """An earlier average as an expert: the expert, the file and the tensor are named before anything is mixed."""
    random_ = random.Random(6)
    words = [*expert_words({"good": models["a"], "averaged": copy}), "--allow-other-tokenizer"]
    for file, at, tensor in list(bits(copy))[:20]:
        bit = random_.randrange(8)
        flip(file, at, bit)
        message = refused(words, tmp_path / "out", capsys)
        assert str(copy) in message and (not tensor or tensor in message), (file, at, bit, message)
        flip(file, at, bit)
    mix({"good": models["a"], "averaged": copy}, tmp_path / "out", "--verify")


def test_a_source_whose_manifest_is_damaged_is_refused(copy, models, tmp_path, capsys):
    """Not taken for one that has none."""
    file = copy / "manifest.json"
    words, content = expert_words({"good": models["a"], "averaged": copy}), file.read_bytes()
    for key in (b'"form"', b'"manifest_sha256"', b'"tensors"', b'"files"', b'"bytes"'):
        flip(file, content.index(key) + 2, 1)
        message = refused(words, tmp_path / "out", capsys)
        assert str(file) in message
        file.write_bytes(content)
    for nonsense in (
        b"[1]",
        b"{",
        b'{"form": 2}',
        b'{"form": 2, "files": 3}',
        b'{"form": 2, "files": {"x": 3}}',
        b"\xff",
    ):
        file.write_bytes(nonsense)
        assert str(file) in refused(words, tmp_path / "out", capsys)


def test_training_that_goes_on_beside_a_result(copy, models, tmp_path, capsys):
    """Its iterations are no part of the manifest, and may be mixed; the result itself must be as it was."""
    if not (copy / "release").is_dir():
        pytest.skip("a Hugging Face folder has no iterations")
    shutil.copytree(copy / "release", copy / "iter_0000007")
    (copy / "latest_checkpointed_iteration.txt").write_text("7")
    mix({"a": copy, "b": copy}, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    words = expert_words({"a": copy / "release", "b": copy})
    assert "was not written with the rest" in refused(words, tmp_path / "out", capsys)
    flip(copy / "manifest.json", 200, 1)
    assert "manifest.json" in refused(expert_words({"a": copy, "b": copy}), tmp_path / "out", capsys)


def test_missing_and_additional_files(copy, models, tmp_path, capsys):
    """A file too many is refused as well: an index, a tokenizer file or a common.pt more changes what is read."""
    files = sorted(file for file in copy.rglob("*") if file.is_file() and file.name != "manifest.json")
    for file in files:
        content = file.read_bytes()
        file.unlink()
        message = checked(copy, capsys)
        assert file.name in message and "does not exist" in message
        file.write_bytes(content)
    for name in ("README.md", "release/common.pt", "model.safetensors", "tokenizer.model", "deep/er/x", ".hidden"):
        file = copy / name
        if file.exists() or not (file.parent.is_dir() or name.startswith("deep")):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("more")
        assert str(file) in checked(copy, capsys)
        assert str(file) in refused(expert_words({"a": models["a"], "b": copy}), tmp_path / "out", capsys)
        file.unlink()
    os.symlink("/etc", copy / "link")
    assert str(copy / "link") in checked(copy, capsys)
    (copy / "link").unlink()
    (copy / "manifest.json").unlink()
    assert "manifest.json" in checked(copy, capsys)


def test_cut_and_grown_files(copy, capsys):
    """All but the manifest, whose hash is of what it says, not of the blanks in it."""
    for file in sorted(f for f in copy.rglob("*") if f.is_file() and f.name != "manifest.json"):
        content = file.read_bytes()
        for changed in (content[:-1], content + b"\0", b""):
            file.write_bytes(changed)
            assert file.name in checked(copy, capsys)
        file.write_bytes(content)
