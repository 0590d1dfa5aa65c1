"""The nine claims over seeds: which differences they are tested on, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from megatron_btx.report.evidence import (
    MARGIN,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    UNTESTED,
    Comparison,
    find_replicates,
    judge_claims,
)
from megatron_btx.report.inputs import Datasets, RunData
from megatron_btx.report.models import Model
from megatron_btx.runner.run_dir import make_loss
from megatron_btx.runner.schemas import ModelRow

DOMAINS = ("general", "math")


def make_model(name: str, role: str, losses: Mapping[str, float], **row) -> Model:
    scores = [make_loss(name, domain, loss, 1000) for domain, loss in losses.items()]
    return Model(ModelRow(name=name, role=role, **row), tuple(scores))


def run_of(seed: int, models: list[Model], **recipe) -> RunData:
    about = {"random-seed": seed, "name": f"run-{seed}", **recipe}
    return RunData(tuple(models), DOMAINS, about["name"], (), Datasets(), recipe=about)


def a_run(seed: int, shift: float = 0.0, **recipe) -> RunData:
    """The mixture is .1 below dense but for ``shift``, and .5 below the nearest expert's choice."""
    noise = 0.01 * seed
    models = [
        make_model("seed", "seed", {"general": 4.0 + noise, "math": 2.0}),
        make_model("expert-math", "expert", {"general": 4.6, "math": 1.0 + noise}, home="math"),
        make_model("btx", "btx", {"general": 3.8 + shift, "math": 0.9 + shift}),
        make_model("dense", "dense", {"general": 3.9 + noise, "math": 1.0}),
        make_model("btm-top1", "btm", {"general": 4.3, "math": 1.4 + noise}),
        make_model("btm-top2", "btm", {"general": 4.4, "math": 1.6 - noise}),
    ]
    return run_of(seed, models, **recipe)


def verdicts(*runs: RunData) -> list[str]:
    (replicates,) = find_replicates(runs)
    return [finding.verdict for finding in judge_claims(replicates)]


def test_seeds_decide_and_one_seed_does_not():
    assert verdicts(a_run(1)) == [UNDECIDED] * 4 + [UNTESTED] * 5
    assert {finding.p for finding in judge_claims(find_replicates([a_run(1)])[0])} == {None}
    assert verdicts(*map(a_run, (1, 2, 3))) == [SUPPORTED] * 4 + [UNTESTED] * 5
    worse = verdicts(*(a_run(seed, shift=0.5) for seed in (1, 2, 3)))
    assert worse[:4] == [SUPPORTED, REFUTED, UNDECIDED, REFUTED]  # against btm: .5 - .5, give or take


def test_differences_are_paired_by_seed():
    """Dense of seed 1 is never compared with the mixture of seed 2; a run without a model gives no difference."""
    runs = [a_run(1), a_run(2), run_of(3, [make_model("btx", "btx", {"general": 3.0, "math": 1.0})])]
    (replicates,) = find_replicates(runs)
    dense = judge_claims(replicates)[3]
    (comparison,) = dense.comparisons
    assert comparison.differences == {"1": pytest.approx(0.105), "2": pytest.approx(0.11)}
    assert dense.numbers()["comparisons"]["dense"]["seeds"] == 2
    assert dense.p == pytest.approx(comparison.interval.p) and dense.adjusted_p >= dense.p


def test_every_btm_has_to_be_beaten():
    """A claim's verdict is that of the weakest of its comparisons, and its p the largest."""
    found = judge_claims(find_replicates([a_run(1), a_run(2), a_run(3)])[0])[2]
    assert [each.name for each in found.comparisons] == ["btm-top1", "btm-top2"]
    assert found.p == max(each.p for each in found.comparisons)


def test_runs_of_other_recipes_are_no_further_seeds():
    runs = [a_run(1), a_run(2), a_run(3, finetune={"tokens": 1}), a_run(2)]
    groups = find_replicates(runs)
    assert [group.run_names for group in groups] == [("run-1", "run-2"), ("run-3",)]  # and a seed counts once


def test_no_worse_has_a_margin():
    inside = {str(number): -0.5 * MARGIN + 1e-4 * number for number in range(4)}
    assert Comparison("a", inside).verdict == REFUTED
    assert Comparison("a", inside, MARGIN).verdict == SUPPORTED
    beyond = {seed: value - 2 * MARGIN for seed, value in inside.items()}
    assert Comparison("a", beyond, MARGIN).verdict == REFUTED
    assert Comparison("a", {"1": 5.0}).verdict == UNDECIDED and math.isinf(
        Comparison("a", {"1": 5.0}).interval.half_width
    )


def a_variant(name: str, seed: int, loss: float, **traits: str) -> Model:
    every = {"routing": "top-k", "top-k": "2", "load-balancing": "none", "freeze": "", "megatron": ""}
    every |= {key.replace("_", "-"): value for key, value in traits.items()}
    losses = dict.fromkeys(DOMAINS, loss)
    return make_model(f"ablation-{name}-s{seed}", "btx", losses, variant=name, seed=seed, traits=every)


def test_variants_are_found_by_what_they_say():
    models = []
    for seed in (1, 2, 3):
        noise = 0.001 * seed
        models += [
            a_variant("two", seed, 2.0 + noise),
            a_variant("all", seed, 1.9, routing="soft"),
            a_variant("one", seed, 2.2, routing="sample-top1"),
            a_variant("hard", seed, 2.5 + noise, routing="switch"),
            a_variant("still", seed, 2.0 + 2 * noise, freeze="experts"),
            a_variant("still-balanced", seed, 9.0, freeze="experts", load_balancing="paper"),
        ]
    findings = judge_claims(find_replicates([run_of(1, models)])[0])
    assert [finding.verdict for finding in findings[:6]] == [UNTESTED] * 6
    order = findings[6]
    assert [each.name for each in order.comparisons] == ["two over all", "one over two", "hard over one"]
    assert order.verdict == SUPPORTED
    frozen = findings[8]
    assert [each.name for each in frozen.comparisons] == ["two over still"], "that without balancing alone is its like"
    assert frozen.verdict == SUPPORTED
