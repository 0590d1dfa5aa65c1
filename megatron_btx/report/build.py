"""``btx report RUN [RUN ...]``: what the stages of a run left behind, written to RUN/report/, and its core printed.

A plain run has one model of each role; an ablation has variants of the finetuned mixture over several seeds. Several
runs are shown side by side, in the report folder of the first, beside its own report.

It reports and does not judge: the exit status is 0 whether or not the facts hold, unless ``--require-facts`` asks for
them. An ablation has no facts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError, exits_with_one_line, printable
from megatron_btx.common.files import write_atomically
from megatron_btx.common.manifest import mark
from megatron_btx.recipe.names import ABLATION_REPORT_FILE, REPORT_FILE, REPORT_STAGE
from megatron_btx.report.inputs import RunData, name_path, read_run
from megatron_btx.report.models import BASELINES, BTX, DENSE, differences_to
from megatron_btx.report.pages import Image, Section, print_blocks, to_html, to_json, to_markdown
from megatron_btx.report.sections import Study, make_sections, make_study, printed_blocks
from megatron_btx.report.stages import MEAN, make_curve


@dataclass(frozen=True)
class Report:
    """A report before it is written."""

    study: Study
    title: str
    folder: Path
    """Where it is written: other files there are left alone."""
    page: str
    """Name of the HTML page; the Markdown file stands beside it."""
    text: str
    sections: tuple[Section, ...]
    numbers: Mapping[str, Any]
    """Everything, for programs: file -> its content. All of it is in the first."""


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the report of runs, and print its tables and facts."""
    parser = argparse.ArgumentParser(
        prog="btx report", description="Write the report of a run, or of several side by side, and print its facts."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument("--require-facts", action="store_true", help="exit with 1 when a fact is false")
    arguments = parser.parse_args(argv)
    report = make_report(*arguments.runs)
    for run in report.study.runs:
        if arguments.require_facts and run.variants():
            raise InputError(f"--require-facts: {run.name} is an ablation, which has no facts; leave it out")
    write_report(report)
    print_core(report)
    facts = chain.from_iterable(report.study.facts.values())
    return int(arguments.require_facts and any(fact.holds is False for fact in facts))


def make_report(*paths: Path) -> Report:
    """The report of runs, not written yet; it will lie in the folder of the first.

    Raises:
        InputError: a path is no run, a file in it is broken, or two runs have one name, which nothing could tell apart.
    """
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: two of the runs have this name; give runs of different names")
    title, text, page, prefix = f"Branch-Train-MiX report: {names[0]}", REPORT_FILE, "index.html", ""
    if len(runs) > 1:
        title, text = f"Branch-Train-MiX: {', '.join(names)}", "comparison.md"
    elif runs[0].variants():
        title, text = "Ablation", ABLATION_REPORT_FILE
    stem = Path(text).stem
    if text != REPORT_FILE:
        page, prefix = f"{stem}.html", f"{stem}-"
    study = make_study(runs, prefix)
    claims = {names: [finding.numbers() for finding in found] for names, found in study.findings.items()}
    numbers: dict[str, Any] = {"results.json": {**_number_run(runs[0], study), "claims": claims}}
    if len(runs) > 1:
        numbers = {f"{stem}.json": {"runs": {run.name: _number_run(run, study) for run in runs}, "claims": claims}}
    elif runs[0].variants():
        numbers[f"{stem}.json"] = _number_variants(runs[0])
    return Report(study, title, paths[0] / REPORT_STAGE, page, text, make_sections(study), numbers)


def write_report(report: Report) -> None:
    """Write all files of a report. Everything is made before, so that a failure leaves the earlier one as it was."""
    from megatron_btx.report.figures import FIGURES, make_palette
    from megatron_btx.report.style import to_pdf, to_png

    prefix, palette = report.study.prefix, make_palette(report.study)
    images: dict[str, bytes] = {}
    contents: dict[str, bytes] = {}
    for block in chain.from_iterable(section.blocks for section in report.sections):
        if isinstance(block, Image):
            figure = FIGURES[block.file.removeprefix(prefix)](report.study, palette)
            images[block.file] = to_png(figure)
            contents[f"{Path(block.file).stem}.pdf"] = to_pdf(figure)
    contents |= {**images, **{name: to_json(numbers) for name, numbers in report.numbers.items()}}
    contents[report.text] = to_markdown(report.title, report.sections).encode()
    contents[report.page] = to_html(report.title, report.sections, images).encode()
    mark(report.folder, report.folder.name)
    for name, content in contents.items():
        write_atomically(report.folder / name, content)
    for name in FIGURES:
        if f"{prefix}{name}" not in images:
            for form in (".png", ".pdf"):
                (report.folder / f"{prefix}{name}").with_suffix(form).unlink(missing_ok=True)


def print_core(report: Report) -> None:
    """Print the core of a report, and where all of it lies."""
    print_blocks(printed_blocks(report.study))
    # From wherever the reader stands: a run calls this in its own directory, and repeats the line to its caller.
    print(f"report: {printable(str((report.folder / report.page).resolve()))}")


def _number_run(run: RunData, study: Study) -> dict[str, Any]:
    differences = {}
    for role in BASELINES:
        found = differences_to(run, role)
        if found is not None or role == DENSE:
            differences[f"btx_minus_{role.replace('-', '_')}"] = found and found._asdict()
    stages, curves = {}, {}
    for stage in run.stages:
        stages[stage.name] = stage.written
        if stage.written and isinstance(stage.written.get("inputs"), list):
            stages[stage.name] = {**stage.written, "inputs": list(map(name_path, stage.written["inputs"]))}
        if stage.log.curve:
            curves[stage.name] = make_curve(stage)._asdict()
    models = {}
    for model in run.measured:
        models[model.name] = {
            "role": model.role,
            "losses": model.losses,
            "mean_loss": model.mean_loss(run.domains),
            "tokens": model.tokens,
            "parameters": model.parameters,
            "active_parameters": model.active_parameters,
            "experts": model.experts or None,
            "routing": model.routing,
        }
    return {
        "run": run.name,
        "domains": run.domains,
        "models": models,
        "scores": [score.model_dump() for model in run.measured for score in model.scores],
        **differences,
        "tokens_after_the_seed": {f"{role}_tokens": run.tokens_after_seed(role) for role in (BTX, DENSE)},
        "facts": study.facts.get(run.name, []),
        "stages": stages,
        "curves": curves,
        "losses_while_finetuning": {stage.name: stage.log.watched for stage in run.stages if stage.log.watched},
        "datasets": run.datasets.rows,
        "sources": run.datasets.sources,
        "notes": [*run.marked, *run.notes],
    }


def _number_variants(run: RunData) -> dict[str, dict[str, object]]:
    """Variant -> seed -> its losses and how it loads its experts."""
    variants: dict[str, dict[str, object]] = {}
    for model in run.variants():
        if model.scores:
            numbers: dict[str, object] = {"losses": {**model.losses, MEAN: model.mean_loss(run.domains)}}
            if model.stage is not None and model.stage.log.routing:
                numbers |= model.stage.log.routing._asdict()
            variants.setdefault(model.label, {})[str(model.row.seed)] = numbers
    return variants


if __name__ == "__main__":
    sys.exit(main())
