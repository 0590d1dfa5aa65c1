"""The report of an ablation: what it writes, what it names the best, what it says of stages that are not at an end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from megatron_btx.common.errors import InputError
from megatron_btx.report import build as report
from megatron_btx.report.build import main
from megatron_btx.report.inputs import read_run
from megatron_btx.report.models import find_best
from megatron_btx.report.quantities import spread
from megatron_btx.report.sections import make_study
from tests.unit.report.example_run import build_report

STAGES = ("ablation-one-s1", "ablation-one-s2", "ablation-two-s2")


def write(folder, name, seed, loss, dead=0, **more):
    """The metrics of one finished finetuning of two layers and two experts."""
    stage = folder / f"ablation-{name}-s{seed}"
    stage.mkdir(exist_ok=True)
    load = {f"moe/load_layer_{layer}_expert_{e}": (0.7, 0.3)[e] for layer in range(2) for e in range(2)}
    lines = [
        {"iteration": 4, **load, "moe/dead_experts": 9, "moe/dropped_layer_0": 0.5},
        {"iteration": 8, **load, "moe/dead_experts": dead, "moe/dropped_layer_0": 0.1, "moe/dropped_layer_1": 0.3},
        {"iteration": 9, "lm loss validation math": loss, "lm loss validation mean": loss, **more},
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')


def plan(folder, *stages):
    (folder / "plan.json").write_text(json.dumps([{"stage": stage} for stage in stages]))


@pytest.fixture
def finished(tmp_path):
    """The files of a finished ablation of two variants and two seeds."""
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"ablation": {"seeds": [1, 2], "variants": {"one": None, "two": {"seeds": [2]}}}})
    )
    plan(tmp_path, *STAGES)
    for name, seed, loss, dead in (("one", 1, 2.0, 0), ("one", 2, 2.5, 2), ("two", 2, 1.5, 1)):
        write(tmp_path, name, seed, loss, dead)
    return tmp_path


def best(run):
    """The variants with the lowest mean loss."""
    study = make_study([read_run(run)], "")
    return [line.label for line in find_best(study.lines, study.domains)]


def test_report(finished, capsys):
    """The last values of every run; mean and deviation over seeds; a table, pages, figures and numbers."""
    found = {(model.row.variant, model.row.seed): model for model in read_run(finished).variants()}
    assert found["one", 2].losses == {"math": 2.5} and found["one", 2].stage.log.routing.dead == 2
    assert found["one", 2].stage.log.routing.dropped == pytest.approx(0.2)
    assert found["two", 2].stage.log.routing.loads == [[0.7, 0.3], [0.7, 0.3]]
    assert [seed for variant, seed in found if variant == "two"] == [2]
    assert main([str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "2.250 ± 0.354" in printed and "0, 2" in printed and "30.0% to 70.0%" in printed
    text = (finished / "report" / "ablation.md").read_text()
    assert "Lowest mean loss: two, 1.500" in text and "2.250 ± 0.354" in text
    assert len(list((finished / "report").glob("*.png"))) == 2
    numbers = json.loads((finished / "report" / "ablation.json").read_text())
    assert numbers["one"]["1"]["dead"] == 0 and numbers["one"]["2"]["losses"] == {"math": 2.5, "mean": 2.5}
    assert json.loads((finished / "report" / "results.json").read_text())["models"]["ablation-two-s2"]["role"] == "btx"


def test_spread():
    """The sample's deviation, none of one value."""
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert math.isnan(spread([1.0])[1])


def test_deviations_of_broken_losses_are_none():
    """What is not finite has no deviation; the statistics module ends in a traceback there."""
    for values in ([math.nan, 1.0], [math.inf, 1.0], [1e308, -1e308, 1e308]):
        assert not math.isfinite(spread(values)[1])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_variant_of_broken_losses_is_shown_and_is_never_the_best(broken, finished, capsys):
    """Whether it stands first or last; all files are written, and their JSON is one."""
    for variant, seeds in (("one", (1, 2)), ("two", (2,))):
        losses = {name: 2.0 for name in ("one", "two")} | {variant: broken}
        for name, of in (("one", (1, 2)), ("two", (2,))):
            for seed in of:
                write(finished, name, seed, losses[name] if seed == seeds[0] or name != variant else 2.0)
        assert main([str(finished)]) == 0
        other = {"one": "two", "two": "one"}[variant]
        assert best(finished) == [other]
        assert f"Lowest mean loss: {other}, 2.000" in (finished / "report" / "ablation.md").read_text()
        assert ("NaN" if math.isnan(broken) else "inf") in capsys.readouterr().out
        for name in ("ablation.json", "results.json"):
            json.loads((finished / "report" / name).read_text(), parse_constant=pytest.fail)


def test_without_a_finite_loss_there_is_no_best(finished):
    """It says so."""
    for name, seed in (("one", 1), ("one", 2), ("two", 2)):
        write(finished, name, seed, math.nan, dead=math.nan)
    assert main([str(finished)]) == 0
    text = (finished / "report" / "ablation.md").read_text()
    assert "No variant came to its end on all of its seeds with losses that are finite numbers." in text


def test_a_tie_names_both(finished):
    """Equal means have no order."""
    for name, seed in (("one", 1), ("one", 2), ("two", 2)):
        write(finished, name, seed, 2.0)
    assert best(finished) == ["one", "two"]


