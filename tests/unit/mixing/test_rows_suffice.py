"""Rows suffice: a method of mixing with an option and a whole-tensor operation, added from outside the package.

It is a TIES without its signs: of each expert's difference from the base the largest share is kept, tensor by tensor;
feed-forward blocks trimmed become experts, the rest is the base and the mean of the trimmed differences.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_btx.common.errors import CheckpointError, InputError
from megatron_btx.mixing import cli
from megatron_btx.mixing.api import mix
from megatron_btx.mixing.methods import METHODS, Chunk, Experts, Method, dense_name, new_router
from megatron_btx.mixing.operations import Operation, stream
from megatron_btx.mixing.options import Option
from tests.support.hugging_face import tensors
from tests.unit.mixing.folders import llama_folder

DENSITY = 0.3


class Trim(Operation):
    """The base, and the mean of the largest differences from it."""

    name = "trim"

    def prepare(self, plan, planned):
        """Of each expert's whole tensor, the smallest difference that is kept."""
        *experts, base = planned.parts
        thresholds = []
        for part in experts:
            pairs = zip(stream(plan, part), stream(plan, base), strict=True)
            sizes = torch.cat([(mine.double() - its.double()).abs().flatten() for mine, its in pairs])
            kept = max(1, math.ceil(plan.request.own["density"] * len(sizes)))
            thresholds.append(float(sizes.topk(kept).values[-1]))
        return thresholds

    def rows(self, plan, planned, start, stop):
        """A stretch of rows, with the thresholds of the whole."""
        *experts, base = planned.parts
        thresholds = plan.prepared(planned)
        its = plan.read(base, start, stop).double()
        total = torch.zeros_like(its)
        for part, threshold in zip(experts, thresholds, strict=True):
            change = plan.read(part, start, stop).double() - its
            total += torch.where(change.abs() >= threshold, change, 0.0)
        return (its + total / len(experts)).to(planned.dtype)

    def describe(self, plan, planned):
        """With the option's value."""
        return f"largest {plan.request.own['density']:g} of the differences from the base"

    def reference(self, plan, planned, rows, numbers):
        """By sorting whole tensors."""
        *experts, base = planned.parts
        result = numbers[base].clone()
        for part in experts:
            mine, its = (torch.cat(list(stream(plan, p))).double() for p in (part, base))
            ordered = (mine - its).abs().flatten().sort(descending=True).values
            least = ordered[max(1, math.ceil(plan.request.own["density"] * len(ordered))) - 1]
            change = numbers[part] - numbers[base]
            result += change * (change.abs() >= least) / len(experts)
        return result


TRIM = Trim()


def make(given, piece):
    """Every expert trimmed; the rest trimmed and averaged."""
    if "expert" in piece.numbers:
        name = dense_name(piece)
        return TRIM, (Chunk(piece.numbers["expert"], name), Chunk(given.base, name))
    if ".router." in piece.name:
        return new_router(piece)
    return TRIM, tuple(Chunk(source, piece.name) for source in range(len(given.models) + 1))


def add_method() -> Method:
    """What a user of the package writes."""
    density = Option(
        "density",
        "share of the differences that is kept",
        float,
        0.2,
        metavar="D",
        expect=lambda share: "" if 0 < share <= 1 else "a share above 0, at most 1",
    )
    return Method(
        "experts and mean of trimmed differences from a base",
        make,
        lambda given: Experts(tuple(model.name for model in given.models)),
        has_base=True,
        own_options=(density,),
    )


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "trim", add_method())


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
        Trim, "prepare", lambda self, plan, planned: [0.0] * (len(planned.parts) - 1)
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
PLAN = """
from megatron_btx.mixing.methods import METHODS
from tests.unit.mixing.test_rows_suffice import add_method
METHODS["trim"] = add_method()
from megatron_btx.plan.planner import plan_stages
from megatron_btx.recipe.load import load_recipe
stages = {stage.name: stage for stage in plan_stages(load_recipe("r.yaml"))}
mix = stages["mix"]
print(*mix.command)
print(*sorted(mix.parents))
print(mix.settings["options"], "base" in mix.settings)
"""


def test_a_recipe_has_its_option_as_a_key_and_the_seed_as_its_base(tmp_path):
    """In a process of its own, because recipes take the table as it is when they are first imported."""
    root = Path(__file__).resolve().parents[3]
    (tmp_path / "r.yaml").write_text(RECIPE)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    done = subprocess.run(
        [sys.executable, "-c", PLAN],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    command, parents, settings = done.stdout.splitlines()
    assert "--base seed/checkpoint" in command and "--method=trim" in command and "--density=0.3" in command
    assert "seed" in parents.split() and "'--density=0.3'" in settings and settings.endswith("True")


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
    honest = Trim.prepare

    def counted(self, plan, planned):
        seen.append(planned.name)
        return honest(self, plan, planned)

    monkeypatch.setattr(Trim, "prepare", counted)
    monkeypatch.setattr("megatron_btx.mixing.layout.BLOCK_BYTES", 300)
    mixed(models, tmp_path / "out", workers=4)
    assert len(seen) == len(set(seen)) > 20
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected(models))
