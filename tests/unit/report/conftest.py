"""A finished run with its report, made once: drawing takes most of these tests' time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.report.example_run import build_report, make_run


@pytest.fixture(scope="package", autouse=True)
def coarse_figures() -> Iterator[None]:
    """Most tests are not about pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_btx.report.style.DOTS_PER_INCH", 20)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is said: figures are put together and not drawn, which takes a second each time."""
    monkeypatch.setattr("megatron_btx.report.style.to_png", lambda figure: b"PNG of a figure")
    monkeypatch.setattr("megatron_btx.report.style.to_pdf", lambda figure: b"PDF of a figure")


@pytest.fixture(scope="package")
def reported_once(coarse_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be read."""
    run = make_run(tmp_path_factory.mktemp("reported"))
    build_report(run)
    return run


@pytest.fixture
def reported(reported_once: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(reported_once, tmp_path / reported_once.name))
