"""Which stages a report shows, how much of them, and what it says of the data that its models saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_btx import cli
from megatron_btx.report import build as report
from megatron_btx.report.inputs import read_run
from megatron_btx.report.models import BTX, DENSE
from megatron_btx.report.pages import to_markdown
from megatron_btx.report.sections import make_study
from megatron_btx.report.stages import find_left_out, read_stage
from megatron_btx.runner.schemas import PlannedStage, StageManifest
from tests.unit.report.example_run import (
    DOMAINS,
    EXPERTS,
    build_report,
    change,
    evaluation,
    make_run,
    results,
    write_evaluation,
    write_json,
)

PARENTS: dict[str, tuple[str, ...]] = {
    "data": (),
    "seed": ("data",),
    "expert-math": ("data", "seed"),
    "expert-code": ("data", "seed"),
    "expert-knowledge": ("data", "seed"),
    "mix": ("expert-math", "expert-code", "expert-knowledge", "seed"),
    "average": ("expert-math", "expert-code", "expert-knowledge", "seed"),
    "finetune": ("data", "mix"),
    "dense-domains": ("data", "seed"),
    "dense": ("data", "dense-domains"),
    "evaluate-experts": ("data", "seed", "expert-math", "expert-code", "expert-knowledge"),
    "evaluate-dense": ("data", "average", "dense"),
    "evaluate-moe": ("data", "mix", "finetune"),
}


def fingerprinted(run: Path, **anew: str) -> Path:
    """Give the stages of a run the fingerprints that btx run writes; ``anew``: stages re-made behind the others."""
    for stage, parents in PARENTS.items():
        file = run / stage / "manifest.json"
        content = json.loads(file.read_text()) if file.is_file() else {}
        of = {parent: f"of {parent}" for parent in parents}
        content |= {"stage": stage, "status": "finished", "parents": of}
        write_json(file, {**content, "fingerprint": anew.get(stage, f"of {stage}")})
    write_json(run / "plan.json", [{"stage": stage, "fingerprint": f"of {stage}"} for stage in PARENTS])
    return run


def text_of(run: Path) -> str:
    """The report as Markdown, without its figures, whose drawing takes seconds."""
    made = report.make_report(run)
    return to_markdown(made.title, made.sections)


def test_a_run_of_today_is_shown_whole(tmp_path: Path) -> None:
    data = read_run(fingerprinted(make_run(tmp_path)))
    assert data.marked == () and data.notes == () and len(data.stages) == len(PARENTS)


@pytest.mark.usefixtures("undrawn")
def test_stages_that_left_the_recipe_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Baselines that were taken out say nothing of a model trained since."""
    run = fingerprinted(make_run(tmp_path))
    gone = ("average", "dense-domains", "dense", "evaluate-dense")
    write_json(
        run / "plan.json", [{"stage": stage, "fingerprint": f"of {stage}"} for stage in PARENTS if stage not in gone]
    )
    assert report.main([str(run)]) == 0
    printed = capsys.readouterr().out
    note = "Left out: average, dense, dense-domains, evaluate-dense: not a stage of this run's recipe."
    assert note in printed and "btx - dense" not in printed
    found = results(run)
    assert not {"dense", "average"} & set(found["models"]) and not set(gone) & {*found["stages"], *found["curves"]}
    assert found["btx_minus_dense"] is None and found["notes"][0] == note
    assert note in (run / "report" / "report.md").read_text()


def test_what_another_seed_made_is_left_out(tmp_path: Path) -> None:
    """The seed was trained again, alone: the recipe's fingerprints are those of another seed."""
    run = fingerprinted(make_run(tmp_path), seed="another")
    ours = {stage: "of data" if stage == "data" else "another" for stage in PARENTS}
    write_json(run / "plan.json", [{"stage": stage, "fingerprint": own} for stage, own in ours.items()])
    data = read_run(run)
    assert [stage.name for stage in data.stages] == ["data", "seed"]
    assert data.measured == [] and len(data.datasets.rows) == 3 * len(DOMAINS)
    assert "made with other settings" in " ".join(data.marked)
    assert "trained on" not in text_of(run).split("## ")[0]


