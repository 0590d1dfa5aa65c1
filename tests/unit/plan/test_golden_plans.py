"""The plans of all example recipes, stage by stage, against stored ones: what a change of the planner does is seen.

``BTX_WRITE_GOLDEN=1`` writes them anew; the commit says why. Fingerprints among them: one that changes makes a user's
finished stage another, so that his run stops.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Program, Stage
from megatron_btx.recipe import load as reading
from megatron_btx.recipe.from_checkpoint import GivenModel
from megatron_btx.recipe.load import load_recipe
from tests.support.runner import REPOSITORY

RECIPES = REPOSITORY / "examples" / "recipes"
GOLDEN = Path(__file__).parent / "golden" / "plans"
MODEL: dict[str, Any] = {"num-layers": "3", "hidden-size": "32", "num-attention-heads": "4", "swiglu": True}
MODEL |= {"padded-vocab-size": "96"}
TOKENIZER = {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "/models/seed"}
OWN_TOKENIZER = "data.tokenizer={tokenizer-type: NullTokenizer, vocab-size: 1000}"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    **{file.stem: (file.stem, (OWN_TOKENIZER,)) for file in sorted(RECIPES.glob("*.yaml")) if "four" not in file.stem},
    "four-models": ("four-models", ()),
    "four-models-slurm": ("four-models-slurm", ()),
    "four-models-options": (
        "four-models",
        (
            "mix.weight={math: 2, code: 1}",
            "mix.take={rotary_base: math}",
            "mix.moe-layer-freq=[0,1,1]",
            "mix.router-std=0.01",
            "mix.pad-vocab-to-multiple-of=128",
            "seed.pad-vocab-to-multiple-of=128",
            *(f"experts.{name}.pad-vocab-to-multiple-of=128" for name in ("math", "code", "wiki")),
            "export={allow-other-ids: true}",
        ),
    ),
    "four-models-split": ("four-models", ("mix.method=split", "mix.chunks=2", "baselines=null", "mix.top-k=3")),
    "four-models-dense": (
        "four-models",
        (
            "baselines={dense: {domains: {megatron: {lr: 2.0e-4}}}, average: true}",
            *(f"experts.{name}.blend={{{name}: 1}}" for name in ("math", "code", "wiki")),
            *(f"experts.{name}.tokens=30_000_000" for name in ("math", "code", "wiki")),
        ),
    ),
}
"""Name of the golden -> recipe, changes."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the recipes are planned: texts and models of a few bytes; what the models say of themselves is made up."""
    for domain in ("general", "math", "code", "knowledge"):
        for split in ("train", "valid", "test"):
            file = tmp_path / "runs" / "quickstart-texts" / f"{domain}.{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'{{"text": "{domain} {split}"}}\n')
    for name in ("seed", "math", "code", "wiki"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(f'{{"a": "{name}"}}')
        text = tmp_path / "texts" / name.replace("seed", "general") / "a.txt"
        text.parent.mkdir(parents=True)
        text.write_text(name)
    monkeypatch.setattr(reading, "read_models", lambda paths: {place: GivenModel(MODEL, TOKENIZER) for place in paths})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def describe(stage: Stage, fingerprint: str) -> dict[str, Any]:
    """A stage as a golden has it."""
    assert isinstance(stage.program, Program)
    return {
        "stage": stage.name,
        "module": stage.program.module,
        "words": list(stage.program.words),
        "distributed": stage.program.is_distributed,
        "parents": list(stage.parents),
        "after": list(stage.after),
        "inputs": [str(path) for path in stage.inputs],
        "product": stage.product,
        "processes": stage.processes,
        "threads": stage.threads,
        "on_gpu": stage.on_gpu,
        "resumable": stage.resumable,
        "only_shows": stage.only_shows,
        "steps": stage.iterations,
        "tokens": stage.tokens,
        "flops": stage.flops,
        "fingerprint": fingerprint,
    }


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_as_it_was(name: str, folder: Path) -> None:
    recipe, changes = CASES[name]
    stages = plan_stages(load_recipe(RECIPES / f"{recipe}.yaml", changes))
    known = identities(stages)
    described = [describe(stage, known[stage.name].fingerprint) for stage in stages]
    text = json.dumps(described, indent=1).replace(str(folder), "HERE") + "\n"
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("BTX_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    for now, before in zip(json.loads(text), json.loads(golden.read_text()), strict=True):
        assert now == before
