"""Routing methods by name, included recipes, ablations: what they plan, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.plan.planner import plan_stages
from megatron_btx.recipe.load import load_recipe

RECIPES = Path(__file__).resolve().parents[3] / "examples" / "recipes"

pytestmark = pytest.mark.usefixtures("in_quickstart_folder")


def planned(name: str, *changes: str) -> dict[str, list[str]]:
    """Stage -> words of its command."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", list(changes))
    return {stage.name: list(stage.command) for stage in plan_stages(recipe)}


def value(command: list[str], flag: str) -> str | None:
    """The value of a flag, "" for a bare one, None where it is not given."""
    if f"--{flag}" not in command:
        return None
    following = command[command.index(f"--{flag}") + 1]
    return "" if following.startswith("--") else following


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", {"moe-router-topk": "2", "moe-router-pre-softmax": None, "moe-aux-loss-coeff": "0.01"}),
        ("quickstart-top-k-pre-softmax", {"moe-router-topk": "2", "moe-router-pre-softmax": ""}),
        (
            "quickstart-switch",
            {"moe-router-topk": "1", "moe-router-pre-softmax": "", "moe-expert-capacity-factor": "1.5"},
        ),
        (
            "quickstart-soft",
            {"moe-router-topk": "4", "moe-router-load-balancing-type": "none", "moe-aux-loss-coeff": None},
        ),
        (
            "quickstart-sample-top1",
            {"moe-router-topk": "1", "moe-router-pre-softmax": "", "btx-sample-top1": "", "moe-aux-loss-coeff": None},
        ),
    ],
)
def test_routing_methods(name, expected):
    """Each example's finetuning and evaluation get the flags of its method; the rest is the quickstart's."""
    stages, quickstart = planned(name), planned("quickstart")
    for stage in ("finetune", "evaluate-moe"):
        for flag, wanted in expected.items():
            assert value(stages[stage], flag) == wanted, flag
    assert stages["seed"] == quickstart["seed"]
    assert (value(stages["finetune"], "btx-sample-top1") is None) == (name != "quickstart-sample-top1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("mix.routing=top-1", "mix.routing: found 'top-1', expected one of top-k"),
        ("mix={routing: switch, top-k: 2}", "mix.top-k: switch routing has its own k"),
        ("mix.top-k=5", "at most the 4 experts"),
        ("mix.top-k=1", "take routing: switch"),
        ("mix.load-balancing=half", "expected 'megatron', 'paper' or 'none'"),
        ("mix.load-balancing=none", r"mix\.megatron\.moe-router-load-balancing-type: found 'aux_loss' beside .*: none"),
        (
            "mix={load-balancing: none, megatron: {moe-aux-loss-coeff: 0.01}}",
            r"mix\.megatron\.moe-aux-loss-coeff: found 0.01 beside load-balancing: none, which contradicts it; leave",
        ),
        ("mix={load-balancing: paper, megatron: {moe-aux-loss-coeff: 0}}", "found 0 beside load-balancing: paper"),
        (
            "mix={load-balancing: megatron, megatron: {moe-router-load-balancing-type: none}}",
            "found 'none' beside load-balancing: megatron",
        ),
        ("mix.megatron.moe-router-pre-softmax=true", "set by the pipeline from mix.routing"),
        ("mix.megatron.btx-sample-top1=true", "set by the pipeline from mix.routing"),
        ("mix.megatron.btx-load-balancing=paper", "set by the pipeline from mix.load-balancing"),
    ],
)
def test_routing_is_refused(change, said):
    """What is no method, what the method lacks, and what would be said twice."""
    with pytest.raises(InputError, match=said):
        planned("quickstart", change)


@pytest.mark.parametrize("place", ["model", "training", "finetune.megatron"])
def test_load_balancing_is_not_contradicted_from_elsewhere(place):
    """Flags of other sections would win over it."""
    with pytest.raises(InputError, match=rf"{place}\.moe-aux-loss-coeff: found 0.5 beside load-balancing: none"):
        planned("quickstart-soft", f"{place}.moe-aux-loss-coeff=0.5")


