"""Baselines are rows: one more, from outside the package, is in the recipe's form, the plan and the table of models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.plan.planner import plan_stages
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.budgets import Budget
from megatron_btx.recipe.expand import BASELINES, Baseline, Expansion
from megatron_btx.recipe.load import load_recipe, parse_recipe
from megatron_btx.recipe.models import ModelSpec, Train
from megatron_btx.recipe.recipe import Recipe
from megatron_btx.recipe.section import Section
from tests.support.runner import REPOSITORY
from tests.unit.recipe.test_from_checkpoint import tree, values

QUICKSTART = REPOSITORY / "examples" / "recipes" / "quickstart.yaml"
__all__ = ["tree"]  # a fixture


class _LongerSection(Section):
    times: int = 2


def _longer(expansion: Expansion, section: _LongerSection) -> Iterable[ModelSpec]:
    """The seed, trained further on its own data."""
    budget = expansion.rows["seed"].budget
    assert budget is not None
    longer = Budget(budget.blend, section.times * budget.tokens)
    yield ModelSpec("longer", "longer", Train("seed"), "longer", "more of the same", budget=longer, evaluated_in="more")


def recipe(*changes: str) -> Recipe:
    return load_recipe(QUICKSTART, list(changes))


def plan(planned: Recipe) -> dict[str, Stage]:
    return {stage.name: stage for stage in plan_stages(planned)}


@pytest.mark.usefixtures("in_quickstart_folder")
def test_a_row_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"baselines\.longer: unknown key"):
        recipe("baselines.longer.times=3")
    monkeypatch.setitem(BASELINES, "longer", Baseline(_LongerSection, _longer))
    assert "longer" not in plan(recipe())
    made = recipe("baselines.longer.times=3")
    stages = plan(made)
    assert stages["longer"].tokens == pytest.approx(3 * 1_000_000, rel=1e-3)
    assert stages["more"].parents == ("data", "longer") and "more" in stages["report"].parents
    assert made.models["longer"].describe() | {"tokens": 0} == {
        "name": "longer",
        "role": "longer",
        "home": "",
        "variant": "",
        "seed": None,
        "stage": "longer",
        "tokens": 0,
        "meaning": "more of the same",
        "traits": {},
    }
    assert plan(recipe("baselines.longer=true"))["longer"].tokens == pytest.approx(2_000_000, rel=1e-3)
    with pytest.raises(InputError, match=r"baselines\.longer\.tmes: unknown key; did you mean times"):
        recipe("baselines.longer.tmes=3")


def test_an_average_is_finetuned_where_all_experts_are_given(tree: dict[str, Any], tmp_path: Path) -> None:
    """As the mixture is, on its tokens, under its layout; without what only mixtures have."""
    del tree["baselines"]
    tree["finetune"]["megatron"] = {"lr": 0.1, "moe-token-dispatcher-type": "alltoall", "btx-freeze": "experts"}
    tree["finetune"]["layout"] = {"processes": 2, "expert-model-parallel-size": 2}
    tree["training"]["global-batch-size"] = 4
    stages = plan(parse_recipe(tree, "r.yaml"))
    found, finetune = stages["average-finetuned"], stages["finetune"]
    assert values(found, "pretrained-checkpoint") == ["average/checkpoint"] and "average" in stages
    assert (found.tokens, found.processes) == (finetune.tokens, 2)
    assert values(found, "train-data-path") == values(finetune, "train-data-path")
    assert values(found, "lr") == ["0.1"]
    assert not [word for word in found.command if word.startswith(("--moe", "--num-experts", "--expert", "--btx-f"))]
    tree["baselines"] = {"average-finetuned": {"layout": {"processes": 1}, "megatron": {"lr": 0.2}}}
    found = plan(parse_recipe(tree, "r.yaml"))["average-finetuned"]
    assert found.processes == 1 and values(found, "lr") == ["0.2"]
    tree["baselines"] = {"average-finetuned": False}
    assert not {"average-finetuned", "average"} & plan(parse_recipe(tree, "r.yaml")).keys()
    tree["experts"]["math"] = {"blend": {"math": 1}, "tokens": 1000}
    del tree["baselines"]
    assert "average-finetuned" not in plan(parse_recipe(tree, "r.yaml"))


@pytest.mark.usefixtures("in_quickstart_folder")
def test_upcycling_sees_the_data_of_the_mixture() -> None:
    stages = plan(recipe("baselines.upcycling=true"))
    assert values(stages["upcycled-mix"], "copies") == ["4"]
    for name, like in (("upcycled-domains", "dense-domains"), ("upcycled", "dense")):
        assert stages[name].tokens == stages[like].tokens
        assert values(stages[name], "train-data-path") == values(stages[like], "train-data-path")
        for flag in ("num-experts", "moe-router-topk", "moe-router-dtype", "btx-load-balancing"):
            if f"--{flag}" in stages["finetune"].command:
                assert values(stages[name], flag) == values(stages["finetune"], flag)
    assert stages["evaluate-upcycled"].parents == ("data", "upcycled")


@pytest.mark.usefixtures("in_quickstart_folder")
def test_upcycling_at_matched_compute_takes_the_flops_of_experts_and_mixture() -> None:
    """Within the half batch that whole batches leave; the seed's training, which both have, does not count."""
    stages = plan(recipe("baselines.upcycling-cm=true"))
    spent = sum(stages[name].flops or 0 for name in ("expert-math", "expert-code", "expert-knowledge", "finetune"))
    found = stages["upcycled-cm"]
    assert found.flops == pytest.approx(spent, rel=1e-3) and found.parents == ("data", "upcycled-mix")
    assert values(found, "train-data-path") == values(stages["finetune"], "train-data-path")
    assert found.tokens != stages["finetune"].tokens and "upcycled-domains" not in stages
    both = plan(recipe("baselines.upcycling-cm=true", "baselines.upcycling=true"))
    assert both["upcycled-mix"] == stages["upcycled-mix"]


@pytest.mark.usefixtures("in_quickstart_folder")
def test_branch_train_merge_is_evaluated_with_its_experts() -> None:
    planned = recipe("baselines.btm={top-k: [2, 1], weights: [tf-idf, bayes]}")
    rows = [row for row in planned.models.values() if row.role == "btm"]
    assert [row.name for row in rows] == ["btm-top1", "btm-bayes-top1", "btm-top2", "btm-bayes-top2"]
    stages = plan(planned)
    assert not any(name.startswith("btm") for name in stages)
    experts = stages["evaluate-experts"]
    assert "--btx-btm-top-k 1 2 --btx-btm-weights tf-idf bayes --btx-btm-member" in " ".join(experts.command)
    members = experts.command[experts.command.index("--btx-btm-member") + 1 :]
    assert list(members[:2]) == ["expert-math=0.95:data/math.train", "expert-math=0.05:data/general.train"]
    assert list(members[-4:]) == [
        f"seed={share}:data/{domain}.train"
        for domain, share in (("general", 0.85), ("math", 0.05), ("code", 0.05), ("knowledge", 0.05))
    ]
    without = plan(recipe("baselines.btm=false"))["evaluate-experts"]
    assert not values(without, "btx-btm-member") and without.settings != experts.settings
    for said, expected in (
        ("{top-k: [5]}", r"baselines\.btm\.top-k: found 5, expected at most 4"),
        ("{top-k: []}", r"baselines\.btm\.top-k"),
        ("{weights: [nearest]}", r"baselines\.btm\.weights: found 'nearest', expected some of: tf-idf"),
    ):
        with pytest.raises(InputError, match=expected):
            recipe(f"baselines.btm={said}")