def test_without_fingerprints_a_stage_is_shown() -> None:
    """Nothing says that it is another one: of a script's run without a plan, or one that an earlier version wrote."""
    manifests = {"seed": StageManifest(fingerprint="another"), "mine": StageManifest()}
    assert find_left_out(None, manifests) == {}
    assert find_left_out([PlannedStage(stage="seed"), PlannedStage(stage="mine", fingerprint="x")], manifests) == {}
    left_out = find_left_out([PlannedStage(stage="seed", fingerprint="of seed")], manifests)
    assert set(left_out) == {"seed", "mine"}


def test_status_says_outdated_of_what_the_report_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fingerprinted(make_run(tmp_path), finetune="of other settings")
    assert cli.main(["status", str(run)]) == 0
    rows = [line.replace("│", " ").replace("┃", " ").split() for line in capsys.readouterr().out.splitlines()]
    states = {row[0]: row[1] for row in rows if row and row[0] in PARENTS}
    outdated = {stage for stage, state in states.items() if state == "outdated"}
    assert outdated == {"finetune"}
    assert "Left out: finetune:" in read_run(run).marked[0]
    assert set(states.values()) == {"outdated", "finished"}
    assert ["stage", "state", "step", "loss", "tokens/s", "time", "left", "time"] in rows


