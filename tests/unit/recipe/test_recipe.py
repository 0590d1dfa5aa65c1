"""Recipes: what is refused, what is derived, and the commands that come out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_btx import cli
from megatron_btx.common.errors import InputError
from megatron_btx.plan import checks as program_checks
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.budgets import Budget, padded_vocabulary, token_weighted, training_flops, training_steps
from megatron_btx.recipe.load import load_recipe, parse_recipe
from megatron_btx.recipe.names import PLAN_FILE
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.recipe.yaml import load_tree
from megatron_btx.runner.api import list_planned
from megatron_btx.runner.decisions import Action
from megatron_btx.runner.scripts import command_script, shell_script
from megatron_btx.training import check_stages
from tests.support.quickstart_texts import FOLDER

QUICKSTART = Path(__file__).parents[3] / "examples" / "recipes" / "quickstart.yaml"

pytestmark = pytest.mark.usefixtures("in_quickstart_folder")
BATCH_TOKENS = 4 * 256


def recipe(*changes: str) -> Recipe:
    return load_recipe(QUICKSTART, list(changes))


def stages(*changes: str) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan_stages(recipe(*changes))}


def values(stage: Stage, flag: str) -> list[str]:
    """What follows ``flag`` in the stage's command; the flag must stand there once."""
    assert stage.command.count(f"--{flag}") == 1, f"--{flag} stands {stage.command.count(f'--{flag}')} times"
    words = stage.command[stage.command.index(f"--{flag}") + 1 :]
    end = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
    return list(words[:end])


def all_values(stage: Stage, flag: str) -> list[str]:
    return [stage.command[number + 1] for number, word in enumerate(stage.command) if word == f"--{flag}"]