def test_ablation_of_the_example():
    """Ten variants over three seeds, each from its seed's mix, measured on every domain at its end."""
    stages = planned("ablation-tiny")
    runs = {name: command for name, command in stages.items() if name.startswith("ablation-")}
    assert len(runs) == 30
    assert [name for name in stages if name.startswith("mix")] == ["mix-s1", "mix-s2", "mix-s3"]
    assert value(stages["mix-s2"], "router-seed") == "2"
    for name, command in runs.items():
        seed = name.rpartition("-s")[2]
        assert value(command, "seed") == seed
        assert value(command, "pretrained-checkpoint") == f"mix-s{seed}/checkpoint"
        assert value(command, "btx-valid-data") == "general=data/general.valid"
        assert value(command, "btx-first-loss-bound") == "evaluate-experts/evaluation.json"
    assert value(runs["ablation-top2-none-frozen-s1"], "btx-freeze") == "experts"
    assert value(runs["ablation-top2-paper-s1"], "btx-load-balancing") == "paper"
    assert value(runs["ablation-provoked-s1"], "moe-aux-loss-coeff") is None
    assert value(runs["ablation-provoked-s1"], "btx-lr-multiplier") == "router=20"
    assert "finetune" not in stages and "report" in stages


def test_what_finetune_says_holds_for_its_variants():
    """Its flags win over those of the mix and of the ablation itself; a variant's own win over them, false too."""
    settings = "{eval-interval: 10, btx-first-loss-bound: 5.5, moe-router-dtype: fp64, bf16: true, swiglu: false}"
    own = "ablation.variants.soft.megatron={eval-interval: 20, bf16: false}"
    stages = planned("ablation-tiny", f"finetune.megatron={settings}", "finetune.megatron.micro-batch-size=4", own)
    for name, interval, half in (("top2", "10", ""), ("soft", "20", None)):
        command = stages[f"ablation-{name}-s1"]
        assert value(command, "eval-interval") == interval and value(command, "bf16") == half
        assert value(command, "btx-first-loss-bound") == "5.5" and value(command, "moe-router-dtype") == "fp64"
        assert value(command, "swiglu") is None
    assert value(planned("ablation-tiny")["ablation-soft-s1"], "eval-interval") == "1000000000"


def test_a_capacity_of_the_mix_is_its_methods():
    """Variants of switch routing inherit it; those that drop no token do not."""
    stages = planned("ablation-tiny", "mix={routing: switch, top-k: null, megatron: {moe-expert-capacity-factor: 2}}")
    assert value(stages["ablation-switch-s1"], "moe-expert-capacity-factor") == "2"
    assert value(stages["ablation-soft-s1"], "moe-expert-capacity-factor") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("ablation.seeds=[1, 1]", "expected every seed once"),
        ("ablation.seeds=[0]", r"ablation\.seeds\[0\]: found 0, expected at least 1"),
        ("ablation.seeds=[true]", r"ablation\.seeds\[0\]: found True, expected a whole number"),
        ("ablation.tokens=10", "stage evaluate-experts: 10 tokens per domain are fewer than one batch"),
        ("ablation.seeds=3", "expected a list"),
        ("ablation.variants={}", "ablation.variants: missing"),
        ("ablation.variants.soft.routing=softer", "ablation.variants.soft.routing: found 'softer'"),
        ("ablation.variants.soft.speed=2", "ablation.variants.soft.speed: unknown key"),
        ("ablation.variants.soft.freeze=experts", "soft.freeze: found 'experts', expected a list"),
        ("ablation.variants={'a b': {}}", "letters, digits, dots, dashes and underscores"),
        (
            "ablation.variants.soft.megatron={moe-router-load-balancing-type: aux_loss}",
            "soft.megatron.moe-router-load-balancing-type: found 'aux_loss' beside load-balancing: none",
        ),
        ("ablation.variants.top2.megatron={moe-router-load-balancing-type: none}", "beside load-balancing: megatron"),
        ("finetune=null", "add both"),
        ("ablation.seeds=[4294967296]", "expected at most 4294967295"),
        ("ablation.variants.soft={megatron: {btx-freeze: router}, freeze: [experts]}", "soft.freeze: .*a second time"),
        (
            "ablation.variants.soft.megatron={moe-aux-loss-coeff: 0.5}",
            "soft.megatron.moe-aux-loss-coeff: found 0.5 besi",
        ),
        ("evaluate={tokens: 65536}", "evaluate: an ablation makes none: every variant is measured on ablation.split"),
        ("baselines={average: true}", "baselines: an ablation makes none"),
        ("mix.router-seed=5", "mix.router-seed: an ablation draws its routers from ablation.seeds"),
    ],
)
def test_ablations_are_refused(change, said):
    """With the place and what was expected."""
    with pytest.raises(InputError, match=said):
        planned("ablation-tiny", change)


