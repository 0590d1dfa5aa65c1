"""Rows suffice: a measure, a claim, a baseline and a second run reach the report without a change to the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.report import build, claims
from megatron_btx.report.inputs import read_run
from megatron_btx.report.models import Cast
from tests.unit.report.example_run import (
    DOMAINS,
    build_report,
    change,
    facts_of,
    make_run,
    results,
    set_loss,
    write_json,
)


def score(model: str, value: float, data: str = "sums") -> dict[str, object]:
    """What an evaluation of tasks would write."""
    parts = {"measure": "accuracy", "data": data, "value": value, "stderr": 0.02, "count": 500, "unit": "share"}
    return {"model": model, **parts}


def better_at_sums(cast: Cast) -> claims.Verdict:
    """The seed's accuracy against the mixture's."""
    mixture, seed = cast.need("btx", "seed")
    pairs = {}
    for task, value in mixture.values("accuracy").items():
        pairs[task] = claims.Pair(seed.values("accuracy").get(task), value)
    return claims.every_lower(pairs)


def test_a_measure_and_a_claim_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Scores of a stage that nothing knows, and one row; they stand in the table, the facts and results.json."""
    run = make_run(tmp_path)
    scores = [score("btx", 0.75), score("seed", 0.5), score("btx", 0.25, "words")]
    write_json(run / "evaluate-tasks" / "evaluation.json", {"models": {}, "scores": scores})
    toy = claims.Claim("better_at_sums", "The mixture adds better than the seed.", better_at_sums)
    monkeypatch.setattr(claims, "CLAIMS", [*claims.CLAIMS, toy])
    assert build.main([str(run), "--require-facts"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    text = (run / "report" / "report.md").read_text()
    table = text.split("## Accuracy")[1].split("## ")[0]
    assert "| btx | 0.750 | 0.250 | 0.500 |" in table and "| seed | 0.500 | – | – |" in table and "share" in table
    assert "btx 0.750 0.250 0.500" in printed and "not checked The mixture adds better than the seed." in printed
    found = json.loads((run / "report" / "results.json").read_text())
    assert facts_of(found)["better_at_sums"] is None  # words of the seed are missing
    assert score("btx", 0.75) in found["scores"]
    assert found["models"]["btx"]["losses"]["math"] == 0.879
    change(
        run / "evaluate-tasks" / "evaluation.json", lambda content: content["scores"].append(score("seed", 0, "words"))
    )
    assert facts_of(results(run))["better_at_sums"] is True


def test_a_score_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for stage in ("evaluate-a", "evaluate-b"):
        write_json(run / stage / "evaluation.json", {"models": {}, "scores": [score("btx", 0.75)]})
    with pytest.raises(InputError, match=r"evaluate-b/evaluation.json: model 'btx' is in .*evaluate-a"):
        read_run(run)


def test_a_baseline_that_was_finetuned_is_compared_in_the_headline(tmp_path: Path) -> None:
    """It is a row of the table of models; without it and a dense model the report says what is missing."""
    run = make_run(tmp_path)
    (run / "evaluate-dense" / "evaluation.json").unlink()
    for name in ("evaluate-moe", "evaluate-experts"):
        assert (run / name).is_dir()

    def lead() -> str:
        return build.make_report(run).sections[0].blocks[0].text

    assert "nothing finetuned stands beside it" in lead()
    losses = dict.fromkeys(DOMAINS, 3.0)
    write_json(run / "evaluate-tuned" / "evaluation.json", {"models": {"tuned": {"losses": losses}}})
    rows = [{"name": name, "role": name} for name in ("seed", "mix", "btx")]
    rows += [{"name": f"expert-{home}", "role": "expert", "home": home} for home in ("math", "code", "knowledge")]
    rows += [{"name": "tuned", "role": "average-finetuned", "meaning": "the average, tuned for as long"}]
    write_json(run / "models.json", rows)
    assert lead().endswith("the mixture is 0.604 below the average, finetuned as the mixture was.")
    found, text = results(run), build.make_report(run).sections
    assert found["btx_minus_average_finetuned"]["mean"] == pytest.approx(2.39575 - 3)
    caption = next(section for section in text if section.title == "Loss").blocks[0].caption
    assert "tuned: the average, tuned for as long" in caption
    assert [model.name for model in read_run(run).measured][4:] == ["mix", "btx", "tuned"]


def test_an_expert_is_known_by_the_table_and_not_by_its_name(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    change(
        run / "evaluate-experts" / "evaluation.json", lambda of: of["models"].update(m=of["models"].pop("expert-math"))
    )
    rows = [{"name": "m", "role": "expert", "home": "math", "stage": "expert-math"}, {"name": "seed", "role": "seed"}]
    write_json(run / "models.json", rows)
    fact = next(fact for fact in results(run)["facts"] if fact["name"] == "experts_gain_at_home")
    assert fact["holds"] is True and "math 0.886 against 1.654" in fact["detail"]


def test_several_runs_stand_side_by_side(tmp_path: Path, capsys, request: pytest.FixtureRequest) -> None:
    """Every row with its run's name; facts of each; in the folder of the first, beside its own report."""
    first = make_run(tmp_path / "a")
    second = Path(shutil.copytree(first, tmp_path / "second"))
    change(second / "evaluate-moe" / "evaluation.json", set_loss("btx", "general", 4.5))
    assert build.main([str(first), str(second)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "btx (quickstart) 3.964" in printed and "btx (second) 4.500" in printed
    assert "9. Freezing the experts costs nothing." in printed, "claims are tested on several runs"
    assert "second: The finetuned mixture beats the seed" in printed and "quickstart: btx - dense -0.031" in printed
    request.getfixturevalue("undrawn")  # once is enough
    assert build.main([str(first), str(second), "--require-facts"]) == 1
    folder = first / "report"
    assert {path.name for path in folder.glob("*.png")} == {"comparison-losses.png", "comparison-finetuning.png"}
    found = json.loads((folder / "comparison.json").read_text())["runs"]
    alone = results(first)
    assert list(alone.pop("claims")) == ["quickstart"]
    assert found["quickstart"] == alone and found["second"]["models"]["btx"]["losses"]["general"] == 4.5
    text = (folder / "comparison.md").read_text()
    assert "**second: The finetuned mixture reaches a mean loss" in text and "| second | 5,017,600" in text
    build_report(first)
    assert {"comparison.html", "index.html", "results.json"} <= {path.name for path in folder.iterdir()}
    with pytest.raises(InputError, match="quickstart: two of the runs have this name"):
        build.make_report(first, first)
