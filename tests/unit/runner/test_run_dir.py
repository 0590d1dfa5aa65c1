"""The files of a run: one tolerance for torn lines, and odd values that hide nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.runner import run_dir as directory
from megatron_btx.runner.schemas import StageManifest


def test_torn_lines_are_passed_over_by_both_readers(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": step, "lm loss": 1.0 / step, "a/b": step}) for step in range(1, 60)]
    file.write_text("\n".join([*lines, "[1]", '{"iteration": true}', '{"iteration": 60, "lm lo']))
    everything = directory.read_metrics(file)
    assert [line.iteration for line in everything] == list(range(1, 60))
    assert everything[1].loss == 0.5 and dict(everything[1].numbers()) == {"a/b": 2}
    assert directory.parse_metrics(directory.read_end(file).splitlines()[-8:]) == everything[-5:]
    file.write_text("torn\n")
    assert directory.parse_metrics(["torn"]) == []
    with pytest.raises(InputError, match="none of its 1 lines"):
        directory.read_metrics(file)


def test_steps_that_were_lost_and_steps_that_were_skipped_leave_nothing(tmp_path: Path) -> None:
    """A kill at step 9 with a checkpoint of step 4: until 9 is reached again, 7 to 9 are of nobody."""
    file = tmp_path / "metrics.jsonl"
    steps = [(step, 10.0, 0.0) for step in range(1, 10)] + [(5, 2.0, 0.0), (6, math.nan, 1.0), (7, 3.0, 0.0)]
    lines = [{"iteration": step, "lm loss": loss, "skipped": skipped} for step, loss, skipped in steps]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = directory.read_metrics(file)
    assert [line.iteration for line in found] == [1, 2, 3, 4, 5, 5, 6, 7]
    assert [line.loss for line in found[5:]] == [2.0, None, 3.0]
    assert dict(found[6].numbers())["skipped"] == 1.0


def test_an_odd_value_of_a_manifest_is_none_and_hides_no_other(tmp_path: Path) -> None:
    content = {
        "stage": "a",
        "status": ["odd"],
        "steps": True,
        "tokens": 10**400,
        "seconds": 2,
        "parents": ["b"],
        "x": 1,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    manifest = directory.read_stage_manifest(tmp_path)
    assert manifest is not None and manifest.model_extra == {"x": 1}
    assert manifest == StageManifest(stage="a", seconds=2, parents={"b": None}, x=1)  # type: ignore[call-arg]


def test_a_model_that_is_no_evaluation_is_named(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text('{"models": {"seed": {"losses": {"math": NaN}, "tokens": {"math": 5}}}, "experts": null}')
    assert directory.read_evaluation(file).models["seed"].tokens == {"math": 5}
    file.write_text('{"models": {"seed": {"losses": {"math": "low"}}}}')
    with pytest.raises(InputError, match=r"evaluation\.json: model 'seed' is not in the form .*losses\.math"):
        directory.read_evaluation(file)