def test_a_variant_that_says_nothing_is_finetune_as_it_is(tmp_path):
    """Null takes a variant of an included recipe out; an empty one changes nothing; no frozen groups unfreeze."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"include: {RECIPES / 'ablation-tiny.yaml'}\nfinetune: {{megatron: {{btx-freeze: router}}}}\n"
        "ablation: {seeds: [1], variants: {soft: null, plain: , free: {freeze: []}}}\n"
    )
    recipe = load_recipe(file, ["ablation.variants.switch=null"])
    tree = recipe.tree
    stages = {stage.name: list(stage.command) for stage in plan_stages(recipe)}
    names = {name for name in stages if name.startswith("ablation-")}
    assert {"ablation-plain-s1", "ablation-free-s1"} < names
    assert not {"ablation-soft-s1", "ablation-switch-s1"} & names
    assert not {"soft", "switch"} & tree["ablation"]["variants"].keys()
    assert value(stages["ablation-plain-s1"], "btx-freeze") == "router"
    assert value(stages["ablation-free-s1"], "btx-freeze") is None


def test_an_ablation_of_a_given_finetuning_is_refused(tmp_path):
    """It would be finetuned all the same."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(InputError, match=r"finetune\.from: an ablation finetunes every variant itself"):
        planned("ablation-tiny", f"finetune.from={tmp_path}")


def test_included_recipes(tmp_path):
    """Mappings are merged, the rest is replaced, null takes back; what is no recipe and a circle are refused."""
    (tmp_path / "over.yaml").write_text(
        f"include: {RECIPES / 'quickstart.yaml'}\nname: mine\nseed: {{tokens: 2_000_000}}\n"
    )
    recipe = load_recipe(tmp_path / "over.yaml", ["baselines=null"])
    tree = recipe.tree
    assert (recipe.name, recipe.budget("seed").tokens, "dense" in recipe.models) == ("mine", 2_000_000, False)
    assert set(recipe.budget("seed").blend) == {"general", "math", "code", "knowledge"}
    assert "include" not in tree and "baselines" not in tree
    for name, text in (("list", "- a"), ("empty", "# nothing"), ("b", "include: c.yaml"), ("c", "include: b.yaml")):
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, text, said in (
        ("lost", "include: nowhere.yaml", "lost.yaml: include: found 'nowhere.yaml', expected a recipe file"),
        ("folder", "include: ..", "found '..', expected a recipe file"),
        ("self", "include: self.yaml", "a circle: .*/self.yaml includes .*/self.yaml; leave"),
        ("a", "include: b.yaml", "a circle: .*/b.yaml includes .*/c.yaml includes .*/b.yaml; leave"),
        ("of-list", "include: list.yaml", "list.yaml: found a list, expected a mapping"),
        ("of-empty", "include: empty.yaml", "empty.yaml: found nothing, expected a mapping"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
        with pytest.raises(InputError, match=said):
            load_recipe(tmp_path / f"{name}.yaml", [])
