"""Warm-started routers with the real Megatron: any layout, a checkpoint that differs in its routers alone, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.common.errors import InputError
from megatron_btx.evaluation.init_router import check_output
from tests.support import pico
from tests.support.mixing import mix
from tests.support.runner import Zygote

ENTRY = "megatron_btx.evaluation.init_router"
LAYOUTS = {
    "1": (1, "--micro-batch-size 4"),
    "dp2": (2, "--micro-batch-size 2"),
    "ep2": (2, "--micro-batch-size 2 --expert-model-parallel-size 2"),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
    "tp2": (
        2,
        "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
    ),
}
"""Micro-batches such that every layout cuts the texts at the same multiple of four sequences."""


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four domains with words of their own: three tokens of four come from a quarter of the vocabulary."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, quarter = tmp_path_factory.mktemp("domains"), (pico.VOCABULARY - 2) // 4
    for number, name in enumerate("abcd"):
        random = np.random.default_rng(number)
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.uint16)
        for _ in range(120):
            length = int(random.integers(20, 120))
            own = random.integers(0, quarter, length) + number * quarter
            tokens = np.where(random.random(length) < 0.75, own, random.integers(0, 4 * quarter, length))
            tokens = np.append(tokens, pico.VOCABULARY - 1).astype(np.int32)
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        builder.finalize(f"{folder / name}.idx")
    return {name: folder / name for name in "abcd"}


@pytest.fixture(scope="module")
def mixture(zygote: Zygote, domains: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts of four domains, from one seed."""
    folder = tmp_path_factory.mktemp("experts")
    arguments = [*pico.train(domains["a"], 1), "--save", str(folder / "seed"), "--save-interval", "1"]
    zygote.run(1, arguments, folder / "seed.log")
    for name, data in domains.items():
        arguments = [*pico.train(data, 15), "--pretrained-checkpoint", str(folder / "seed")]
        zygote.run(1, [*arguments, "--save", str(folder / name), "--save-interval", "15"], folder / f"{name}.log")
    return mix({name: folder / name for name in domains}, folder / "mix")


DOCUMENTS = {"all": 60, "few": 20}
"""For each domain: all where the fit itself is judged, few where it is only compared with that of another layout."""


def command(mixture: Path, domains: dict[str, Path], output: Path, *more: str) -> list[str]:
    words = [f"{name}={prefix}" for name, prefix in domains.items()]
    arguments = [*pico.MODEL, *pico.MOE, "--micro-batch-size", "1", "--btx-init-model", str(mixture)]
    return [
        *arguments,
        "--btx-init-data",
        *words,
        "--btx-init-output",
        str(output),
        "--btx-init-documents",
        str(DOCUMENTS["all"]),
        *more,
    ]


