"""``btx doctor``: what is needed and missing ends with status 2 and a remedy; what is not needed does not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_btx.pipeline.doctor import command, gpus, packages, surroundings
from megatron_btx.pipeline.doctor.finding import Finding, State, wrong


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.mark.parametrize(
    ("requirement", "found"),
    [("no-such-package>=1", "missing"), ("numpy<1", importlib.metadata.version("numpy"))],
)
def test_a_need_that_is_not_met(requirement: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [requirement, 'pytest<0; extra == "dev"'])
    wrongs = [finding for finding in packages.look_at_packages() if finding.state is State.WRONG]
    assert [finding.found for finding in wrongs] == [found]
    assert "bash tools/environment.sh" in wrongs[0].remedy


def test_everything_that_pyproject_asks_for_is_looked_at() -> None:
    found = by_name(list(packages.look_at_packages()))
    assert {"torch", "megatron-core", "numpy", "sentencepiece", "transformers"} <= found.keys()
    assert found["megatron dataset helper"].found == "compiled"


def test_an_image_with_a_prerelease_of_torch_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version_of", lambda name: "2.13.0a0+9186a08b2c.nv26.07")
    assert packages._needed("torch>=2.10,<2.16").state is State.GOOD


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
    assert rows["transformer engine"]["state"] == "note"
    assert "libcuda.so.1" in rows["transformer engine"]["found"]
    assert rows["apex"]["state"] == "absent"


def test_an_engine_that_cannot_be_loaded_is_wrong_where_there_is_a_gpu() -> None:
    found = gpus._kernels("transformer engine", "2.20.2", "ImportError: undefined symbol", has_gpu=True)
    assert found.state is State.WRONG
    assert found.remedy


def test_another_package_called_apex_is_named() -> None:
    found = gpus._kernels("apex", "0.9.10", "absent", has_gpu=True)
    assert (found.state, "another package" in found.found) == (State.NOTE, True)


def test_torch_that_does_not_see_the_drivers_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus._gpus_of_torch([], driver_has=True).state is State.WRONG
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus._gpus_of_torch([], driver_has=True).state is State.NOTE
    assert gpus._gpus_of_torch(["H100, 80 GiB"] * 8, driver_has=True).found == "8 x H100, 80 GiB"


def test_a_probe_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "PROBE", "megatron_btx.no_such_module")
    wrongs = [finding for finding in gpus.look_at_gpus() if finding.state is State.WRONG]
    assert [finding.name for finding in wrongs] == ["torch"]
    assert "no_such_module" in wrongs[0].found


def test_slurm_around_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo slurm-wlm 24.05.1; exit; fi\n'
        'printf "gpu*|4|gpu:8|2-00:00:00|96\\ncpu|2|(null)|1:00|8\\n"\n'
    )
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    found = [finding for finding in surroundings.look_around() if finding.part == "slurm"]
    assert found[0].found == "24.05.1"
    assert found[1].found == "gpu*: 4 nodes of 96 cores, gpu:8, limit 2-00:00:00"
    assert found[2].found == "cpu: 2 nodes of 8 cores, limit 1:00"
    assert found[3].found.startswith("job_id 17, job_partition gpu")


def test_folders_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setenv("HF_HOME", "/proc/no-such-folder")
    found = by_name(list(surroundings.look_around()))
    assert found["temporary"].state is State.WRONG
    assert "TMPDIR" in found["temporary"].remedy
    assert found["models' cache"].state is State.NOTE
    assert "HF_HOME" in found["models' cache"].remedy


def test_status_and_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("python", "python", "3.12.1, /usr/bin/python"),
        wrong("packages", "torch", "missing", "install it"),
    ]
    monkeypatch.setattr(command, "look", lambda: findings)
    assert command.main([]) == 2
    printed = capsys.readouterr().out
    assert "-> install it" in printed
    assert printed.splitlines()[-1] == "not well (torch): python 3.12.1; torch missing"
    monkeypatch.setattr(command, "look", lambda: findings[:1])
    assert command.main([]) == 0
