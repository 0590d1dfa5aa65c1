"""``btx report RUN [RUN ...]``: what the stages of a run left behind, written to RUN/report/, and its core printed.

A plain run has one model of each role; an ablation has variants of the finetuned mixture over several seeds. Several
runs are shown side by side, in the report folder of the first, beside its own report.

It reports and does not judge: the exit status is 0 whether or not the facts hold, unless ``--require-facts`` asks for
them. An ablation has no facts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.common.errors import InputError, exits_with_one_line, printable
from megatron_btx.recipe.names import ABLATION_REPORT_FILE, REPORT_FILE, REPORT_STAGE
from megatron_btx.report.inputs import RunData, name_path, read_run
from megatron_btx.report.models import BASELINES, BTX, DENSE, Difference, Model, differences_to
from megatron_btx.report.pages import Report, print_blocks, write_report
from megatron_btx.report.sections import FIGURES, Study, make_sections, make_study, printed_blocks
from megatron_btx.report.stages import MEAN, Stage, make_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the report of runs, and print its tables and facts."""
    parser = argparse.ArgumentParser(
        prog="btx report", description="Write the report of a run, or of several side by side, and print its facts."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument("--require-facts", action="store_true", help="exit with 1 when a fact is false")
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.runs)
    for run in runs:
        if arguments.require_facts and run.variants():
            raise InputError(f"--require-facts: {run.name} is an ablation, which has no facts; leave it out")
    report = make_report_of(runs, arguments.runs[0])
    write_report(report)
    print_core(report)
    return int(arguments.require_facts and report.is_refuted)


def build_report(*runs: Path) -> Report:
    """Write the report of runs into the folder of the first; raises InputError as :func:`make_report` does.

    Files of the report folder that are not the report's own are left alone, and all of them after an error.
    """
    report = make_report(*runs)
    write_report(report)
    return report


def make_report(*runs: Path) -> Report:
    """The report of runs, not written yet. Raises InputError when one is none, or a file in it is broken."""
    return make_report_of(read_runs(runs), runs[0])


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """What the runs left behind. Raises InputError when two have one name, which nothing could tell apart."""
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: two of the runs have this name; give runs of different names")
    return runs


def make_report_of(runs: Sequence[RunData], first: Path) -> Report:
    """The report of what was read; it is written into the run directory ``first``."""
    run = runs[0]
    title, stem, prefix = f"Branch-Train-MiX report: {run.name}", REPORT_FILE.removesuffix(".md"), ""
    page = "index.html"
    if len(runs) > 1:
        title = f"Branch-Train-MiX: {', '.join(one.name for one in runs)}"
        stem, prefix, page = "comparison", "comparison-", "comparison.html"
    elif run.variants():
        stem = ABLATION_REPORT_FILE.removesuffix(".md")
        title, prefix, page = "Ablation", "ablation-", "ablation.html"
    study = make_study(runs, prefix)

    def draw() -> dict[str, Figure]:
        from megatron_btx.report.figures import draw_figures

        return draw_figures(study)

    return Report(
        title,
        make_sections(study),
        first / REPORT_STAGE,
        page,
        f"{stem}.md",
        tuple(f"{prefix}{name}" for name in FIGURES),
        draw,
        _number_files(study, stem),
        printed_blocks(study),
        any(fact.holds is False for fact in study.all_facts()),
    )


def print_core(report: Report) -> None:
    """Print the core of a report, and where all of it lies."""
    print_blocks(report.printed)
    # From wherever the reader stands: a run calls this in its own directory, and repeats the line to its caller.
    print(f"report: {printable(str((report.folder / report.page).resolve()))}")


def _number_files(study: Study, stem: str) -> dict[str, Any]:
    """The files of numbers: of an ablation also its variants alone, of several runs all of them."""
    if len(study.runs) > 1:
        return {f"{stem}.json": {"runs": {run.name: _number_run(run, study) for run in study.runs}}}
    run = study.runs[0]
    files: dict[str, Any] = {"results.json": _number_run(run, study)}
    if run.variants():
        files[f"{stem}.json"] = _number_variants(run)
    return files


def _number_run(run: RunData, study: Study) -> dict[str, Any]:
    """Every number of a run's report."""
    numbered_curves = {}
    for curve in (make_curve(stage) for stage in run.stages if stage.curve):
        numbered_curves[curve.stage] = {"unit": curve.unit, "x": curve.x, "loss": curve.loss, "smooth": curve.smooth}
    tokens = {f"{BTX}_tokens": run.tokens_after_seed(BTX), f"{DENSE}_tokens": run.tokens_after_seed(DENSE)}
    differences = {}
    for role in BASELINES:
        difference = differences_to(run, role)
        if difference is not None or role == DENSE:
            differences[f"btx_minus_{role.replace('-', '_')}"] = _number_difference(difference)
    return {
        "run": run.name,
        "domains": run.domains,
        "models": {model.name: _number_model(model, run.domains) for model in run.measured},
        "scores": [score.model_dump() for model in run.measured for score in model.scores],
        **differences,
        "tokens_after_the_seed": tokens,
        "facts": study.facts.get(run.name, []),
        "stages": {stage.name: _number_stage(stage) for stage in run.stages},
        "curves": numbered_curves,
        "losses_while_finetuning": {stage.name: stage.watched for stage in run.stages if stage.watched},
        "datasets": run.datasets.rows,
        "sources": run.datasets.sources,
        "notes": [*run.marked, *run.notes],
    }


def _number_stage(stage: Stage) -> Any:
    if stage.written and isinstance(stage.written.get("inputs"), list):
        return {**stage.written, "inputs": list(map(name_path, stage.written["inputs"]))}
    return stage.written


def _number_difference(difference: Difference | None) -> dict[str, object] | None:
    if difference is None:
        return None
    domains = {domain: value for domain, value in difference.items() if domain is not None}
    return {"mean": difference[None], "domains": domains}


def _number_model(model: Model, domains: tuple[str, ...]) -> dict[str, object]:
    return {
        "role": model.role,
        "losses": model.losses,
        "mean_loss": model.mean_loss(domains),
        "tokens": model.tokens,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "experts": model.experts or None,
        "routing": model.routing,
    }


def _number_variants(run: RunData) -> dict[str, dict[str, object]]:
    """Variant -> seed -> its losses and how it loads its experts."""
    variants: dict[str, dict[str, object]] = {}
    for model in run.variants():
        if not model.scores:
            continue
        numbers: dict[str, object] = {"losses": {**model.losses, MEAN: model.mean_loss(run.domains)}}
        if model.stage is not None and model.stage.routing:
            numbers |= model.stage.routing._asdict()
        variants.setdefault(model.label, {})[str(model.row.seed)] = numbers
    return variants


if __name__ == "__main__":
    sys.exit(main())
