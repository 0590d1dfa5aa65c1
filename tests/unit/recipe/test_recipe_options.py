"""Every option of the converter is a key of a recipe, and what it refuses is said in the recipe's words."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from megatron_btx.common.errors import InputError
from megatron_btx.common.table import render
from megatron_btx.data.domains import read_description
from megatron_btx.mixing.options import DIFFERENCES, MIXTURE, RESULT
from megatron_btx.mixing.reading import list_options
from megatron_btx.plan.checks import check_inputs
from megatron_btx.plan.fingerprint import identities
from megatron_btx.plan.planner import plan_stages
from megatron_btx.recipe import load as reading
from megatron_btx.recipe.expand import recipe_section
from megatron_btx.recipe.from_checkpoint import GivenModel
from megatron_btx.recipe.load import parse_recipe
from megatron_btx.runner import api
from megatron_btx.runner.decisions import RUN, Action, make_records
from megatron_btx.runner.scripts import shell_script
from megatron_btx.runner.stage_run import StageRun, failure_message
from megatron_btx.runner.tables import make_plan_table
from tests.unit.recipe.test_from_checkpoint import MODEL, TOKENIZER, plan, tree, values

__all__ = ["tree"]


def options_of(tree: dict[str, Any], stage: str = "mix") -> list[str]:
    """The words of a stage's converter that are in the form of a recipe's keys."""
    return [word for word in plan(tree)[stage].command if word.startswith("--") and ("=" in word or "allow" in word)]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("take", {"dtype": "math", "rotary_base": "code"}, ["--take=dtype=math", "--take=rotary_base=code"]),
        ("weight", {"seed": 2, "math": 0.5}, ["--weight=math=0.5", "--weight=seed=2"]),
        ("vocab", "union", ["--vocab=union"]),
        ("vocab", "same", []),
        ("allow-other-tokenizer", True, ["--allow-other-tokenizer"]),
        ("allow-other-ids", True, ["--allow-other-ids"]),
        ("allow-other-ids", False, []),
        ("pad-vocab-to-multiple-of", 128, ["--pad-vocab-to-multiple-of=128"]),
        ("router-init", "zeros", ["--router-init=zeros"]),
        ("router-std", 0.01, ["--router-std=0.01"]),
        ("moe-layer-freq", [0, 1, 1], ["--moe-layer-freq=[0,1,1]"]),
        ("method", "blend", ["--method=blend"]),
    ],
)
def test_an_option_is_a_key(key: str, value: object, words: list[str], tree: dict[str, Any]) -> None:
    before = identities(plan(tree).values())
    tree["mix"] = {key: value}
    assert options_of(tree) == words
    now = identities(plan(tree).values())
    assert (now["mix"].fingerprint == before["mix"].fingerprint) == (not words)
    assert before["mix"].settings["options"] == ["--router-seed", 1234, "--moe-router-topk", 2], "of all earlier runs"


def test_all_options_are_keys() -> None:
    """So that a new one is a key, too; the routing's k has a key of its own."""
    keys = {field.alias for field in get_args(recipe_section().model_fields["mix"].annotation)[0].model_fields.values()}
    assert {"method", *list_options(RESULT, DIFFERENCES, MIXTURE)} - keys == {"moe-router-topk"}


def test_a_mix_is_verified(tree: dict[str, Any]) -> None:
    tree["baselines"] = {"average": True}
    assert all("--verify" in plan(tree)[stage].command for stage in ("mix", "average", "import-seed", "export"))


def test_an_average_is_made_of_what_may_differ_as_the_mix_is(tree: dict[str, Any]) -> None:
    tree |= {"baselines": {"average": True}, "mix": {"take": {"dtype": "math"}, "method": "blend"}}
    assert options_of(tree, "average") == ["--take=dtype=math"]


