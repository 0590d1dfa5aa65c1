"""The Python API and the table of a plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import megatron_btx
from megatron_btx import cli
from megatron_btx.plan.stage import Stage
from megatron_btx.runner import api

RECIPE = Path(__file__).parents[3] / "examples" / "recipes" / "quickstart.yaml"

pytestmark = pytest.mark.usefixtures("in_quickstart_folder")


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two stages in the place of a recipe's; their scripts."""
    scripts = {"a": "echo 1 > a/out", "b": "cat a/out > b/out"}

    def stages(_: object) -> list[Stage]:
        return [
            Stage("a", ("bash", "-c", scripts["a"]), product="out"),
            Stage("b", ("bash", "-c", scripts["b"]), ("a",), product="out"),
        ]

    monkeypatch.setattr(api, "plan_stages", stages)
    return scripts


def test_a_run_returns_what_its_stages_say_and_prints_nothing(
    cheap: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = api.run(RECIPE, tmp_path / "run", use_gpus=False)
    assert result.directory == tmp_path / "run" and result.report is None
    assert [manifest.status for manifest in result.stages.values()] == ["finished", "finished"]
    assert capfd.readouterr() == ("", "")


def test_a_failed_stage_and_a_changed_one_raise(cheap: dict[str, str], tmp_path: Path) -> None:
    cheap["b"] = "echo error: no such thing; exit 2"
    with pytest.raises(megatron_btx.RunError, match="stage b ended with status 2(?s:.*)no such thing") as failed:
        api.run(RECIPE, tmp_path / "run", use_gpus=False)
    assert failed.value.status == 2
    cheap["a"] = "echo 2 > a/out"
    with pytest.raises(megatron_btx.ChangedStagesError) as changed:
        api.run(RECIPE, tmp_path / "run", use_gpus=False)
    assert list(changed.value.changed) == ["a"]


def test_a_plan_says_what_keep_means_and_counts_no_kept_stage(
    cheap: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.run(RECIPE, tmp_path / "run", use_gpus=False)
    cheap["b"] = "cat a/out a/out > b/out"
    assert cli.main(["plan", str(RECIPE), "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("0 stages to run, 0 tokens")
    assert re.match(
        r"keep: made otherwise, so btx run would stop; name them in --rerun, or .* another --output \(b: ", said[-2]
    )


def test_a_plan_is_a_table_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["plan", str(RECIPE), "--output", str(run)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"seed +│ run +│ train +│ +2 │ +977 │ 1,000,448 │", printed)
    assert "14 stages to run, 4,899,840 tokens to train on, some" in printed and not run.exists()