def manifest(folder, name, **content):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "manifest.json").write_text(json.dumps({"stage": name, **content}))


@pytest.mark.parametrize("broken", ["metrics", "validation", "stopped", "another mix"])
def test_stages_that_are_not_at_their_end_are_named_and_their_variant_is_not_the_best(broken, finished, capsys):
    """The rest is shown. Here the best of the finished ones is another."""
    stage = "ablation-two-s2"
    file = finished / stage / "metrics.jsonl"
    if broken == "metrics":
        file.unlink()
    elif broken == "validation":
        file.write_text(file.read_text().replace("validation mean", "validation"))
    elif broken == "stopped":
        manifest(finished, stage, status="stopped", steps=20)
    else:
        entries = [*({"stage": name} for name in STAGES[:2]), {"stage": stage, "fingerprint": "of a new mix"}]
        (finished / "plan.json").write_text(json.dumps(entries))
        manifest(finished, stage, status="finished", fingerprint="of an old mix")
    said = {
        "metrics": f"{stage}: has not run",
        "validation": f"{stage}: holds no loss per domain, so that it has not come to its end",
        "stopped": f"Stage {stage} is unfinished: stopped at step 9 of 20",
        "another mix": f"Left out: {stage}: made with other settings, or from other stages",
    }
    assert main([str(finished)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert said[broken] in printed
    assert "two (0 of 1 seeds)" in printed and "one " in printed
    text = (finished / "report" / "ablation.md").read_text()
    assert said[broken] in text and "Lowest mean loss: one, 2.250" in text


def test_a_variant_that_lacks_a_seed_is_not_compared(finished):
    """Its mean is over other seeds than it was to be; the best of whole ones is named."""
    write(finished, "one", 1, 0.1)
    shutil.rmtree(finished / "ablation-one-s2")
    assert best(finished) == ["two"]


def test_variants_that_were_not_planned_are_not_waited_for(finished):
    """A variant without settings may have been taken back: what was planned counts."""
    plan(finished, *STAGES[:2])
    data = read_run(finished)
    assert [model.name for model in data.variants()] == list(STAGES[:2])
    assert data.marked == ("Left out: ablation-two-s2: not a stage of this run's recipe.",)


def test_variants_are_known_by_the_table_of_models(finished):
    """Whatever their names are; without one, by their names."""
    rows = [
        {"name": stage, "role": "btx", "variant": variant, "seed": 1, "stage": stage, "meaning": "a variant"}
        for stage, variant in (("ablation-one-s1", "first"), ("ablation-two-s2", "second"))
    ]
    (finished / "models.json").write_text(json.dumps(rows))
    assert best(finished) == ["second"]
    (finished / "models.json").write_text("[1]")
    with pytest.raises(InputError, match=r"models.json: is no table of models"):
        read_run(finished)


@pytest.mark.parametrize("broken", ["nothing", "yaml"])
def test_what_is_no_ablation_is_refused(broken, finished):
    """In one line, with what was expected."""
    if broken == "nothing":
        for folder in finished.glob("ablation-*"):
            shutil.rmtree(folder)
    else:
        (finished / "recipe.yaml").write_text("a: [")
    with pytest.raises(InputError, match={"nothing": "not a run directory", "yaml": "broken YAML"}[broken]):
        read_run(finished)


def test_a_domain_that_some_variants_lack_leaves_them_without_a_mean(finished, capsys):
    """They are shown, and none of them is the best."""
    write(finished, "two", 2, 1.5, **{"lm loss validation code": 1.0, "lm loss validation mean": 1.25})
    assert main([str(finished)]) == 0
    assert "2.250 ± 0.354" in capsys.readouterr().out and best(finished) == ["two"]


@pytest.mark.usefixtures("undrawn")
def test_the_split_of_an_ablation_is_said(finished):
    from megatron_btx.report.figures import draw_losses, make_palette

    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    recipe["ablation"]["split"] = "test"
    (finished / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = (build_report(finished).folder / "ablation.md").read_text()
    assert "on the test split." in text.split("\n")[2] and "Loss on the test split in nats per token" in text
    assert "validation" not in text.lower()
    study = make_study([read_run(finished)], "")
    assert "loss on the test split, nats per token" in draw_losses(study, make_palette(study)).get_supxlabel()


@pytest.mark.usefixtures("undrawn")
def test_one_command_reports_on_both_kinds_of_run(finished, capsys):
    """btx report sees that the run is an ablation's; facts are of the other kind."""
    assert report.main([str(finished)]) == 0
    assert f"report: {finished / 'report' / 'ablation.html'}" in capsys.readouterr().out
    assert report.main([str(finished), "--require-facts"]) == 2


def test_wide_mixtures_are_drawn(finished: Path):
    """32 layers of 16 experts, a name that is no name, and shares that are none."""
    load = {f"moe/load_layer_{layer}_expert_{e}": 1 / 16 for layer in range(32) for e in range(16)}
    load["moe/load_layer_3_expert_4"] = math.nan
    name = "v$x$" + "y" * 50
    plan(finished, f"ablation-{name}-s1")
    write(finished, name, 1, 2.0, **load)
    assert main([str(finished)]) == 0
    assert (finished / "report" / "ablation-load.png").is_file()
