"""Rows suffice: a method of mixing with an option and a whole-tensor operation (tests/support/toys.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.mixing import cli
from megatron_btx.mixing.api import mix
from megatron_btx.mixing.methods import METHODS
from megatron_btx.plan.planner import plan_stages
from megatron_btx.recipe.load import load_recipe
from tests.support import toys
from tests.support.hugging_face import tensors
from tests.unit.mixing.folders import llama_folder

DENSITY = 0.3


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "trim", toys.trim())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: llama_folder(folder / name, seed) for seed, name in enumerate(("base", "a", "b"))}


def trimmed(expert: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The change of a tensor, by numbers alone."""
    change = expert.double() - base.double()
    kept = change.abs().flatten().topk(math.ceil(DENSITY * change.numel())).indices
    mask = torch.zeros(change.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view_as(change), change, 0.0)


def expected(models: dict[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result but its routers, made by plain torch."""
    base, *experts = (tensors(models[name]) for name in ("base", "a", "b"))
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for key, its in base.items():
        changes = [trimmed(expert[key], its) for expert in experts]
        if ".mlp." not in key:
            yield key, (its + sum(changes) / 2).to(its.dtype)
            continue
        layer, part = key.split(".mlp.")[0], parts[key.split(".")[-2]]
        for number, change in enumerate(changes):
            yield f"{layer}.block_sparse_moe.experts.{number}.{part}.weight", (its + change).to(its.dtype)


def mixed(models: dict[str, Path], output: Path | None, **options: object):
    experts = {name: models[name] for name in "ab"}
    return mix(experts, output, method="trim", base=models["base"], density=DENSITY, output_format="hf", **options)


def test_the_numbers_are_those_of_plain_torch(models, tmp_path):
    """And they are verified, said in the plan and recorded."""
    result = mixed(models, tmp_path / "out", verify=True, workers=3)
    found = tensors(tmp_path / "out")
    for key, tensor in expected(models):
        assert torch.equal(found.pop(key), tensor), key
    assert all(".gate." in key for key in found)
    assert "trim: experts and mean" in result.summary and "largest 0.3 of the differences" in result.summary
    assert f"the base     {models['base']}  (Hugging Face)  of no weight" in result.summary
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"] == {"density": DENSITY, "base": str(models["base"])}
    assert manifest["base"]["path"] == str(models["base"]) and "weight" not in manifest["base"]
    assert [expert["name"] for expert in manifest["experts"]] == ["a", "b"]
    assert {tensor["operation"] for tensor in manifest["tensors"].values()} == {"trim", "router"}


def test_the_command_line_knows_it(models, tmp_path, capsys):
    shown = " ".join(cli.parser().format_help().split())
    assert "--density D trim: share of the differences that is kept (default: 0.2)" in shown
    assert "trim: experts and mean of trimmed differences from a base" in shown
    words = [f"--expert={name}={models[name]}" for name in "ab"]
    words += ["--method=trim", f"--base={models['base']}", f"--density={DENSITY}", "--output-format=hf"]
    assert cli.main([*words, f"--output={tmp_path / 'out'}"]) == 0
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected(models))
    capsys.readouterr()
    key = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert cli.main([*words, f"--output={tmp_path / 'x'}", f"--explain={key}"]) == 0
    said = capsys.readouterr().out
    assert "largest 0.3 of the differences from the base from b: model.layers.0.mlp.down_proj.weight" in said
    assert "the base: model.layers.0.mlp.down_proj.weight" in said


def test_a_rule_that_is_broken_is_found(models, tmp_path, monkeypatch):
    """Writing and reading back agree: the operation's other road does not."""
    monkeypatch.setattr(
        toys.Trim, "prepare", lambda self, plan, planned: [0.0] * (len(planned.parts) - 1)
    )  # keeps everything
    with pytest.raises(CheckpointError, match=r"is not what its trim has to be, computed another way"):
        mixed(models, tmp_path / "out", verify=True)
    assert list(tmp_path.iterdir()) == []


RECIPE = """
data: {split: {train: 0.9, valid: 0.1}, domains: {math: {text: a.txt}, code: {text: b.txt}},
       tokenizer: {tokenizer-type: NullTokenizer, vocab-size: 1000}}
model: {num-layers: 2, hidden-size: 32, num-attention-heads: 4, seq-length: 64, max-position-embeddings: 64}
training: {micro-batch-size: 1, global-batch-size: 2, save-interval: 9, lr: 1.0e-3}
seed: {blend: {math: 1}, tokens: 1280}
experts: {math: {blend: {math: 1}, tokens: 1280}, code: {blend: {code: 1}, tokens: 1280}}
mix: {method: trim, density: 0.3, experts: [math, code]}
"""


def test_a_recipe_has_its_option_as_a_key_and_the_seed_as_its_base(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(RECIPE)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    planned = {stage.name: stage for stage in plan_stages(load_recipe("r.yaml"))}["mix"]
    words = " ".join(planned.command)
    assert "--base seed/checkpoint" in words and "--method=trim" in words and "--density=0.3" in words
    assert "seed" in planned.parents and "base" in planned.settings
    assert "--density=0.3" in planned.settings["options"]


REFUSED = {
    "no base": ({"method": "trim"}, "--method trim: --base is missing"),
    "a base for a mean": ({"base": "x"}, "--method btx: --base does not apply, it belongs to trim"),
    "a density for a mean": ({"density": 0.5}, "--method btx: --density does not apply, it belongs to trim"),
    "too dense": (
        {"method": "trim", "base": "x", "density": 2.0},
        "--density 2.0: expected a share above 0, at most 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_its_row_refuses_is_refused(case, models, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        mix({name: models[name] for name in "ab"}, tmp_path / "out", **options)


def test_a_whole_tensor_is_looked_at_once(models, tmp_path, monkeypatch):
    """By whichever thread asks first, in blocks of whatever size."""
    seen: list[str] = []
    honest = toys.Trim.prepare

    def counted(self, plan, planned):
        seen.append(planned.name)
        return honest(self, plan, planned)

    monkeypatch.setattr(toys.Trim, "prepare", counted)
    monkeypatch.setattr("megatron_btx.mixing.layout.BLOCK_BYTES", 300)
    mixed(models, tmp_path / "out", workers=4)
    assert len(seen) == len(set(seen)) > 20
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected(models))