@pytest.mark.parametrize(
    ("mix", "flags"),
    [
        ({"method": "split", "chunks": 2}, {"num-experts": ["8"], "moe-ffn-hidden-size": ["64"]}),
        ({"method": "upcycle", "copies": 6, "experts": ["seed"]}, {"num-experts": ["6"], "moe-ffn-hidden-size": []}),
        ({"method": "blend"}, {"num-experts": ["4"], "moe-ffn-hidden-size": []}),
        ({"moe-layer-freq": [0, 1, 1]}, {"num-experts": ["4"], "moe-layer-freq": ["[0,1,1]"]}),
        ({"pad-vocab-to-multiple-of": 64}, {"padded-vocab-size": ["128"]}),
        ({}, {"padded-vocab-size": ["96"], "moe-layer-freq": [], "num-experts": ["4"]}),
    ],
)
def test_finetuning_knows_the_mixtures_shape(
    mix: dict[str, Any], flags: dict[str, list[str]], tree: dict[str, Any]
) -> None:
    tree |= {"mix": mix, "model": {"ffn-hidden-size": 128}}
    stages = plan(tree)
    for stage in ("finetune", "evaluate-moe"):
        assert {flag: values(stages[stage], flag) for flag in flags} == flags
    tree["evaluate"] = None
    tree |= {"export": None, "ablation": {"seeds": [1], "variants": {"as-it-is": {}}}}
    assert {flag: values(plan(tree)["ablation-as-it-is-s1"], flag) for flag in flags} == flags


def test_routers_from_a_file_count_by_its_content(tree: dict[str, Any], tmp_path: Path) -> None:
    prints = []
    for name, number in (("a.npy", 0), ("b.npy", 0), ("b.npy", 1)):
        np.save(tmp_path / name, np.full((4, 32), number))
        tree["mix"] = {"router-init": name}
        stage = plan(tree)["mix"]
        assert f"--router-init={tmp_path / name}" in stage.command and tmp_path / name in stage.inputs
        prints.append(identities([stage])["mix"].fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_imports_and_the_export_have_keys_too(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "models" / "math" / "latest_checkpointed_iteration.txt").write_text("1")
    assert "import-math" not in plan(tree)
    for part in (tree["seed"], *tree["experts"].values()):
        part["pad-vocab-to-multiple-of"] = 64
    tree |= {"export": {"allow-other-ids": True}}
    stages = plan(tree)
    assert "--pad-vocab-to-multiple-of=64" in stages["import-math"].command
    assert values(stages["evaluate-experts"], "padded-vocab-size") == ["128"]
    assert "--allow-other-ids" in stages["export"].command


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("mix", {"method": "average"}, "mix.method: found average, expected one that makes a mixture: btx, split"),
        ("mix", {"method": "split"}, "mix.method: split: mix.chunks is missing"),
        ("mix", {"method": "ties"}, "mix.method: found 'ties', expected one of btx, split"),
        ("mix", {"take": {"dtyp": "math"}}, "mix.take dtyp: shapes tensors or is not known"),
        ("mix", {"take": {"dtype": "chemistry"}}, "mix.take names the expert 'chemistry'"),
        ("mix", {"take": "dtype=math"}, "mix.take: found 'dtype=math', expected a mapping, as {FIELD: NAME}"),
        ("mix", {"weight": {"math": "much"}}, "mix.weight: {math: much}: expected a number"),
        ("mix", {"router-init": "no.npy"}, "mix.router-init: /.*/no.npy does not exist"),
        ("mix", {"router-std": "wide"}, "mix.router-std: found 'wide', expected a number"),
        ("mix", {"vocab": True}, "mix.vocab: found True, expected a value"),
        ("mix", {"allow-other-ids": "yes"}, "mix.allow-other-ids: found 'yes', expected true or false"),
        ("mix", {"takes": {}}, "mix.takes: unknown key; did you mean take"),
        ("mix", {"verify": True}, "mix.verify: unknown key"),
        ("mix", {"megatron": {"moe-layer-freq": 2}}, "mix.megatron.moe-layer-freq: .*write it as mix.moe-layer-freq"),
        ("mix", {"from": "models/math", "vocab": "union"}, "mix.from: found beside vocab=union"),
        ("experts.math", {"blend": {"math": 1}, "tokens": 1000, "allow-other-ids": True}, "experts.math: .* add from"),
        (
            *("experts.math.pad-vocab-to-multiple-of", 5),
            "evaluate: .* seed 96, experts.math 100, .* give each of them pad-vocab-to-multiple-of: 128, .* it 128$",
        ),
        ("mix", {"method": "upcycle", "copies": 2}, "mix.experts: 4 given, upcycle takes 1; leave the others out"),
    ],
)
def test_what_an_option_cannot_be(place: str, value: object, said: str, tree: dict[str, Any]) -> None:
    *outer, last = place.split(".")
    section = tree
    for key in outer:
        section = section[key]
    section[last] = value
    with pytest.raises(InputError, match=f"^r.yaml: {said}"):
        parse_recipe(tree, "r.yaml")


