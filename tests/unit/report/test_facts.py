"""The facts of a run: true, false, or not checked, from its numbers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.report.claims import check_claims
from megatron_btx.report.inputs import read_run
from megatron_btx.report.models import DENSE, Cast, differences_to, routing_distances
from tests.unit.report.example_run import (
    DOMAINS,
    EXPERTS,
    LOSSES,
    evaluation,
    make_model,
    make_run,
    set_loss,
    write_evaluation,
    write_json,
)


def even_routing(content: dict[str, Any]) -> None:
    content["models"]["btx"]["routing"] = {domain: [[0.25] * 4] * 4 for domain in DOMAINS}


def forget_nothing(content: dict[str, Any]) -> None:
    seed = content["models"]["seed"]["losses"]
    for name, entry in content["models"].items():
        if name.startswith("expert-"):
            entry["losses"] = {domain: min(loss, seed[domain] - 0.01) for domain, loss in entry["losses"].items()}


def better_average(content: dict[str, Any]) -> None:
    content["models"]["average"]["losses"] = dict.fromkeys(DOMAINS, 2.39)  # btx has 2.396


BREAKING = {
    "experts_gain_at_home": set_loss("expert-code", "code", 3.988),  # equal is not better
    "experts_lose_away": forget_nothing,
    "btx_beats_seed_everywhere": set_loss("btx", "general", 4.1),
    "btx_beats_average_and_experts": better_average,
    "routing_differs_between_domains": even_routing,
}


def facts_in(run: Path) -> dict[str, bool | None]:
    data = read_run(run)
    return {fact.name: fact.holds for fact in check_claims(data)}


def test_every_fact_holds_for_the_numbers_of_the_study(tmp_path: Path) -> None:
    assert facts_in(write_evaluation(tmp_path, evaluation())) == dict.fromkeys(BREAKING, True)


@pytest.mark.parametrize("name", BREAKING)
def test_each_fact_alone_is_false_when_its_numbers_say_so(name: str, tmp_path: Path) -> None:
    content = evaluation()
    BREAKING[name](content)
    verdicts = facts_in(write_evaluation(tmp_path, content))
    assert {fact for fact, holds in verdicts.items() if not holds} == {name}
    assert verdicts[name] is False


def test_one_pair_of_domains_routed_alike_makes_the_routing_fact_false() -> None:
    content = evaluation()
    routing = content["models"]["btx"]["routing"]
    routing["math"] = routing["code"]
    shares = {domain: tuple(map(tuple, layers)) for domain, layers in routing.items()}
    btx = make_model("btx", {"math": 1.0}, routing=shares, experts=EXPERTS)
    assert check_claims(Cast((btx,), DOMAINS))[-1].holds is False


@pytest.mark.parametrize(
    ("absent", "unchecked"),
    [
        (("dense",), ()),
        (("seed",), ("experts_gain_at_home", "experts_lose_away", "btx_beats_seed_everywhere")),
        (("average",), ("btx_beats_average_and_experts",)),
        (
            ("btx",),
            ("btx_beats_seed_everywhere", "btx_beats_average_and_experts", "routing_differs_between_domains"),
        ),
        (
            ("expert-math", "expert-code", "expert-knowledge"),
            ("experts_gain_at_home", "experts_lose_away", "btx_beats_average_and_experts"),
        ),
    ],
)
def test_missing_models_leave_facts_unchecked_and_say_why(
    absent: tuple[str, ...], unchecked: tuple[str, ...], tmp_path: Path
) -> None:
    names = tuple(name for name in LOSSES if name not in absent)
    data = read_run(write_evaluation(tmp_path, evaluation(names)))
    facts = check_claims(data)
    assert {fact.name for fact in facts if fact.holds is None} == set(unchecked)
    assert all(fact.detail for fact in facts)
    assert tuple(model.name for model in data.measured) == names
    assert (differences_to(data, DENSE) is None) == bool({"btx", "dense"} & set(absent))
    assert any(absent[0].split("-")[0] in note for note in data.notes)


def test_a_diverged_reference_leaves_facts_unchecked(tmp_path: Path) -> None:
    content = evaluation()
    content["models"]["seed"]["losses"] = dict.fromkeys(DOMAINS, math.nan)
    verdicts = facts_in(write_evaluation(tmp_path, content))
    assert verdicts["experts_gain_at_home"] is None and verdicts["experts_lose_away"] is None
    assert verdicts["btx_beats_average_and_experts"] is True


def test_a_diverged_expert_is_no_evidence_of_forgetting(tmp_path: Path) -> None:
    content = evaluation()
    forget_nothing(content)
    set_loss("expert-math", "general", math.nan)(content)
    assert facts_in(write_evaluation(tmp_path, content))["experts_lose_away"] is False


def test_an_expert_that_is_worse_only_at_home_has_not_lost_away(tmp_path: Path) -> None:
    content = evaluation()
    forget_nothing(content)
    set_loss("expert-code", "code", 9.0)(content)
    assert facts_in(write_evaluation(tmp_path, content))["experts_lose_away"] is False


def test_a_fact_refuted_by_what_is_there_is_false_whatever_is_missing(tmp_path: Path) -> None:
    content = evaluation(tuple(name for name in LOSSES if name != "average"))
    content["models"]["expert-math"]["losses"] = dict.fromkeys(DOMAINS, 1.0)
    assert facts_in(write_evaluation(tmp_path, content))["btx_beats_average_and_experts"] is False


def test_a_model_that_was_evaluated_twice_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_json(run / "mine" / "evaluation.json", evaluation(("seed",)))
    with pytest.raises(InputError, match=r"mine/evaluation.json: model 'seed' is in .*evaluate-experts"):
        read_run(run)


def test_routing_distance_is_total_variation_meaned_over_layers() -> None:
    routing = {"a": ((1.0, 0.0), (0.5, 0.5)), "b": ((0.0, 1.0), (0.75, 0.25))}
    model = make_model("btx", {}, routing=routing, experts=("x", "y"))
    assert routing_distances(model) == {("a", "b"): pytest.approx((1.0 + 0.25) / 2)}


def test_dense_layers_have_no_say_in_the_distance() -> None:
    """Their shares are all zero."""
    routing = {"a": ((0.0, 0.0), (1.0, 0.0)), "b": ((0.0, 0.0), (0.0, 1.0))}
    assert routing_distances(make_model("btx", {}, routing=routing, experts=("x", "y"))) == {("a", "b"): 1.0}


@pytest.mark.parametrize(("soft", "holds"), [(True, None), (False, False)])
def test_the_routing_of_a_soft_mixture_is_no_fact(soft: bool, holds: bool | None, tmp_path: Path) -> None:
    """It sends every token everywhere: all parameters are at work. Equal shares of another mixture refute it."""
    content = evaluation()
    even_routing(content)
    if soft:
        content["models"]["btx"]["active_parameters"] = content["models"]["btx"]["parameters"]
    fact = check_claims(read_run(write_evaluation(tmp_path, content)))[-1]
    assert fact.holds is holds and ("soft routing sends every token" in fact.detail) == soft


def test_difference_to_dense_is_unknown_where_one_was_not_evaluated() -> None:
    models = (make_model("btx", {"a": 1.0, "b": 2.0}), make_model("dense", {"a": 1.5}))
    assert differences_to(Cast(models, ("a", "b")), DENSE) == (None, {"a": -0.5, "b": None})