@pytest.mark.parametrize("parents", [None, 5, "seed", [1], {"seed": None}, {"self": "x"}])
def test_odd_parents_are_borne(parents: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    change(run / "dense" / "manifest.json", lambda content: content.update(parents=parents))
    assert text_of(run)


def stopped(run: Path, at: int, **content: Any) -> None:
    """Stage seed of 1,000 steps, ended at step ``at``."""
    lines = (run / "seed" / "metrics.jsonl").read_text().splitlines()[:at]
    (run / "seed" / "metrics.jsonl").write_text("\n".join(lines))
    change(run / "seed" / "manifest.json", lambda manifest: manifest.update(steps=1000, **content))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("stopped", "stopped at step 250 of 1,000"),
        ("failed", "failed at step 250 of 1,000"),
        ("running", "not finished, at step 250 of 1,000"),
        ("started by hand", "not finished, at step 250 of 1,000"),
    ],
)
def test_an_unfinished_stage_counts_as_far_as_it_went(
    status: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    stopped(run, 250, status=status, seconds=32.0)
    assert report.main([str(run)]) == 0
    assert f"Stage seed is unfinished: {said}." in capsys.readouterr().out
    found = json.loads((run / "report" / "results.json").read_text())
    assert found["curves"]["seed"]["x"][-1] == 256_000  # of 1,024,000
    text = (run / "report" / "report.md").read_text()
    assert f"| seed ({said}) | data | 256,000 | 32.0 | 8,000 | 711 G |" in text
    assert f"Stage seed is unfinished: {said}." in text.split("## Facts")[0]


def test_a_finished_stage_is_finished_whatever_it_logged_last(tmp_path: Path) -> None:
    """A log interval of 7 says nothing of the last steps; the checkpoint of a script's run does."""
    run = make_run(tmp_path)
    stopped(run, 994, status="finished")
    assert read_run(run).marked == ()
    stopped(run, 994, status="started by hand")
    assert "Stage seed is unfinished: not finished, at step 994 of 1,000." in read_run(run).marked[0]
    (run / "seed" / "checkpoint").mkdir()
    (run / "seed" / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("1000\n")
    assert read_run(run).marked == ()
    assert results(run)["curves"]["seed"]["x"][-1] == 994 * 1024


def test_a_stage_that_starts_again_is_said_beside_what_was_made_before(tmp_path: Path) -> None:
    run = fingerprinted(make_run(tmp_path))
    change(run / "finetune" / "manifest.json", lambda content: content.update(status="stopped", steps=9_000))
    assert "Made before finetune started again: evaluate-moe." in read_run(run).marked


def soft(content: dict[str, Any]) -> None:
    content["models"]["btx"]["routing"] = {domain: [[1.0] * 4] * 4 for domain in DOMAINS}


@pytest.mark.usefixtures("undrawn")
def test_equal_shares_have_no_largest(tmp_path: Path) -> None:
    """Under soft routing every expert takes every token."""
    content = evaluation()
    soft(content)
    page = (build_report(write_evaluation(tmp_path, content)).folder / "report.md").read_text()
    said = "btx: the expert of the domain's own name gets the largest share in 0 of 12 (domain, layer) cells."
    assert f"{said} In 12 no single expert does: the largest shares are equal." in page
    assert "mix: the expert of the domain's own name" in page and page.count("no single expert") == 1


def test_a_tie_for_the_lowest_loss_names_both(tmp_path: Path) -> None:
    from megatron_btx.report.figures import say_lowest_loss

    content = evaluation()
    content["models"]["btx"]["losses"] = content["models"]["dense"]["losses"] = dict.fromkeys(DOMAINS, 1.0)
    data = make_study([read_run(write_evaluation(tmp_path, content))], "")
    assert say_lowest_loss(data.cast, data.lines).endswith("models: btx and dense, 1.000")


def test_what_the_average_and_the_dense_model_are_is_read_from_the_manifests(tmp_path: Path) -> None:
    """Also when the seed is no part of the average, and when the dense model had fewer tokens."""
    run = fingerprinted(make_run(tmp_path))
    change(run / "average" / "manifest.json", lambda content: content.update(settings={"experts": ["math", "code"]}))
    text = text_of(run)
    assert "average: plain average of math, code;" in text and "seed included" not in text
    assert "0.030 above the dense model trained on as many tokens of each domain." in text
    assert "then on that of finetuning, with as many tokens of each domain." in text
    data = read_run(run)
    assert data.tokens_after_seed(BTX) == data.tokens_after_seed(DENSE) == 1_996_800
    change(run / "expert-math" / "manifest.json", lambda content: content.update(status="stopped", steps=9_000))
    assert read_run(run).tokens_after_seed(BTX) is None
    change(run / "expert-math" / "manifest.json", lambda content: content.update(status="finished"))
    change(run / "dense-domains" / "manifest.json", lambda content: content.update(tokens=900_000))
    text = text_of(run)
    assert "dense model, which had 1,975,200 tokens after the seed, the mixture and its experts 1,996,800." in text
    change(run / "mix" / "manifest.json", lambda content: content.update(settings={"experts": [*EXPERTS, "given"]}))
    text = text_of(run)
    assert "0.030 above the dense model." in text and "as many tokens of each domain" not in text


@pytest.mark.usefixtures("undrawn")
def test_the_last_line_is_a_path_from_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run calls it as ``report .`` in its own directory, and shows what it prints to somebody elsewhere."""
    run = write_evaluation(tmp_path, evaluation())
    monkeypatch.chdir(run)
    assert report.main(["."]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run.resolve() / 'report' / 'index.html'}"


def test_steps_of_a_stage_come_from_its_configuration_where_the_manifest_has_none(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "metrics.jsonl").write_text('{"iteration": 3, "lm loss": 1.0}\n')
    write_json(tmp_path / "seed" / "manifest.json", {"status": "stopped"})
    (tmp_path / "seed" / "config.yaml").write_text("iterations: 9\nflags: {seq-length: 8, global-batch-size: two}\n")
    stage = read_stage(tmp_path / "seed")
    assert stage is not None and stage.unfinished == "stopped at step 3 of 9" and stage.tokens_per_iteration is None