@pytest.mark.parametrize(
    ("rows", "multiple", "padded"),
    [((384, 386), 256, 512), ((32_000, 32_002), 384, 32_256), ((128_256, 128_258), 512, 128_512), ((96, 90_000), 0, 0)],
)
def test_the_padding_that_makes_added_tokens_fit_is_named(
    rows: tuple[int, int], multiple: int, padded: int, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that divides the seed's own rows leaves them as they are, and never makes them equal to larger ones."""

    def read(paths: Mapping[str, Path]) -> dict[str, GivenModel]:
        sizes = {place: rows[place == "experts.math"] for place in paths}
        return {place: GivenModel(MODEL | {"padded-vocab-size": str(size)}, TOKENIZER) for place, size in sizes.items()}

    monkeypatch.setattr(reading, "read_models", read)
    with pytest.raises(InputError) as refusal:
        parse_recipe(tree, "r.yaml")
    if not multiple:
        assert str(refusal.value).endswith(
            "no pad-vocab-to-multiple-of up to 65536 makes them equal; leave evaluate out"
        )
        return
    assert f"pad-vocab-to-multiple-of: {multiple}, which makes it {padded}" in str(refusal.value)
    for section in (tree["seed"], *tree["experts"].values(), tree["mix"]):
        section["pad-vocab-to-multiple-of"] = multiple
    assert {values(stage, "padded-vocab-size")[0] for stage in plan(tree).values() if stage.on_gpu} == {str(padded)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mix": {"moe-layer-freq": [0, 1, 1, 1]}}, "mix.moe-layer-freq: names 4 layers, num-layers 3"),
        ({"finetune": {"blend": {"math": 1}, "tokens": 100}}, "stage finetune: .* raise tokens of finetune$"),
    ],
)
def test_what_the_planner_refuses_has_the_file_and_no_flag(
    change: dict[str, Any], said: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree | change))
    with pytest.raises(InputError, match=f"^r.yaml: {said}") as refusal:
        api.plan_run("r.yaml", tmp_path / "run")
    assert "--" not in str(refusal.value)


@pytest.mark.parametrize(
    ("stage", "refusal", "said"),
    [
        ("mix", "choose one: --take dtype=math (or =a.b)", "choose one: mix.take: {dtype: math} (or =a.b)"),
        ("average", "--vocab union averages each row", "mix.vocab: union averages each row"),
        ("mix-s3", "or --allow-other-tokenizer if", "or mix.allow-other-tokenizer: true if"),
        ("import-math", "add --allow-other-ids", "add experts.math.allow-other-ids: true"),
        ("import-seed", "--pad-vocab-to-multiple-of 128 adds", "seed.pad-vocab-to-multiple-of 128 adds"),
        ("export", "add --allow-other-ids", "add export.allow-other-ids: true"),
        ("mix", "--moe-router-topk 5: expected 1 to 4", "mix.top-k 5: expected 1 to 4"),
        ("mix", "repeat --expert NAME=PATH", "repeat mix.experts"),
        ("finetune", "above 3 (--btx-first-loss-bound): x", "above 3 (finetune.megatron.btx-first-loss-bound): x"),
        ("data", "--description: domains.math.text: a", "data.domains.math.text: a"),
        ("mix", "try tools/convert_experts.py --verify", "try tools/convert_experts.py --verify"),
    ],
)
def test_a_stages_failure_names_keys(stage: str, refusal: str, said: str) -> None:
    assert failure_message(f"...\nerror: {refusal}\n", 2, stage) == (f"error: {said}", 2)


def test_an_import_is_one(tree: dict[str, Any]) -> None:
    table = render(make_plan_table(list(plan(tree).values()), dict.fromkeys(plan(tree), Action(RUN, "")), "run"))
    assert re.search("import-math .* import ", table) and re.search("\nmix .* mix ", table)


@pytest.mark.parametrize(("written", "tokens"), [("3.0e+4", 30_000), ("1e8", 10**8), ("2E4", 20_000), ("3e4", 30_000)])
def test_tokens_may_be_written_with_an_exponent(written: str, tokens: int, tree: dict[str, Any]) -> None:
    tree["finetune"]["tokens"] = yaml.safe_load(written)
    recipe = parse_recipe(tree, "r.yaml")
    assert recipe.budget("btx").tokens == tokens


