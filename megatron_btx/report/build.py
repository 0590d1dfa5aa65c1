"""The report of a run: report.md, index.html, results.json and the figures, from what its stages left behind.

``python -m megatron_btx.report.build RUN``. It reports and does not judge: the exit status is 0 whether or not the
facts hold, unless ``--require-facts`` asks for them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.ground.errors import InputError, exits_with_one_line
from megatron_btx.ground.files import write_atomically
from megatron_btx.ground.manifest import mark
from megatron_btx.report.ablation_outcomes import is_ablation
from megatron_btx.report.budgets import budgets_of
from megatron_btx.report.facts import Fact, best_per_column, check_facts, difference_to_dense, loss_in, mean_column
from megatron_btx.report.inputs import REPORT_FOLDER, Model, RunData, read_run
from megatron_btx.report.numbers import in_count, in_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_btx.report.figure_curves import Curve

FIGURE_FILES = ("losses.png", "curves.png", "routing.png")
TERMINAL_COLUMNS = 110
FACT_INDENT = " " * len("  not checked  ")


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the report of a run, and print its table and its facts."""
    parser = argparse.ArgumentParser(prog="btx report", description="Write the report of a run, and print its facts.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument("--require-facts", action="store_true", help="exit with 1 when a fact is false")
    arguments = parser.parse_args(argv)
    if is_ablation(arguments.run):
        from megatron_btx.report import ablation as report_ablation

        if arguments.require_facts:
            raise InputError(f"--require-facts: {arguments.run} is an ablation, which has no facts; leave it out")
        return report_ablation.main([str(arguments.run)])
    data = read_run(arguments.run)
    page = _write(arguments.run, data)
    print(summary(data))
    # From wherever the reader stands: a run calls this in its own directory, and repeats the line to its caller.
    print(f"\nreport: {_printable(str(page.resolve()))}")
    unheld = any(fact.holds is False for fact in check_facts(data.models, data.domains))
    return 1 if unheld and arguments.require_facts else 0


def build_report(run: Path) -> Path:
    """Write ``run``/report/ from the files of its stages, and return the path of its index.html.

    Files of the report folder that are not the report's own are left alone. Raises InputError when ``run`` is not a
    run directory or a file in it is broken; the earlier report then stands as it was.
    """
    return _write(run, read_run(run))


def _write(run: Path, data: RunData) -> Path:
    from megatron_btx.report import figure_curves, figures
    from megatron_btx.report import pages as report_pages
    from megatron_btx.report.text import blocks_of, title_of

    curves = [figure_curves.curve_of(stage) for stage in data.stages if stage.curve]
    images = {name: figures.as_png(figure) for name, figure in _draw(data, curves).items()}
    blocks = blocks_of(data, set(images))
    folder = run / REPORT_FOLDER
    mark(folder, REPORT_FOLDER)
    for name in FIGURE_FILES:
        if name in images:
            write_atomically(folder / name, images[name])
        else:
            (folder / name).unlink(missing_ok=True)
    write_atomically(folder / "results.json", report_pages.as_json(results_of(data, curves)))
    write_atomically(folder / "report.md", report_pages.to_markdown(title_of(data), blocks).encode())
    write_atomically(folder / "index.html", report_pages.to_html(title_of(data), blocks, images).encode())
    return folder / "index.html"


def _draw(data: RunData, curves: Sequence[Curve]) -> dict[str, Figure]:
    from megatron_btx.report import figure_curves, figures

    palette = figures.palette_of(data.models, data.stages)
    drawn: dict[str, Figure] = {}
    if data.domains:
        drawn["losses.png"] = figures.draw_losses(list(data.models.values()), data.domains, palette)
    if curves:
        drawn["curves.png"] = figure_curves.draw_curves(curves, palette)
    if mixtures := [model for model in data.models.values() if model.routing]:
        drawn["routing.png"] = figures.draw_routing(mixtures, palette)
    return drawn


def results_of(data: RunData, curves: Sequence[Curve]) -> dict[str, Any]:
    """Every number of the report: for results.json."""
    return {
        "run": data.name,
        "domains": list(data.domains),
        "models": {name: _model_results(model, data.domains) for name, model in data.models.items()},
        "btx_minus_dense": _difference_results(data),
        "tokens_after_the_seed": budgets_of(data.stages)._asdict(),
        "facts": [
            {"name": fact.name, "text": fact.text, "holds": fact.holds, "detail": fact.detail, "numbers": fact.numbers}
            for fact in check_facts(data.models, data.domains)
        ],
        "stages": {stage.name: stage.manifest for stage in data.stages},
        "curves": {
            curve.stage: {"unit": curve.unit, "x": curve.x, "loss": curve.loss, "smooth": curve.smooth}
            for curve in curves
        },
        "corpora": [vars(corpus) for corpus in data.corpora],
        "sources": data.sources,
        "notes": [*data.marked, *data.notes],
    }


def _difference_results(data: RunData) -> dict[str, Any] | None:
    differences = difference_to_dense(data.models, data.domains)
    if differences is None:
        return None
    return {"mean": differences.pop(None), "domains": differences}


def _model_results(model: Model, domains: tuple[str, ...]) -> dict[str, Any]:
    return {
        "losses": model.losses,
        "mean_loss": model.mean_loss(domains),
        "tokens": model.tokens,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "experts": list(model.experts) or None,
        "routing": model.routing,
    }


def summary(data: RunData) -> str:
    """The short table and the facts, for the terminal."""
    lines = [*_loss_lines(data), "", *_dense_lines(data)]
    lines += [line for note in data.marked for line in textwrap.wrap(_printable(note), TERMINAL_COLUMNS)]
    lines += ["", "facts, computed from these numbers:"]
    lines += [line for fact in check_facts(data.models, data.domains) for line in _fact_lines(fact)]
    return "\n".join(lines)


def _loss_lines(data: RunData) -> list[str]:
    if not data.domains:
        return ["no model was evaluated: no losses to show"]
    columns, best = (*data.domains, None), best_per_column(data.models, data.domains)
    # Every cell ends in its mark or a space, so that the digits stay in line.
    rows = [["", *(f"{_column(column, data.domains)} " for column in columns)]]
    for model in data.models.values():
        cells = [_printable(model.name)]
        for column in columns:
            loss = loss_in(model, column, data.domains)
            mark = "*" if loss is not None and loss == best.get(column) else " "
            cells.append(("-" if loss is None else in_digits(loss)) + mark)
        rows.append(cells)
    rows.append(["tokens evaluated", *(f"{_tokens(data, domain)} " for domain in data.domains), ""])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    title = "validation loss, nats per token (lower is better; * lowest of its column)"
    return [title, *(_aligned(cells, widths) for cells in rows)]


def _aligned(cells: list[str], widths: list[int]) -> str:
    name, *numbers = zip(cells, widths, strict=True)
    return (name[0].ljust(name[1]) + "".join(f"  {cell:>{width}}" for cell, width in numbers)).rstrip()


def _tokens(data: RunData, domain: str) -> str:
    counts = sorted({model.tokens[domain] for model in data.models.values() if domain in model.tokens})
    return " / ".join(map(in_count, counts)) or "-"


def _column(column: str | None, domains: tuple[str, ...]) -> str:
    return mean_column(domains) if column is None else _printable(column)


def _dense_lines(data: RunData) -> list[str]:
    differences = difference_to_dense(data.models, data.domains)
    if differences is None:
        return ["BTX - dense: not computed, because btx and dense were not both evaluated"]
    parts = [
        f"{_column(name, data.domains)} {'-' if value is None else in_digits(value, '+')}"
        for name, value in differences.items()
    ]
    return [f"BTX - dense (lower is better for BTX): {', '.join(parts)}"]


def _fact_lines(fact: Fact) -> list[str]:
    detail = fact.detail if fact.holds is not None else f"why: {fact.detail}"
    first, *more = textwrap.wrap(fact.text, TERMINAL_COLUMNS - len(FACT_INDENT))
    more += textwrap.wrap(_printable(detail), TERMINAL_COLUMNS - len(FACT_INDENT))
    return [f"  {fact.verdict:<{len(FACT_INDENT) - 2}}{first}", *(FACT_INDENT + line for line in more)]


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


if __name__ == "__main__":
    sys.exit(main())
