"""Ids beyond the vocabulary in a dataset that says nothing of itself: all ranks stop together, nothing is saved."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import pico
from tests.support.runner import Zygote, read_losses

LAYOUTS = {
    "one": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2": (2, ""),
}


def write(prefix: Path, documents: int, foreign: int | None) -> Path:
    """Documents of 16 tokens, two for each sequence; one of them has an id of another tokenizer."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number in range(documents):
        tokens = torch.arange(16, dtype=torch.int32) + number % 64
        if number == foreign:
            tokens[5] = 4977
        builder.add_document(tokens, [16])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    return {"own": write(folder / "own", 128, None), "foreign": write(folder / "foreign", 128, 40)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_stop_with_one_line(layout, data, zygote: Zygote, tmp_path: Path):
    """Each in its own words of one reason, soon; the steps before the batch count, and none is saved."""
    world, flags = LAYOUTS[layout]
    metrics, save = tmp_path / "metrics", tmp_path / "save"
    words = [*pico.train(data["foreign"], 16, metrics, cache=tmp_path / "cache"), *flags.split()]
    began = time.monotonic()
    run = zygote.start(world, [*words, "--save", str(save), "--save-interval", "16"], tmp_path / "log")
    zygote.wait(run, expect=None)
    assert run.codes == [2] * world, run.text()[-3000:]
    assert "Traceback" not in run.text() and time.monotonic() - began < 60
    lines = [line[line.index("error: ") :] for line in run.text().splitlines() if "error: " in line]
    assert len(lines) == world and len(set(lines)) == 1
    assert lines[0].startswith(f"error: {data['foreign']}: token ") and "has the id 4977" in lines[0]
    assert "ends at 95" in lines[0] and f"in step {len(read_losses(metrics)) + 1} " in lines[0]
    assert not (save / "latest_checkpointed_iteration.txt").exists()


def test_the_dataset_of_a_blend_and_of_validation_is_named(data, zygote: Zygote, tmp_path: Path):
    """The one that holds the id, not its neighbours."""
    words = pico.train(data["own"], 64, cache=tmp_path / "cache")
    place = words.index(str(data["own"]))
    blend = [*words[:place], "1", str(data["own"]), "1", str(data["foreign"]), *words[place + 1 :]]
    valid = [*words, "--valid-data-path", str(data["foreign"]), "--eval-iters", "16"]
    runs = {"blend": zygote.start(1, blend, tmp_path / "blend"), "valid": zygote.start(1, valid, tmp_path / "valid")}
    for name, run in runs.items():
        zygote.wait(run, expect=2)
        assert f"error: {data['foreign']}: token " in run.text(), run.text()[-3000:]
        assert ("the evaluation after step" in run.text()) == (name == "valid")


def test_padding_rows_pass_where_that_is_allowed(data, zygote: Zygote, tmp_path: Path):
    """Then a row is enough; without it they are foreign."""
    words = [*pico.train(data["foreign"], 16, cache=tmp_path / "cache"), "--padded-vocab-size", "5120"]
    refused = zygote.start(1, words, tmp_path / "refused")
    allowed = zygote.start(1, [*words, "--btx-allow-change", "dataset_tokenizer"], tmp_path / "allowed")
    zygote.wait(refused, expect=2)
    assert "ends at 95" in refused.text()
    zygote.wait(allowed, expect=0)


def test_texts_that_are_measured(data, zygote: Zygote, tmp_path: Path):
    """Every rank sees all of them: each refuses for itself."""
    words = [*pico.train(data["own"], 2, cache=tmp_path / "cache"), "--tensor-model-parallel-size", "2"]
    words += ["--btx-valid-data", f"math={data['foreign']}", "--btx-valid-tokens", "1024"]
    run = zygote.start(2, words, tmp_path / "log")
    zygote.wait(run, expect=None)
    assert run.codes == [2, 2] and f"error: math: {data['foreign']}: holds the token id 4977" in run.text()