def test_all_wrong_paths_are_named_at_once(tree: dict[str, Any]) -> None:
    tree["experts"]["math"]["from"] = "nowhere/math"
    tree["experts"]["code"]["from"] = "texts"
    tree["data"]["domains"]["wiki"]["text"] = ["texts/wiki", "texts/none", "texts/*.zst"]
    with pytest.raises(InputError) as refusal:
        parse_recipe(tree, "r.yaml")
    for place in (r"experts\.math\.from: no", r"experts\.code\.from: /.*/texts is", r"files\[1\]: ", r"files\[2\]: "):
        assert re.search(place, str(refusal.value))
    assert "files[0]" not in str(refusal.value)


def test_an_adapter_is_refused_as_the_converter_does(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "models" / "lora").mkdir()
    (tmp_path / "models" / "lora" / "adapter_config.json").write_text('{"base_model_name_or_path": "llama"}')
    tree["experts"]["math"]["from"] = "models/lora"
    with pytest.raises(InputError, match=r"experts\.math\.from: .*a LoRA or another adapter.*; merge it first"):
        parse_recipe(tree, "r.yaml")


def test_texts_are_looked_for_before_anything_runs(tree: dict[str, Any], tmp_path: Path) -> None:
    """All that is wrong, with its place in the recipe."""
    (tmp_path / "texts" / "code" / "far.txt").symlink_to("nowhere")
    (tmp_path / "texts" / "code" / "too.txt").symlink_to("nowhere")
    (tmp_path / "texts" / "empty").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("a")
    tree["data"]["domains"]["general"]["text"] = ["texts/wiki"]
    tree["data"]["domains"]["math"]["text"] = ["texts/empty"]
    recipe = parse_recipe(tree, "r.yaml")
    with pytest.raises(InputError) as refusal:
        check_inputs(recipe, plan_stages(recipe), ["data"])
    said = str(refusal.value)
    assert re.search(r"stage data: data\.domains\.math\.text: .*/empty: the directory holds no file", said)
    assert re.search(
        r"data\.domains\.code\.text: .*far.txt, .*too.txt: a link to a file that is not there; .* \(2 in all\)", said
    )
    assert re.search(r"data\.domains\.wiki\.text: .*a.txt is text of data\.domains\.general\.text, too", said)
    check_inputs(recipe, plan_stages(recipe), [])


def test_how_a_text_is_read_is_said_and_counts(tree: dict[str, Any], tmp_path: Path) -> None:
    before = identities(plan(tree).values())["data"]
    tree["data"]["domains"]["math"]["text"] = {"files": ["texts/math"], "json-key": "body", "on-bad-record": "skip"}
    stage = plan(tree)["data"]
    said = stage.config["description"]["domains"]
    assert (said["math"]["json-key"], said["math"]["on-bad-record"]) == ("body", "skip")
    assert said["code"].keys() == {"text", "shares"}
    settings = dict(identities([stage])["data"].settings)
    assert settings.pop("domain math reading") == ["json-key body", "on-bad-record skip"]
    assert settings == before.settings


def test_thousands_of_texts_fit_into_a_command(tree: dict[str, Any], tmp_path: Path) -> None:
    """Linux has no longer word than 128 KiB."""
    names = [f"texts/math/{number:0100}.txt" for number in range(3000)]
    for name in names:
        (tmp_path / name).write_text("a")
    tree["data"]["domains"]["math"]["text"] = names
    stage = plan(tree)["data"]
    assert max(map(len, stage.command)) < 1000
    record = make_records([stage], {"data": Action(RUN, "")}, [])["data"]
    StageRun(tmp_path / "run", record).begin(Action(RUN, ""), "cpu", "a test")
    written = (tmp_path / "run" / "data" / "config.yaml").read_text()
    description = read_description(str(tmp_path / "run" / "data" / "config.yaml"))
    assert description.domains["math"].text == [str(tmp_path / name) for name in names]
    by_hand = shell_script([stage], {"data": Action(RUN, "")}, tmp_path / "by-hand")
    subprocess.run(["bash"], input=by_hand.rpartition("OMP_NUM")[0], text=True, check=True)  # all but the program
    assert (tmp_path / "by-hand" / "data" / "config.yaml").read_text() == written
    assert json.loads((tmp_path / "by-hand" / "data" / "manifest.json").read_text())["stage"] == "data"
