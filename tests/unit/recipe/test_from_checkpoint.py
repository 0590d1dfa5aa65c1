"""Recipes of what users have: given models in every form, texts, an exported mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe import load as reading
from megatron_btx.recipe.from_checkpoint import GivenModel, find_model, is_loadable, read_models
from megatron_btx.recipe.load import parse_recipe

MODEL: dict[str, Any] = {"num-layers": "3", "hidden-size": "32", "num-attention-heads": "4", "seq-length": "64"}
MODEL |= {"swiglu": True, "padded-vocab-size": "96"}
TOKENIZER = {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "/models/seed"}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Four given model folders and four texts, to an exported, evaluated mixture; what the folders say is made up."""
    for name in ("seed", "math", "code", "wiki"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "a.txt").write_text("a")
    monkeypatch.setattr(reading, "read_models", lambda paths: {place: GivenModel(MODEL, TOKENIZER) for place in paths})
    monkeypatch.chdir(tmp_path)
    domains = {"general": {"text": ["texts/seed"]}}
    domains |= {name: {"text": [f"texts/{name}"]} for name in ("math", "code", "wiki")}
    return {
        "data": {"split": {"train": 0.9, "valid": 0.1}, "domains": domains},
        "seed": {"from": "models/seed"},
        "experts": {name: {"from": f"models/{name}"} for name in ("math", "code", "wiki")},
        "training": {"micro-batch-size": 1, "global-batch-size": 2, "save-interval": 9},
        "mix": {},
        "finetune": {"blend": {"general": 0.5, "math": 0.5}, "tokens": 1000},
        "evaluate": {"tokens": 640},
        "baselines": {"average-finetuned": False},
        "export": True,
    }


def plan(tree: dict[str, Any]) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan_stages(parse_recipe(tree, "r.yaml"))}


def values(stage: Stage, flag: str) -> list[str]:
    return [stage.command[number + 1] for number, word in enumerate(stage.command) if word == f"--{flag}"]


def test_given_folders_are_mixed_as_they_are_and_imported_to_be_evaluated(tree: dict[str, Any], tmp_path: Path) -> None:
    stages = plan(tree)
    imports = ["import-seed", "import-math", "import-code", "import-wiki"]
    assert {name: set(stage.waits_for()) for name, stage in stages.items()} == {
        **{name: set() for name in (*imports, "data", "mix")},
        "evaluate-experts": {"data", *imports},
        "finetune": {"data", "mix", "evaluate-experts"},
        "export": {"finetune"},
        "evaluate-moe": {"data", "mix", "finetune"},
        "report": {"evaluate-experts", "evaluate-moe"},
    }
    assert values(stages["mix"], "expert")[0] == f"math={tmp_path}/models/math"
    assert values(stages["import-math"], "expert") == [f"model={tmp_path}/models/math"]
    assert values(stages["evaluate-experts"], "btx-eval-model")[1] == "expert-math=import-math/checkpoint"
    assert values(stages["finetune"], "pretrained-checkpoint") == ["mix/checkpoint"]
    assert values(stages["finetune"], "moe-router-dtype") == ["fp32"]
    assert values(stages["export"], "checkpoint") == ["finetune/checkpoint"] and "--verify" in stages["export"].command


def test_only_what_megatron_must_load_is_imported(tree: dict[str, Any]) -> None:
    del tree["evaluate"]
    assert not any(name.startswith("import-") for name in plan(tree))
    tree["experts"]["math"] = {"blend": {"math": 1}, "tokens": 1000}
    stages = plan(tree)
    assert [name for name in stages if name.startswith("import-")] == ["import-seed"]
    assert values(stages["expert-math"], "pretrained-checkpoint") == ["import-seed/checkpoint"]


def test_the_models_flags_are_the_given_seeds_and_the_recipes_win(tree: dict[str, Any]) -> None:
    tree["model"] = {"seq-length": 32, "swiglu": False}
    finetune = plan(tree)["finetune"]
    assert values(finetune, "num-layers") == ["3"] and values(finetune, "seq-length") == ["32"]
    assert "--swiglu" not in finetune.command and values(finetune, "tokenizer-model") == ["/models/seed"]


