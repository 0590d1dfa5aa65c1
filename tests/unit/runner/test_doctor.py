"""``btx doctor``: what is needed and missing ends with status 2 and a remedy; what is not needed does not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_btx import doctor
from megatron_btx.doctor import GOOD, NOTE, WRONG, Finding


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.mark.parametrize(
    ("requirement", "found"),
    [("no-such-package>=1", "missing"), ("numpy<1", importlib.metadata.version("numpy"))],
)
def test_a_need_that_is_not_met(requirement: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [requirement, 'pytest<0; extra == "dev"'])
    wrongs = [finding for finding in doctor.look_at_packages() if finding.state == WRONG]
    assert [finding.found for finding in wrongs] == [found]
    assert "bash tools/environment.sh" in wrongs[0].remedy


def test_everything_that_pyproject_asks_for_is_looked_at() -> None:
    found = by_name(list(doctor.look_at_packages()))
    assert {"torch", "megatron-core", "numpy", "sentencepiece", "transformers"} <= found.keys()


def test_an_image_with_a_prerelease_of_torch_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.10,<2.16"])
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.13.0a0+9186a08b2c.nv26.07")
    assert by_name(list(doctor.look_at_packages()))["torch"].state == GOOD


def test_login_node_with_an_engine_that_cannot_be_loaded(tmp_path: Path) -> None:
    """No GPU is visible, Transformer Engine is installed and fails as it does there: a note, and status 0."""
    engine = tmp_path / "transformer_engine"
    engine.mkdir()
    (engine / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-m", "megatron_btx.cli", "doctor", "--json"]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    rows = {row["name"]: row for row in answer["findings"]}
    assert answer["healthy"]
    assert rows["transformer-engine"]["state"] == "note"
    assert "libcuda.so.1" in rows["transformer-engine"]["found"]
    assert rows["apex"]["state"] == "absent"


def look_at_gpus(monkeypatch: pytest.MonkeyPatch, gpus: list[str], engine: str | None = None) -> dict[str, Finding]:
    """What is found where the driver has GPUs, and torch sees these."""
    modules = {"transformer_engine.pytorch": engine, "amp_C": None, "flash_attn": None}
    facts = {"version": "2.13", "cuda": "13.0", "nccl": "2.27", "gpus": gpus, "modules": modules}
    monkeypatch.setattr(doctor, "ask_torch", lambda: (facts, ""))
    monkeypatch.setattr(doctor, "has_driver", lambda: True)
    return by_name(list(doctor.look_at_gpus()))


def test_an_engine_that_cannot_be_loaded_is_wrong_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look_at_gpus(monkeypatch, ["H100, 80 GiB"], "ImportError: undefined symbol")["transformer-engine"]
    assert found.state == WRONG
    assert found.remedy


def test_torch_that_does_not_see_the_drivers_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert look_at_gpus(monkeypatch, [])["GPUs"].state == WRONG
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert look_at_gpus(monkeypatch, [])["GPUs"].state == NOTE
    assert look_at_gpus(monkeypatch, ["H100, 80 GiB"] * 8)["GPUs"].found == "8 x H100, 80 GiB"


def test_a_probe_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "megatron_btx.no_such_module")
    wrongs = [finding for finding in doctor.look_at_gpus() if finding.state == WRONG]
    assert [finding.name for finding in wrongs] == ["torch"]
    assert "no_such_module" in wrongs[0].found


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    found = doctor.look_at_folder()
    assert found.state == WRONG and "TMPDIR" in found.remedy


def test_status_and_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "look_at_packages", lambda: [Finding("python", "3.12.1, /usr/bin/python")])
    monkeypatch.setattr(doctor, "look_at_gpus", lambda: [Finding("torch", "missing", WRONG, "install it")])
    assert doctor.main([]) == 2
    printed = capsys.readouterr().out
    assert "install it" in printed
    assert printed.splitlines()[-1] == "not well: torch"
    monkeypatch.setattr(doctor, "look_at_gpus", list)
    assert doctor.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "well"
