"""A report before it is written: its sections, figures and numbers, and the files they go to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.ground.files import write_atomically
from megatron_btx.ground.manifest import mark
from megatron_btx.report.blocks import Block, Section
from megatron_btx.report.facts import Fact
from megatron_btx.report.pages import to_html, to_json, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Files:
    """Names of a report's files in its folder."""

    page: str
    text: str
    numbers: str
    figures: tuple[str, ...]
    """All that it may have; those that a report does not draw are removed."""


@dataclass(frozen=True)
class Report:
    """A report of either kind of run."""

    title: str
    sections: tuple[Section, ...]
    files: Files
    draw: Callable[[], dict[str, Figure]]
    """Draws the figures, by file name. Called once, when the report is written: drawing takes seconds."""
    numbers: object
    """Everything, for programs."""
    printed: tuple[Block, ...]
    """What is shown on a terminal."""
    facts: tuple[Fact, ...] = ()


def write_report(report: Report, folder: Path) -> None:
    """Write all files of a report into ``folder``. Other files there are left alone.

    Everything is made before anything is written, so that a failure leaves the earlier report as it was.
    """
    from megatron_btx.report.style import to_pdf, to_png

    figures = report.draw()
    images = {name: to_png(figure) for name, figure in figures.items()}
    contents = {
        **images,
        **{Path(name).stem + ".pdf": to_pdf(figure) for name, figure in figures.items()},
        report.files.numbers: to_json(report.numbers),
        report.files.text: to_markdown(report.title, report.sections).encode(),
        report.files.page: to_html(report.title, report.sections, images).encode(),
    }
    mark(folder, folder.name)
    for name, content in contents.items():
        write_atomically(folder / name, content)
    for name in report.files.figures:
        if name not in images:
            for form in (".png", ".pdf"):
                (folder / name).with_suffix(form).unlink(missing_ok=True)