@pytest.fixture(scope="module")
def started(zygote: Zygote, mixture: Path, domains: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Rows, report and output of a layout, a method and a number of documents."""
    known = {}

    def start(layout: str, method: str = "ridge", documents: str = "all"):
        key = (layout, method, documents)
        if key not in known:
            folder = tmp_path_factory.mktemp(f"init-{layout}-{method}")
            world_size, flags = LAYOUTS[layout]
            words = command(mixture, domains, folder / "warm", *flags.split(), "--btx-init-method", method)
            words += ["--btx-init-documents", str(DOCUMENTS[documents])]
            zygote.run(world_size, words, folder / "log", entry=ENTRY)
            report = json.loads((folder / "warm.routers.json").read_text())
            known[key] = (np.load(folder / "warm.routers.npy"), report, folder / "warm")
        return known[key]

    return start


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "1"])
def test_every_layout_fits_the_same(layout, started):
    """Sums of fp32 forward passes in other orders, then one fp64 solution."""
    (rows, report, _), (reference, expected, _) = (started(name, documents="few") for name in (layout, "1"))
    np.testing.assert_allclose(rows, reference, rtol=0, atol=1e-4 * np.abs(reference).max())
    documents, tokens, used, held_out, held_out_tokens, held_out_used = report["texts"]["a"]
    assert (documents, held_out, report["texts"]) == (16, 4, expected["texts"])
    assert 0 <= tokens - used < 32 * 8 and 0 <= held_out_tokens - held_out_used < 32 * 8
    for key in ("before", "random", "after"):
        assert report["reports"][key]["losses"] == pytest.approx(expected["reports"][key]["losses"], abs=1e-5)
    for choice, of_reference in zip(report["choices"], expected["choices"], strict=True):
        assert (choice["lambda"], choice["scale"]) == (of_reference["lambda"], of_reference["scale"])


@pytest.mark.parametrize("method", ["ridge", "centroids"])
def test_warm_routers_know_their_domains(method, started):
    """Well above the chance of one in four on held-out documents, in every layer; the loss is below random routers'."""
    _, report, _ = started("1", method)
    after, random = report["reports"]["after"], report["reports"]["random"]
    for warm, drawn in zip(after["layers"], random["layers"], strict=True):
        assert warm["accuracy"] > 0.4 > drawn["accuracy"] - 0.1
        assert sum(warm["load"]) == pytest.approx(1)
    assert sum(after["losses"]) < sum(random["losses"])


def test_only_the_routers_change(started, mixture, zygote, corpus, tmp_path):
    """Every other tensor bit for bit; the arguments, with the experts' names; and it trains."""
    rows, _, output = started("1")
    before, after = (TorchDistReader(resolve_iteration(path)) for path in (mixture, output))
    assert set(before.tensors) == set(after.tensors)
    for key, held in before.tensors.items():
        one, other = (reader.read(key, (0,) * len(held.shape), held.shape) for reader in (before, after))
        if key.endswith("router.weight"):
            assert torch.equal(other.float(), torch.from_numpy(rows))
        else:
            assert torch.equal(one, other), key
    assert after.arguments()["btx_experts"] == ["a", "b", "c", "d"]
    assert after.arguments()["btx_untrained_routers"] is True
    zygote.run(1, [*pico.train(corpus, 1, moe=True), "--pretrained-checkpoint", str(output)], tmp_path / "log")


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        ({"d": None}, [], "d: missing or unknown; every expert needs documents, and the mixture has a, b, c, d"),
        ({"e": "a"}, [], "e: missing or unknown"),
        ({}, ["--btx-init-documents", "4"], "expected at least 5"),
        ({}, ["--btx-init-passes", "0"], "expected at least 1"),
        ({"a": "/nowhere/text"}, [], "/nowhere/text.bin does not exist"),
        ({}, ["--btx-init-documents", "5", "--micro-batch-size", "64"], "fewer than one batch"),
    ],
)
def test_refusals(change, more, said, mixture, domains, zygote, tmp_path):
    """One line; nothing is written."""
    data = {**domains, **{name: domains.get(value, value) for name, value in change.items()}}
    data = {name: prefix for name, prefix in data.items() if prefix is not None}
    run = zygote.run(1, command(mixture, data, tmp_path / "warm", *more), tmp_path / "log", entry=ENTRY, expect=2)
    lines = [line for line in run.text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.glob("warm*"))


def test_an_output_is_never_overwritten(mixture, domains, zygote, tmp_path):
    """Refused before anything is computed."""
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "mine").write_text("mine")
    run = zygote.run(1, command(mixture, domains, tmp_path / "warm"), tmp_path / "log", entry=ENTRY, expect=2)
    assert "warm: exists; name a new folder" in run.text()
    assert (tmp_path / "warm" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("made", "said"),
    [("warm.routers.npy", "warm.routers.npy is there already"), ("warm", "warm: exists"), ("..", "can be written to")],
)
def test_places_that_cannot_be_written(made, said, tmp_path):
    """Told at once, not after the fit; a file of that name, one beside it, a file where a folder should be."""
    output = tmp_path / "warm"
    if made == "..":
        output = tmp_path / "file" / "deeper" / "warm"
        made = "file"
    (tmp_path / made).write_text("mine")
    with pytest.raises(InputError, match=said):
        check_output(str(output))
    check_output(str(tmp_path / "new" / "warm"))


def test_dense_models_have_no_routers(dense, domains, zygote, tmp_path):
    """The flags must describe a mixture, and the checkpoint be one."""
    words = [word for word in command(dense, domains, tmp_path / "warm")]
    assert "num-experts" in _one_line(zygote, words, tmp_path)


def _one_line(zygote: Zygote, words: list[str], folder: Path) -> str:
    run = zygote.run(1, words, folder / "log", entry=ENTRY, expect=2)
    return next(line for line in run.text().splitlines() if line.startswith("error: "))