def test_nobody_reads_models_that_a_recipe_describes_itself(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading them takes seconds, and checkpoints may be on another machine's disk when a run is planned."""
    for name in ("seed", "math", "code", "wiki"):
        (tmp_path / "models" / name / "latest_checkpointed_iteration.txt").write_text("1")
    monkeypatch.setattr(reading, "read_models", lambda paths: pytest.fail("read"))
    tree["model"] = dict(MODEL)
    tree["data"]["tokenizer"] = {"tokenizer-type": "NullTokenizer", "vocab-size": 90}
    stages = plan(tree)
    assert not any(name.startswith("import-") for name in stages)
    assert values(stages["evaluate-experts"], "btx-eval-model")[0] == f"seed={tmp_path}/models/seed"


def test_a_seeds_tokenizer_that_is_gone_is_refused(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own checkpoints name it by a path that counts from their run, where this run has another file."""
    stored = {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": "data/tokenizer.model"}
    monkeypatch.setattr(reading, "read_models", lambda paths: {place: GivenModel(MODEL, stored) for place in paths})
    with pytest.raises(InputError, match=r"data\.tokenizer: tokenizer-model data/tokenizer.model does not exist; say"):
        plan(tree)


def test_texts_become_the_runs_own_datasets(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["data"]["domains"]["math"] = {"text": {"train": ["texts/math"], "valid": ["texts/code/*.txt"]}}
    tree["data"]["domains"]["code"]["split"] = {"train": 0.5, "valid": 0.25, "test": 0.25}
    tree["data"] |= {"workers": 3, "seed": 7}
    stages = plan(tree)
    assert stages["data"].config["description"] == {
        "tokenizer": TOKENIZER,
        "domains": {
            "general": {"text": [f"{tmp_path}/texts/seed"], "shares": {"train": 0.9, "valid": 0.1}},
            "math": {"train": [f"{tmp_path}/texts/math"], "valid": [f"{tmp_path}/texts/code/*.txt"]},
            "code": {"text": [f"{tmp_path}/texts/code"], "shares": {"train": 0.5, "valid": 0.25, "test": 0.25}},
            "wiki": {"text": [f"{tmp_path}/texts/wiki"], "shares": {"train": 0.9, "valid": 0.1}},
        },
        "seed": 7,
    }
    assert values(stages["data"], "workers") == ["3"] and stages["data"].processes == 3
    assert values(stages["evaluate-moe"], "btx-eval-data")[1] == "math=data/math.valid"
    command = stages["finetune"].command
    assert list(command[command.index("--train-data-path") + 1 :][:4]) == [
        "0.5",
        "data/general.train",
        "0.5",
        "data/math.train",
    ]


def test_a_text_counts_by_its_content(tree: dict[str, Any], tmp_path: Path) -> None:
    from megatron_btx.plan.fingerprint import identities

    def fingerprints() -> dict[str, str]:
        return {name: one.fingerprint for name, one in identities(plan(tree).values()).items()}

    before = fingerprints()
    (tmp_path / "texts" / "math").rename(tmp_path / "texts" / "moved")
    tree["data"]["domains"]["math"]["text"] = ["texts/moved"]
    tree["data"]["workers"] = 9
    assert fingerprints() == before
    (tmp_path / "texts" / "moved" / "a.txt").write_text("b")
    changed = {name for name, value in fingerprints().items() if value != before[name]}
    assert changed == {"data", "evaluate-experts", "finetune", "export", "evaluate-moe", "report"}


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("data.split", None, r"data\.domains\.general\.split: missing, expected shares"),
        ("data.split", {"train": 0.9, "valid": 0.2}, r"data\.split: found shares that sum to 1\.1, expected 1"),
        ("data.split", {"train": 1.5}, r"data\.split\.train: found 1\.5, expected at most 1"),
        ("data.domains.math.split", {"train": 0.5}, r"data\.domains\.math\.split: found shares that sum to 0\.5"),
        ("data.domains.math.text", ["nowhere"], r"text\.files\[0\]: /.*/nowhere does not exist; expected a text file"),
        ("data.domains.math.text", {"valid": ["texts"]}, r"data\.domains\.math\.text: found no files"),
        (
            "data.domains.math.text",
            {"files": ["texts"], "test": ["texts"]},
            "text: found files beside those of a split",
        ),
        ("data.domains.math.text", {"trian": ["texts"]}, r"math\.text\.trian: unknown key; did you mean train"),
        ("data.domains.math.text", None, r"data\.domains\.math\.train: missing, expected a list .*; or text: "),
        ("data.vocab-size", 90, r"data\.vocab-size: unknown key"),
        ("seed.from", "models", "seed.from: /.*/models is no model; expected a Megatron checkpoint"),
        ("seed.from", "org/name", "seed.from: org/name: no such folder, and no model of this name in the hub's cache"),
        ("export", {"format": "gguf"}, "export.format: found 'gguf', expected 'hf'"),
        ("export", 3, "export: found 3, expected a mapping with format"),
        ("finetune", None, "export: it is of the finetuned mixture; add finetune"),
        ("evaluate.split", "test", r"data\.domains\.general\.test: found 0 prefixes"),
    ],
)
def test_what_does_not_fit_is_refused(place: str, value: object, said: str, tree: dict[str, Any]) -> None:
    *outer, last = place.split(".")
    section = tree
    for key in outer:
        section = section[key]
    section[last] = value
    with pytest.raises(InputError, match=f"^r.yaml: .*{said}"):
        parse_recipe(tree, "r.yaml")


def test_forms_of_given_models(tmp_path: Path) -> None:
    """A checkpoint's root is what Megatron starts from; one iteration and a model folder have to be imported."""
    for name, mark in (("root", "latest_checkpointed_iteration.txt"), ("iteration", "metadata.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / mark).write_text("1")
    assert is_loadable(find_model(str(tmp_path / "root")))
    assert not is_loadable(find_model(str(tmp_path / "iteration")))


def test_a_model_that_the_converter_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "poem"}')
    with pytest.raises(InputError, match=r"^seed.from: seed \(.*poem"):
        read_models({"seed": tmp_path})