@pytest.mark.parametrize(
    ("change", "place_and_reason"),
    [
        ("experts.math.token=1", "experts.math.token: unknown key; did you mean tokens"),
        ("sead={}", "sead: unknown key; did you mean seed"),
        ("layout={}", "layout: unknown key"),
        ("seed.tokens=0", "seed.tokens: found 0"),
        ("seed.tokens=1e-6", "seed.tokens: found 1e-06"),
        ("seed.tokens=2.5", "seed.tokens: found 2.5"),
        ("seed.tokens=true", "seed.tokens: found True"),
        ("seed.tokens=null", "seed.tokens: missing"),
        ("seed.blend={}", "seed.blend: empty"),
        ("seed.blend={poetry: 1}", "seed.blend.poetry: unknown key"),
        ("seed.blend.math=0", "seed.blend.math: found 0"),
        ("seed.blend.math=.inf", "seed.blend.math: found inf"),
        ("experts.poetry={blend: {math: 1}, tokens: 5000}", "experts.poetry: an expert is named after"),
        ("domains=[math, poetry]", "domains: found"),
        ("mix.experts=[math]", "mix.experts: found .* at least two"),
        ("mix.experts=[math, math]", "mix.experts: found .* at least two"),
        ("mix.experts=[math, wiki]", "mix.experts: found .* list of some of"),
        ("mix.top-k=5", "mix.top-k: found 5, expected at most the 4 experts"),
        ("mix=null", "finetune: there is no mix"),
        ("finetune=null", "baselines.dense: "),
        ("baselines.average=maybe", "baselines.average: found 'maybe'"),
        ("evaluate.split=train", "evaluate.split: found 'train'"),
        ("name=a/b", "name: found 'a/b'"),
        ("random-seed=-1", "random-seed: found -1"),
        ("random-seed=0", "random-seed: found 0"),
        ("random-seed=4294967296", "random-seed: found 4294967296, expected at most 4294967295"),
        ("seed.from=/nowhere", "seed.from: /nowhere does not exist"),
        ("model.train-iters=5", "model.train-iters: set by the pipeline from tokens"),
        ("training.seed=5", "training.seed: set by the pipeline from random-seed"),
        ("model.tensor-model-parallel-size=2", "a layout flag; put it under layout"),
        ("seed.layout.lr=1", "seed.layout.lr: unknown key"),
        ("model.num_layers=4", "model.num_layers: expected a Megatron flag"),
        ("model.num-layers={a: 1}", "model.num-layers: found"),
        ("model=[1]", "model: found"),
        ("data.domains={}", "data.domains: found none, expected a mapping"),
        ("data.corpora=quickstart", "data.corpora: unknown key"),
        ("seed.layout.processes=0", "seed.layout.processes: found 0"),
        ("seed.blend.math=1e400", "seed.blend.math: found inf, expected a finite"),
        ("experts.math=null", "mix.experts: found .*'math'"),
        ("seed.from=~no-such-user/here", "seed.from: found '~no-such-user/here', and there is no such home"),
        (f"name={'a' * 81}", "name: found .*at most 80 letters"),
        ("seed.blend={math:1}", "YAML reads 'math:1' as a name without a value; write a blank .* as math: 1"),
        ("sead=null", "sead: unknown key; did you mean seed"),
        ("experts.math.token=5", "experts.math.token: unknown key; did you mean tokens"),
        ("evaluate={split: valid}", "evaluate.tokens: missing"),
        ("finetune=3", "finetune: found 3, expected a mapping with .*blend, tokens"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_place(change: str, place_and_reason: str) -> None:
    with pytest.raises(InputError, match=place_and_reason) as refusal:
        recipe(change)
    assert str(refusal.value).startswith(f"{QUICKSTART}: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("seed.tokens=1023", "stage seed: a budget of 1023 tokens is less than one global batch"),
        ("finetune.layout.processes=3", "stage finetune: the layout does not fit: 3 processes for EP 2"),
        ("finetune.layout.pipeline-model-parallel-size=3", "2 processes for TP 1 x PP 3"),
        ("seed.layout={processes: 3, pipeline-model-parallel-size: 3}", "4 layers over PP 3"),
        ("finetune.layout={processes: 3, expert-model-parallel-size: 3}", "4 experts over EP 3"),
        ("seed.layout={processes: 2, expert-model-parallel-size: 2}", "2 for a dense model"),
        ("seed.megatron.micro-batch-size=4", "size 4 with micro-batch-size 4 on DP 2; .*; lower micro-batch-size or"),
        ("model.num-attention-heads=3", "stage seed: .*: 3 attention heads over TP 2"),
        ("training.global-batch-size=null", "global-batch-size is not given"),
        ("training.save-interval=null", "stage seed: no save-interval; put it under training"),
        ("experts.math.megatron.save-interval=0", "save-interval is 0"),
        ("evaluate.layout={processes: 2}", "stage evaluate-experts: .* micro-batch-size 4 on DP 2"),
        ("evaluate.tokens=1000", "stage evaluate-experts: 1000 tokens per domain are fewer than .*4 sequences = 1024"),
    ],
)
def test_a_budget_or_layout_that_does_not_fit_is_refused(change: str, reason: str) -> None:
    changes = [change]
    if change.startswith("model.num-attention-heads"):
        changes.append("seed.layout={processes: 2, tensor-model-parallel-size: 2}")
    with pytest.raises(InputError, match=reason):
        stages(*changes)


def test_finetuning_must_be_able_to_measure() -> None:
    """What is enough for the evaluation may be less than a batch of finetuning's many processes."""
    many = ["finetune.layout.processes=8", "finetune.megatron.micro-batch-size=1", "training.global-batch-size=8"]
    assert stages("evaluate.tokens=2048", *many)
    with pytest.raises(InputError, match="stage finetune: 1024 tokens per domain are fewer .*8 sequences = 2048"):
        stages("evaluate.tokens=1024", *many)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nmodel:\n  num-layers: 4\n  hidden-size: 8\n  num-layers: 6\n")
    with pytest.raises(InputError, match="twice.yaml: (?s:.*)line 3(?s:.*)duplicate key .num-layers"):
        load_tree(file, [])


@pytest.mark.parametrize(
    "text",
    [
        *("", "- a\n- b\n", "a: [1\n", "a: !!python/object/apply:os.getcwd []\n", "a: 1\n---\nb: 2\n"),
        pytest.param("a: &a {b: *a}\n", id="an alias of itself"),
        pytest.param("a: " + "[" * 5000, id="deep"),
        pytest.param("a: 1" + "0" * 5000, id="long number"),
        *("a: 2026-02-30", "a: !!int x", "a: 0b_", "a: \x07"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match="broken.yaml: "):
        load_tree(file, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5:00", "seed.tokens: found '5:00', expected a whole number"),
        ("yes", "seed.tokens: found 'yes', expected a whole number"),
        ("[", "--set seed.tokens=\\[: not readable as YAML"),
        ("2026-02-30", "--set seed.tokens=2026-02-30: not readable as YAML: day is out of range"),
        ("&a {b: *a}", "--set .*: nested too deeply"),
    ],
)
def test_a_change_that_yaml_reads_otherwise_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        recipe(f"seed.tokens={text}")


def test_decimal_numbers_pass() -> None:
    """YAML 1.1 reads some of them with other bases."""
    for text, number in (("1_000_000", 10**6), ("0x10", 16), ("-3", -3), ("00.5", 0.5), ("010", 10), ("3.0e+4", 3e4)):
        assert load_tree(QUICKSTART, [f"random-seed={text}"])["random-seed"] == number


def test_a_change_of_one_alias_is_none_of_the_others(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("experts:\n  math: {megatron: &rate {lr: 1}}\n  code: {megatron: *rate}\n")
    tree = load_tree(file, ["experts.math.megatron.lr=2"])
    assert tree["experts"] == {"math": {"megatron": {"lr": 2}}, "code": {"megatron": {"lr": 1}}}


def test_a_blend_is_replaced_as_a_whole_by_an_include_and_by_a_change(tmp_path: Path) -> None:
    """Its shares belong together; a dotted key changes a single one. A domain may be named blend all the same."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"include: {QUICKSTART}\nseed: {{blend: {{math: 3, code: 1}}}}\n")
    assert load_recipe(file, []).budget("seed").blend == {"math": 0.75, "code": 0.25}
    assert recipe("seed.blend={math: 3, code: 1}").budget("seed").blend == {"math": 0.75, "code": 0.25}
    assert set(load_recipe(file, ["seed.blend.general=4"]).budget("seed").blend) == {"math", "code", "general"}
    (tmp_path / "base.yaml").write_text("experts: {blend: {tokens: 1, blend: {blend: 1}}}\n")
    file.write_text("include: base.yaml\nexperts: {blend: {blend: {math: 1}}}\n")
    assert load_tree(file, [])["experts"] == {"blend": {"tokens": 1, "blend": {"math": 1}}}


def test_null_takes_a_section_out_and_an_empty_one_is_there(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"include: {QUICKSTART}\nbaselines: null\nevaluate:\n")
    assert not {"baselines", "evaluate"} & load_tree(file, []).keys()
    file.write_text("experts: {math: }\n")
    with pytest.raises(InputError, match=r"experts\.math\.blend: empty"):
        parse_recipe({**yaml.safe_load(QUICKSTART.read_text()), **load_tree(file, [])}, "r")


@pytest.mark.parametrize("change", ["random-seed", "random-seed.deeper=1", "=1", "seed.=1"])
def test_a_setting_that_cannot_be_set_is_refused(change: str) -> None:
    with pytest.raises(InputError, match=f"--set {change}"):
        recipe(change)


def test_blends_are_normalised_and_that_is_said() -> None:
    whole = recipe("experts.math.blend={math: 3, general: 1}", "experts.code.blend={code: 0.75, general: 0.25}")
    assert whole.budget("expert-math").blend == {"math": 0.75, "general": 0.25}
    assert "experts.math.blend sums to 4; normalised to 1" in whole.notes
    assert not any("code" in note for note in whole.notes)
    percent = recipe("experts.math.blend={math: 70, general: 30}")
    assert percent.budget("expert-math").blend == {"math": 0.7, "general": 0.3} and not percent.notes


def test_the_quickstart_is_the_graph_of_the_method() -> None:
    graph = {name: set(stage.waits_for()) for name, stage in stages().items()}
    experts = {"expert-math", "expert-code", "expert-knowledge"}
    assert graph == {
        "data": set(),
        "seed": {"data"},
        **{expert: {"data", "seed"} for expert in experts},
        "average": experts | {"seed"},
        "mix": experts | {"seed"},
        "evaluate-experts": experts | {"data", "seed"},
        "finetune": {"data", "mix", "evaluate-experts"},
        "dense-domains": {"data", "seed"},
        "dense": {"data", "dense-domains"},
        "evaluate-dense": {"data", "average", "dense"},
        "evaluate-moe": {"data", "mix", "finetune"},
        "report": {"evaluate-experts", "evaluate-dense", "evaluate-moe"},
    }


def test_steps_and_schedules_follow_from_the_budgets() -> None:
    planned = stages()
    steps = {name: stage.iterations for name, stage in planned.items() if stage.iterations}
    assert steps == {
        "seed": 977,
        **dict.fromkeys(("expert-math", "expert-code", "expert-knowledge"), 293),
        "dense-domains": 879,
        "finetune": 1025,
        "dense": 1025,
    }
    for name, count in steps.items():
        assert planned[name].tokens == count * BATCH_TOKENS
        assert values(planned[name], "train-iters") == values(planned[name], "lr-decay-iters") == [str(count)]
        assert values(planned[name], "lr-warmup-fraction") == ["0.05"]
    assert "--lr-warmup-fraction" not in stages("seed.megatron.lr-warmup-iters=3")["seed"].command
    assert training_steps("a", 1536, {"seq-length": 256, "global-batch-size": 4}) == 2


def test_the_dense_baseline_sees_what_the_experts_and_finetuning_saw() -> None:
    planned = stages("experts.math.tokens=600_000", "finetune.tokens=2_048_000", "finetune.blend={general: 1, code: 3}")
    weights = values(planned["dense-domains"], "train-data-path")
    found = dict(zip(weights[1::2], map(float, weights[::2]), strict=True))
    assert found == {
        "data/math.train": pytest.approx(0.95 * 0.5),
        "data/code.train": pytest.approx(0.95 * 0.25),
        "data/knowledge.train": pytest.approx(0.95 * 0.25),
        "data/general.train": pytest.approx(0.05),
    }
    assert planned["dense-domains"].iterations == round(1_200_000 / BATCH_TOKENS)
    assert planned["dense"].iterations == planned["finetune"].iterations == 2000
    assert values(planned["dense"], "train-data-path") == values(planned["finetune"], "train-data-path")
    assert values(planned["dense"], "pretrained-checkpoint") == ["dense-domains/checkpoint"]


def test_the_dense_baseline_has_the_tokens_that_were_consumed_by_those_in_the_mix() -> None:
    """Every stage rounds to whole batches for itself, and an expert that is not mixed is no part of the mixture."""
    small = [f"experts.{name}.tokens=1500" for name in ("math", "code", "knowledge")]
    planned = stages(*small)
    assert [planned[f"expert-{name}"].tokens for name in ("math", "code", "knowledge")] == [1024] * 3
    assert planned["dense-domains"].tokens == 3072
    planned = stages(
        *small, "mix.experts=[math, seed]", "finetune.megatron.global-batch-size=8", "finetune.tokens=3300"
    )
    assert planned["dense-domains"].tokens == 1024
    assert "data/code.train" not in values(planned["dense-domains"], "train-data-path")
    assert planned["dense"].tokens == planned["finetune"].tokens == 4096


def test_a_dense_baseline_of_experts_of_unknown_data_is_refused(tmp_path: Path) -> None:
    """A given mix may have experts that the recipe does not know."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(InputError, match="baselines.dense: the mix has law, which is no expert of the recipe"):
        stages("baselines.average=false", f"mix={{from: {tmp_path}, experts: [math, law]}}")


def test_token_weighting_is_by_tokens() -> None:
    parts = [Budget({"a": 1.0}, 300), Budget({"b": 1.0}, 100)]
    assert token_weighted(parts) == Budget({"a": 0.75, "b": 0.25}, 400)


def test_later_flags_win_and_false_takes_a_flag_back() -> None:
    planned = stages("training.bf16=true", "experts.math.megatron={lr: 0.5, clip-grad: 7, bf16: false, swiglu: false}")
    assert values(planned["expert-math"], "clip-grad") == ["7"] and values(planned["seed"], "clip-grad") == ["1.0"]
    assert values(planned["seed"], "bf16") == [] and values(planned["seed"], "swiglu") == []
    assert not {"--bf16", "--swiglu"} & set(planned["expert-math"].command)
    assert stages("model.qk=[1, 2]")["seed"].command.count("--qk") == 1
    assert values(stages("model.qk=[1, 2]")["seed"], "qk") == ["1", "2"]


def test_validation_data_are_given_when_training_evaluates() -> None:
    assert "--valid-data-path" not in stages()["seed"].command
    evaluating = stages("training.eval-iters=2")["expert-math"]
    assert values(evaluating, "valid-data-path")[1] == "data/math.valid"


def test_every_flag_of_a_training_stage_stands_once() -> None:
    for stage in stages().values():
        given = [word for word in stage.command if word.startswith("--") and not word.startswith("--btx-eval")]
        repeated = {word for word in given if given.count(word) > 1} - {"--expert"}
        assert not repeated, f"{stage.name}: {repeated}"


def test_the_moe_flags_are_the_mixs_in_finetuning_and_evaluation_alike() -> None:
    planned = stages("mix.top-k=3", "mix.experts=[math, code, seed]", "finetune.layout.expert-model-parallel-size=1")
    for name in ("finetune", "evaluate-moe"):
        assert values(planned[name], "num-experts") == ["3"] and values(planned[name], "moe-router-topk") == ["3"]
        assert values(planned[name], "moe-router-dtype") == ["fp32"]
    assert "--num-experts" not in planned["evaluate-dense"].command
    assert all_values(planned["mix"], "expert") == [
        "math=expert-math/checkpoint",
        "code=expert-code/checkpoint",
        "seed=seed/checkpoint",
    ]
    assert "expert-knowledge" not in planned["mix"].parents
    assert values(planned["mix"], "moe-router-topk") == ["3"]
    assert all_values(planned["average"], "expert") == all_values(planned["mix"], "expert")


def test_evaluation_names_every_model() -> None:
    planned = stages()
    assert all_values(planned["evaluate-moe"], "btx-eval-model") == ["mix=mix/checkpoint", "btx=finetune/checkpoint"]
    names = [pair.partition("=")[0] for pair in all_values(planned["evaluate-experts"], "btx-eval-model")]
    assert names == ["seed", "expert-math", "expert-code", "expert-knowledge"]
    assert all_values(planned["evaluate-dense"], "btx-eval-model") == [
        "average=average/checkpoint",
        "dense=dense/checkpoint",
    ]
    assert "evaluate-dense" not in stages("baselines=null")
    data = all_values(stages("evaluate.split=test")["evaluate-moe"], "btx-eval-data")
    assert data == [f"{domain}=data/{domain}.test" for domain in ("general", "math", "code", "knowledge")]
    spread = stages(
        "evaluate.layout={processes: 2, expert-model-parallel-size: 2}", "evaluate.megatron={micro-batch-size: 2}"
    )
    assert "--expert-model-parallel-size" not in spread["evaluate-dense"].command
    assert values(spread["evaluate-moe"], "expert-model-parallel-size") == ["2"]


def test_the_first_loss_of_finetuning_is_bounded_by_the_experts() -> None:
    """On the text that they are evaluated on; the recipe's own flags win; without an evaluation nothing is bounded."""
    found = stages("evaluate.split=test", "evaluate.tokens=2048", "finetune.megatron.eval-interval=50")
    finetune = found["finetune"]
    domains = ("general", "math", "code", "knowledge")
    assert values(finetune, "btx-valid-data") == [f"{domain}=data/{domain}.test" for domain in domains]
    assert values(finetune, "btx-valid-tokens") == ["2048"] and values(finetune, "eval-interval") == ["50"]
    assert values(finetune, "btx-first-loss-bound") == ["evaluate-experts/evaluation.json"]
    assert not any(word.startswith("--btx-valid") for word in found["dense"].command)
    loose = stages("finetune.megatron.btx-first-loss-bound=5.0")["finetune"]
    assert values(loose, "btx-first-loss-bound") == ["5.0"]
    without = stages("evaluate=null")
    assert "evaluate-experts" not in without and "--btx-first-loss-bound" not in without["finetune"].command


def test_seeds() -> None:
    planned = stages("random-seed=77")
    assert values(planned["seed"], "seed") == values(planned["finetune"], "seed") == ["77"]
    assert values(planned["mix"], "router-seed") == ["77"]
    assert values(stages("mix.router-seed=5")["mix"], "router-seed") == ["5"]
    assert stages()["data"].command == planned["data"].command
    for change, seed in (("data.workers=1", 1234), ("data.seed=5", 5)):
        assert stages(change)["data"].config["description"]["seed"] == seed


def checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return path


def test_given_checkpoints_take_the_place_of_their_stages(tmp_path: Path, in_quickstart_folder: Path) -> None:
    tokenizer = in_quickstart_folder / FOLDER / "tokenizer.model"
    seed, math = checkpoint(tmp_path / "seed"), checkpoint(tmp_path / "math")
    planned = stages(f"seed={{from: {seed}}}", f"experts.math={{from: {math}}}", "baselines=null")
    assert "seed" not in planned and "expert-math" not in planned and "average" not in planned
    assert values(planned["expert-code"], "pretrained-checkpoint") == [str(seed)]
    assert planned["expert-code"].inputs == (seed, tokenizer)
    assert set(planned["mix"].inputs) == {math, seed}
    assert f"seed={seed}" in planned["evaluate-experts"].command
    with pytest.raises(InputError, match="experts.math: baselines.dense is derived from its blend and tokens"):
        stages(f"experts.math={{from: {math}}}")
    mixed = checkpoint(tmp_path / "mix")
    planned = stages(f"mix.from={mixed}")
    assert "mix" not in planned and values(planned["finetune"], "pretrained-checkpoint") == [str(mixed)]
    assert values(planned["finetune"], "num-experts") == ["4"]


def given_data(tmp_path: Path) -> dict[str, Any]:
    """A recipe on existing datasets: two weighted ones for math, one for general, whose validation set is missing."""
    for name in ("a", "b", "general", "valid"):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{name}{suffix}").write_bytes(b"x")
    tree = copy.deepcopy(yaml.safe_load(QUICKSTART.read_text()))
    for key in ("mix", "finetune", "baselines", "evaluate"):
        del tree[key]
    tree["experts"] = {"math": tree["experts"]["math"]}
    tree["seed"]["blend"] = {"general": 3, "math": 1}
    tree["data"] = {
        "tokenizer": {"tokenizer-type": "NullTokenizer", "vocab-size": 1000},
        "domains": {
            "general": {"train": [f"{tmp_path}/general"]},
            "math": {"train": [f"3 {tmp_path}/a", f"1 {tmp_path}/b"], "valid": [f"{tmp_path}/valid"]},
        },
    }
    return tree


def test_given_datasets_keep_their_weights_within_their_domain(tmp_path: Path) -> None:
    planned = {stage.name: stage for stage in plan_stages(parse_recipe(given_data(tmp_path), "r"))}
    assert set(planned) == {"seed", "expert-math"}
    expected = ["0.75", f"{tmp_path}/general", "0.1875", f"{tmp_path}/a", "0.0625", f"{tmp_path}/b"]
    assert values(planned["seed"], "train-data-path") == expected
    assert "--valid-data-path" not in planned["seed"].command
    assert tmp_path / "a" in planned["seed"].inputs
    assert values(planned["seed"], "tokenizer-type") == ["NullTokenizer"]


@pytest.mark.parametrize(
    ("section", "value", "reason"),
    [
        ("domains", {"general": {"train": ["/nowhere"]}}, "/nowhere.bin does not exist"),
        ("domains", {"general": {"train": []}}, "data.domains.general.train: found"),
        ("domains", {"general": {"train": ["x"], "valid": 3}}, "data.domains.general.train.0.: .*x.bin does not exist"),
        ("domains", {"general": {"train": [3]}}, "data.domains.general.train.0.: .*3.bin does not exist"),
        ("domains", {"general": {}}, "data.domains.general.train: missing"),
        ("domains", {"general": {"trian": ["x"]}}, "trian: unknown key; did you mean train"),
        ("tokenizer", {}, "missing tokenizer-type"),
        ("tokenizer", {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": "/no.model"}, "does not exist"),
        ("workers", 3, "data.workers: only for text"),
    ],
)
def test_bad_given_data_are_refused(section: str, value: Any, reason: str, tmp_path: Path) -> None:
    tree = given_data(tmp_path)
    tree["data"][section] = value
    with pytest.raises(InputError, match=reason):
        parse_recipe(tree, "r")


def test_evaluation_wants_one_prefix_per_domain(tmp_path: Path) -> None:
    tree = {**given_data(tmp_path), "evaluate": {"tokens": 1024}}
    with pytest.raises(InputError, match="data.domains.general.valid: found 0 prefixes"):
        parse_recipe(tree, "r")


def test_flops_follow_from_the_flags() -> None:
    dense = {"hidden-size": 64, "num-layers": 4, "num-attention-heads": 4, "swiglu": True, "ffn-hidden-size": 176}
    dense["seq-length"] = 32
    scores = 60 * 4 * 64 * 32
    blocks = 4 * (4 * 64 * 64 + 3 * 64 * 176)
    assert training_flops(dense, 10, 2048) == 60 * (blocks + 64 * 2048) + scores
    moe = {**dense, "num-experts": 4, "moe-router-topk": 2}
    assert training_flops(moe, 10, 2048) == 60 * (4 * (4 * 64 * 64 + 2 * 3 * 64 * 176 + 64 * 4) + 64 * 2048) + scores
    sampled = {**moe, "moe-router-topk": 1, "btx-sample-top1": True}
    blocks = 4 * (4 * 64 * 64 + 64 * 4) + (4 + 1 + 1 + 1) * 3 * 64 * 176
    assert training_flops(sampled, 10, 2048) == 60 * (blocks + 64 * 2048) + scores
    grouped = {**dense, "group-query-attention": True, "num-query-groups": 2}
    assert training_flops(dense, 1, 0) - training_flops(grouped, 1, 0) == 6 * 4 * 2 * 64 * 32
    # Layers 0 and 2 are mixtures, the others dense; every mixture has shared units and a gate for them.
    for frequency in (2, "2", "[1,0]*2", "([1]+[0])*2"):
        partly = {**moe, "moe-layer-freq": frequency, "moe-ffn-hidden-size": 100}
        blocks = 4 * 4 * 64 * 64 + 2 * 3 * 64 * 176 + 2 * (2 * 3 * 64 * 100 + 64 * 4)
        assert training_flops(partly, 10, 2048) == 60 * (blocks + 64 * 2048) + scores
    shared = {**partly, "moe-shared-expert-intermediate-size": 50, "moe-shared-expert-gate": True}
    assert training_flops(shared, 10, 2048) == 60 * (blocks + 2 * (3 * 64 * 50 + 64) + 64 * 2048) + scores
    with pytest.raises(InputError, match="names 3 layers, num-layers 4"):
        training_flops({**moe, "moe-layer-freq": "[1,0,1]"}, 1, 0)


def test_the_vocabulary_is_padded_as_megatron_does() -> None:
    flags = {"vocab-size": 2049, "make-vocab-size-divisible-by": 64, "tensor-model-parallel-size": 2}
    assert padded_vocabulary(flags, None) == 2176
    assert padded_vocabulary({**flags, "padded-vocab-size": 4096}, 10) == 4096
    assert padded_vocabulary({}, 129) == 256 and padded_vocabulary({}, None) is None


def test_the_vocabularys_size_is_read_from_the_tokenizers_files(in_quickstart_folder: Path) -> None:
    """Without it nothing could say what a stage computes."""
    assert recipe().data.vocabulary_size == 1024
    absent = "data.tokenizer={tokenizer-type: HuggingFaceTokenizer, tokenizer-model: no/where}"
    assert recipe(absent).data.vocabulary_size is None
    assert stages()["seed"].flops and stages(absent)["seed"].flops is None


def test_flags_are_checked_by_the_parser_with_the_place_and_the_close_match() -> None:
    parser = check_stages.RefusingParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    check_stages.check_sections(parser, {"model": ["--num-layers", "4"]})
    with pytest.raises(InputError, match=r"model\.num-layer: .*did you mean num-layers"):
        check_stages.check_sections(parser, {"model": ["--num-layer", "4"]})
    with pytest.raises(InputError) as refusal:
        check_stages.check_sections(parser, {"model": ["--num-layer", "4"], "training": []})
    assert ";;" not in str(refusal.value).replace(" ", "")
    with pytest.raises(InputError, match="model: argument --num-layers: invalid int value: 'four'"):
        check_stages.check_sections(parser, {"model": ["--num-layers", "four"]})


@pytest.mark.usefixtures("starts_warm")
def test_the_quickstarts_flags_are_megatrons_and_wrong_ones_are_refused() -> None:
    """The recipe's flags pass, and the added wrong one is named."""
    sections = recipe("evaluate.megatron.clip-gradd=1").flag_sections
    with pytest.raises(InputError, match=r"r: evaluate\.megatron\.clip-gradd: Megatron has no flag .*mean clip-grad"):
        program_checks.check_with_megatron("r", sections)
    assert list(sections)[-1] == "evaluate.megatron", "the wrong flag must stand last, behind all that have to pass"


@pytest.mark.usefixtures("starts_warm")
def test_a_slip_in_a_flags_name_is_named_before_the_flag_that_is_missing(tmp_path: Path, capsys: Any) -> None:
    """The slip's place and what was meant, not what the planner misses."""
    (tmp_path / "slip.yaml").write_text(f"include: {QUICKSTART}\nmodel: {{hidden-size: null, hiden-size: 64}}\n")
    code = cli.main(["run", str(tmp_path / "slip.yaml"), "--output", str(tmp_path / "run"), "--dry-run", "--cpu"])
    said = capsys.readouterr().err
    assert code == 2 and "slip.yaml: model.hiden-size: Megatron has no flag --hiden-size; did you mean hidden-" in said


def test_the_dry_run_is_a_script_that_does_what_the_run_does(tmp_path: Path) -> None:
    made = [
        Stage("a", ("python", "-c", "open('a/out', 'w').write('1 2')"), product="out"),
        Stage("b", ("bash", "-c", "tr 1 3 < a/out > b/out"), ("a",), product="out"),
    ]
    actions = cli_actions(made, tmp_path / "by hand")
    script = shell_script(made, actions, tmp_path / "by hand")
    subprocess.run(["bash", "-c", script], check=True)
    assert (tmp_path / "by hand" / "b" / "out").read_text() == "3 2"
    for stage in made:
        command = command_script(stage).rpartition("\nexec ")[2].strip()
        assert command in script


def cli_actions(made: list[Stage], directory: Path) -> Any:
    from megatron_btx.runner.decisions import decide

    return decide(made, directory)


def test_help_and_status_import_neither_torch_nor_megatron(tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text('[{"stage": "seed", "steps": 10, "tokens": 100}]')
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "manifest.json").write_text('{"status": "running", "seconds": 65.0}')
    steps = [
        {"iteration": step, "time": time, "lm loss": 10.0 - step} for step, time in ((1, 0), (2, 2), (3, 4), (4, 99))
    ]
    steps.append({"iteration": 5, "time": 101, "lm loss": 9.0})
    torn = '{"iteration": 6, "time": 10'
    (tmp_path / "seed" / "metrics.jsonl").write_text("\n".join([*map(json.dumps, steps), torn]))
    program = (
        "import sys; from megatron_btx import cli\n"
        f"code = cli.main(['status', {str(tmp_path)!r}])\n"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'a heavy import'\n"
        "sys.exit(code)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    row = next(line for line in answer.stdout.splitlines() if "seed" in line and "interrupted" in line)
    assert row.replace("│", " ").split() == ["seed", "interrupted", "5/10", "9.000", "5", "1:05"]


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_help_imports_nothing_that_takes_time(command: str) -> None:
    program = (
        "import sys\n"
        "from megatron_btx import cli\n"
        f"try: cli.main([{command!r}, '--help'])\n"
        "except SystemExit: assert not {'torch', 'megatron', 'pydantic', 'yaml', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_commands_exit_2_with_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run", str(tmp_path / "none.yaml")]) == 2
    assert cli.main(["run", str(QUICKSTART), "--set", "seed.tokens=0", "--dry-run"]) == 2
    assert cli.main(["status", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert (
        "none.yaml: there is no such recipe; give" in lines[0]
        and "seed.tokens: found 0" in lines[1]
        and str(tmp_path) in lines[2]
    )


def test_words_that_an_option_swallowed_are_told_from_a_missing_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """--set, --only and --rerun take all words behind them, the recipe too."""
    for words in (["run"], ["run", "--set", "a=1", str(QUICKSTART)]):
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: no RECIPE.yaml: it stands first") and said.count("\n") == 1


def test_the_words_after_a_dispatched_command_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def its_main() -> int:
        called.append(sys.argv)
        return 5

    module = types.ModuleType("a_module_of_the_test")
    module.main = its_main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", [])  # and put back
    monkeypatch.setitem(cli.DISPATCHED, "convert", ("a_module_of_the_test", ""))
    assert cli.main(["convert", "--help", "--x"]) == 5
    assert called == [["btx convert", "--help", "--x"]]


GIVEN = "data={{domains: {domains}, tokenizer: {{tokenizer-type: NullTokenizer, vocab-size: 90}}}}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ('"a\\ntouch here"', "not a name"),
        ('"a b"', "not a name"),
        ('"a/b"', "not a name"),
        ('"../a"', "not a name"),
        ('"a:b"', "not a name"),
        ('"a=b"', "not a name"),
        ('"-a"', "not a name"),
        ('".a"', "not a name"),
        ('""', "not a name"),
        ("a" * 81, "not a name"),
        ("1", "YAML reads this name as int 1; put it in quotes"),
        ("2026-01-01", "YAML reads this name as date"),
        ("seed", "the name of the seed"),
        ("SEED", "the name of the seed"),
        ("mean", "the name of a column"),
        ("Mean", "the name of a column"),
        ("math.20261126-101112", "ends as the folders of earlier runs do"),
        ("Code", "differs from code in case alone"),
    ],
)
def test_a_domain_is_named_so_that_every_later_stage_can_use_it(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "t.bin").touch()
    (tmp_path / "t.idx").touch()
    domains = f"{{code: {{train: [{tmp_path}/t]}}, {name}: {{train: [{tmp_path}/t]}}}}"
    with pytest.raises(InputError, match=rf"data\.domains\.(.|\n)*: {reason}"):
        recipe("domains=null", GIVEN.format(domains=domains))


def test_variants_are_named_so_that_yaml_keeps_their_settings() -> None:
    for name, reason in (("1", "put it in quotes"), ('"a b"', "not a name")):
        with pytest.raises(InputError, match=rf"ablation\.variants\..*: .*{reason}"):
            recipe("evaluate=null", "baselines=null", f"ablation={{seeds: [1], variants: {{{name}: {{}}}}}}")


def test_domains_are_listed_once_and_values_are_no_flags() -> None:
    with pytest.raises(InputError, match="domains: .*every domain once"):
        recipe("domains=[general, math, code, knowledge, math]")
    for value in ("[0.1, --load, /elsewhere]", "--load"):
        with pytest.raises(InputError, match=r"training\.weight-decay: found '--load', which is a flag"):
            recipe(f"training.weight-decay={value}")


def test_a_recipe_that_includes_another_is_another_run(tmp_path: Path) -> None:
    """The name of the included one would let it go on in that one's folder."""
    (tmp_path / "mine.yaml").write_text(f"include: {QUICKSTART}\n")
    (tmp_path / "again.yaml").write_text("include: mine.yaml\nname: given\n")
    assert load_recipe(tmp_path / "mine.yaml", []).name == "mine"
    assert load_recipe(tmp_path / "again.yaml", []).name == "given"


def test_scripts_run_the_stages_and_nothing_else(tmp_path: Path) -> None:
    """Whatever a stage is named, and whatever is said of it, a shell sees one comment and quoted words."""
    name = "a\ntouch here; $(touch here) 'x"
    stage = Stage(name, ("bash", "-c", 'printf %s "$0" > out', name), product="out")
    run = tmp_path / "r u'n"
    script = shell_script([stage], {name: Action("run", "why\ntouch here")}, run)
    subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path)
    assert (run / "out").read_text() == name
    (run / name / "command.sh").write_text(command_script(stage))
    subprocess.run(["bash", str(run / name / "command.sh")], check=True, cwd=tmp_path)
    assert not list(tmp_path.rglob("here"))
    rerun = shell_script([stage], {name: Action("rerun", "")}, run)
    subprocess.run(["bash", "-c", rerun], check=True, cwd=tmp_path)
    assert len([path for path in run.iterdir() if path.is_dir()]) == 2
    skipped = shell_script([stage], {name: Action("skip", "")}, run)
    subprocess.run(["bash", "-c", skipped], check=True, cwd=tmp_path)
    assert not list(tmp_path.rglob("here"))


def test_a_run_goes_on_from_what_the_printed_script_began(tmp_path: Path) -> None:
    script = "test -e a/checkpoint && touch a/out; touch a/checkpoint"
    stage = Stage("a", ("bash", "-c", script), product="out", resumable=True)
    subprocess.run(["bash", "-c", shell_script([stage], cli_actions([stage], tmp_path), tmp_path)], check=True)
    assert cli_actions([stage], tmp_path)["a"].verb == "resume"
    changed = Stage("a", ("bash", "-c", f"{script} "), product="out", resumable=True)
    assert cli_actions([changed], tmp_path)["a"].verb == "keep"


def test_status_of_a_run_that_may_only_be_read_and_of_wide_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of metrics longer than what is read at first; seconds that are no number; nothing is written."""
    (tmp_path / PLAN_FILE).write_text('[{"stage": "seed", "steps": 10, "tokens": 100}, {"stage": "mix"}]')
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "manifest.json").write_text('{"status": "finished", "seconds": NaN}')
    wide = "x" * 50_000
    lines = [json.dumps({"iteration": n, "time": 2 * n, "lm loss": 1.0, "wide": wide}) for n in range(1, 41)]
    (tmp_path / "seed" / "metrics.jsonl").write_text("\n".join(lines))
    tmp_path.chmod(0o555)
    assert cli.main(["status", str(tmp_path)]) == 0
    tmp_path.chmod(0o755)
    row = next(line for line in capsys.readouterr().out.splitlines() if "seed" in line and "finished" in line)
    assert row.replace("│", " ").split() == ["seed", "finished", "40/10", "1.000", "5", "?"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [PLAN_FILE, "seed"]


def test_status_in_a_pipe_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no terminal whose width it would have to fit."""
    name = "expert-" + "long" * 30
    (tmp_path / PLAN_FILE).write_text(json.dumps([{"stage": name, "steps": 10, "tokens": 100}]))
    assert cli.main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert name in printed and "waiting" in printed and "time left" in printed and str(tmp_path) in printed


def test_a_plan_has_the_fingerprints_that_the_manifests_get() -> None:
    """By them a report knows what is of the recipe; a stage that only shows others has none to compare."""
    planned = stages()
    known = identities(planned.values())
    for entry in list_planned(list(planned.values())):
        expected = None if entry["stage"] == "report" else known[entry["stage"]].fingerprint
        assert entry["fingerprint"] == expected and entry["steps"] == planned[entry["stage"]].iterations


HUGE = f'[{{"stage": "a", "steps": 1, "tokens": 1{"0" * 400}}}]'


def test_status_of_a_broken_plan_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[", "{}", "[1]", '[{"stage": 1}]', '[{"stage": "a", "steps": "x"}]', HUGE):
        (tmp_path / PLAN_FILE).write_text(text)
        assert cli.main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("not the plan of a run") == 6


def test_status_shows_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken manifest or line of metrics hides no other stage, and names are no markup."""
    run = tmp_path / "[red]run[/red]"
    names = ("seed", "mix", "finetune", "\x1b[31m", "\ud800")
    plan = [{"stage": name, "steps": 10, "tokens": 100} for name in names]
    (run / "seed").mkdir(parents=True)
    (run / PLAN_FILE).write_text(json.dumps(plan))
    (run / "seed" / "manifest.json").write_text('{"status": ["odd"], "seconds": "long"}')
    lines = ['{"iteration": 1, "time": 1}', '{"iteration": "x", "time": 1}', '{"iteration": 2, "time": "y"}', "[]"]
    lines += [f'{{"iteration": 1{"0" * 400}, "time": 1}}', "[" * 100_000]
    (run / "seed" / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 3, "time": 5, "lm loss": "low"}']))
    (run / "mix").mkdir()
    (run / "mix" / "manifest.json").write_text("{")
    (run / "finetune").mkdir()
    os.mkfifo(run / "finetune" / "metrics.jsonl")
    os.mkfifo(run / ".lock")
    assert cli.main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "[red]run[/red]" in shown.replace("\n", "")
    assert "3/10" in shown and "unreadable" in shown and "waiting" in shown


def test_the_average_is_of_experts_that_the_recipe_has(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(InputError, match=r"baselines\.average: the mix has wiki, which is no expert"):
        recipe(f"mix={{from: {tmp_path}, experts: [math, code, wiki, seed]}}")
