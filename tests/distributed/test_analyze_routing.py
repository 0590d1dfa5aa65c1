"""Routing analysis with the real Megatron: every layout counts the same, as the evaluation does; figures and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.test_identities import evaluate
from tests.support import pico
from tests.support.mixing import mix
from tests.support.runner import Zygote

ENTRY = "megatron_btx.evaluation.analyze_routing"
LAYOUTS = {
    "1": (1, "--micro-batch-size 4"),
    "dp2": (2, "--micro-batch-size 2"),
    "ep2": (2, "--micro-batch-size 2 --expert-model-parallel-size 2"),
    "pp2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
    "pp2-vpp2": (
        2,
        "--micro-batch-size 2 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
    "tp2": (
        2,
        "--micro-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
    ),
}


@pytest.fixture(scope="module")
def mixture(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    experts = {"a": dense / "iter_0000005", "b": dense, "c": dense, "d": dense / "iter_0000005"}
    return mix(experts, tmp_path_factory.mktemp("routed") / "mix")


def command(mixture: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    words = [*pico.MODEL, *pico.MOE, "--micro-batch-size", "4", "--btx-route-model", f"btx={mixture}"]
    words += ["--btx-route-data", f"home/one={corpus}", "--btx-route-tokens", "1024"]
    return [*words, "--btx-route-output", str(output), *more]


@pytest.fixture(scope="module")
def analysed(zygote: Zygote, mixture: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """routing.json and the page's data under a layout."""
    known = {}

    def analyse(layout: str) -> tuple[dict, dict, Path]:
        if layout not in known:
            folder = tmp_path_factory.mktemp(f"routes-{layout}")
            world_size, flags = LAYOUTS[layout]
            words = command(mixture, corpus, folder / "out", *flags.split())
            zygote.run(world_size, words, folder / "log", entry=ENTRY)
            page = (folder / "out" / "tokens.html").read_text()
            data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
            known[layout] = (json.loads((folder / "out" / "routing.json").read_text()), data, folder / "out")
        return known[layout]

    return analyse


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "1"])
def test_every_layout_counts_the_same(layout, analysed):
    """Counts exactly, means to rounding; the page's gates to the thousandth that it shows."""
    (found, page, _), (reference, expected_page, _) = analysed(layout), analysed("1")
    routed, expected = found["models"]["btx"]["home/one"], reference["models"]["btx"]["home/one"]
    assert routed["tokens"] == expected["tokens"] == 1024
    for key in ("choices", "first"):
        for layer, of_reference in zip(routed[key], expected[key], strict=True):
            assert layer == pytest.approx(of_reference, abs=1e-9)
    for key in ("probabilities", "gates"):
        for layer, of_reference in zip(routed[key], expected[key], strict=True):
            assert layer == pytest.approx(of_reference, abs=1e-6)
    assert routed["entropy"] == pytest.approx(expected["entropy"], abs=1e-6)
    text, expected_text = page["models"]["btx"]["home/one"], expected_page["models"]["btx"]["home/one"]
    assert text["pieces"] == expected_text["pieces"] and len(text["pieces"]) == 32
    for layer, of_reference in zip(text["gates"], expected_text["gates"], strict=True):
        for token, of_token in zip(map(dict, layer), map(dict, of_reference), strict=True):
            assert token == pytest.approx(of_token, abs=0.0011)
            assert sum(token.values()) == pytest.approx(1, abs=0.003) and len(token) == 2


def test_shares_are_the_evaluations(analysed, mixture, zygote, corpus, tmp_path):
    """The same shares and loss as megatron_btx.evaluate's; figures are there."""
    found, _, folder = analysed("1")
    routed = found["models"]["btx"]["home/one"]
    result = evaluate(zygote, tmp_path, {"btx": mixture}, corpus, [*pico.MOE, "--micro-batch-size", "4"])["btx"]
    for layer, of_reference in zip(routed["choices"], result["routing"]["text"], strict=True):
        assert layer == pytest.approx(of_reference, abs=1e-9)
    assert routed["loss"] == pytest.approx(result["losses"]["text"], abs=1e-6)
    assert found["experts"] == ["a", "b", "c", "d"]
    for name in ("routing.png", "routing-first.png", "overlap.png", "entropy.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_padding_to_the_capacity_is_no_choice(mixture, corpus, zygote, tmp_path):
    """Experts that compute on full capacities are chosen by the same tokens, and drop the same."""
    switch = "--moe-router-topk 1 --moe-router-pre-softmax --moe-expert-capacity-factor 1.5".split()
    found = []
    for padding in ([], ["--moe-pad-expert-input-to-capacity"]):
        words = command(mixture, corpus, tmp_path / str(len(padding)), *switch, *padding)
        zygote.run(1, words, tmp_path / "log", entry=ENTRY)
        result = json.loads((tmp_path / str(len(padding)) / "routing.json").read_text())
        found.append(result["models"]["btx"]["home/one"])
    assert max(found[0]["dropped"]) > 0.05
    for key in ("choices", "first", "dropped", "dead"):
        assert found[0][key] == found[1][key], key


def test_a_text_file_is_its_dataset(analysed, mixture, corpus, zygote, tmp_path):
    """The documents as lines of JSON, tokenized and ended as they are read: the same numbers and the same page."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset, file = IndexedDataset(str(corpus)), tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(map(str, dataset[at][:-1]))}) for at in range(len(dataset))]
    file.write_text("\n".join(lines))
    words = [*command(mixture, file, tmp_path / "out"), "--micro-batch-size", "4"]
    zygote.run(1, words, tmp_path / "log", entry=ENTRY)
    reference, page, _ = analysed("1")
    found = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert found == {**reference, "texts": {"home/one": str(file)}}
    assert json.dumps(page["models"], separators=(",", ":")) in (tmp_path / "out" / "tokens.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--btx-route-data", "other=/nowhere/text.jsonl"], "other=/nowhere/text.jsonl: does not exist"),
        (["--btx-route-data", "a/b/c=/nowhere"], "expected DOMAIN=TEXT or DOMAIN/TASK=TEXT"),
        (["--btx-route-data", "other=/nowhere/text"], "/nowhere/text.bin does not exist"),
        (["--btx-route-data", "home"], "expected NAME=PATH"),
        (["--btx-route-tokens", "0"], "0: fewer than one batch"),
        (["--btx-route-tokens", "64"], "fewer than one batch"),
        (["--btx-route-beside", "/nowhere.json"], "/nowhere.json: does not exist"),
        (["--btx-route-text", "/dev/null"], "is empty"),
    ],
)
def test_refusals(more, said, mixture, corpus, zygote, tmp_path):
    """One line, exit code 2."""
    run = zygote.run(1, command(mixture, corpus, tmp_path / "out", *more), tmp_path / "log", entry=ENTRY, expect=2)
    lines = [line for line in run.text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.glob("out/*"))
