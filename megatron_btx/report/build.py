"""The report of a run: ``btx report RUN`` writes RUN/report/ from what the stages left behind, and prints its core.

It reports and does not judge: the exit status is 0 whether or not the facts hold, unless ``--require-facts`` asks for
them. The report of an ablation has no facts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.common.errors import InputError, exits_with_one_line, printable
from megatron_btx.recipe.names import REPORT_STAGE
from megatron_btx.report.ablation import report_ablation
from megatron_btx.report.ablation_outcomes import is_ablation
from megatron_btx.report.blocks import Block, Paragraph, make_bullets
from megatron_btx.report.datasets import name_path
from megatron_btx.report.facts import Claims, make_claims
from megatron_btx.report.inputs import Model, RunData, read_run
from megatron_btx.report.pages import Files, Report, print_blocks, write_report
from megatron_btx.report.sections import (
    CURVES_FIGURE,
    LOSSES_FIGURE,
    ROUTING_FIGURE,
    describe_difference,
    facts_table,
    losses_table,
    make_sections,
)
from megatron_btx.report.stages import LossCurve, make_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILES = Files("index.html", "report.md", "results.json", (LOSSES_FIGURE, CURVES_FIGURE, ROUTING_FIGURE))


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the report of a run, and print its table and its facts."""
    parser = argparse.ArgumentParser(prog="btx report", description="Write the report of a run, and print its facts.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/quickstart")
    parser.add_argument("--require-facts", action="store_true", help="exit with 1 when a fact is false")
    arguments = parser.parse_args(argv)
    if arguments.require_facts and is_ablation(arguments.run):
        raise InputError(f"--require-facts: {arguments.run} is an ablation, which has no facts; leave it out")
    report = build_report(arguments.run)
    print_core(report)
    return int(arguments.require_facts and any(fact.holds is False for fact in report.facts))


def build_report(run: Path) -> Report:
    """Write ``run``/report/ from the files of its stages; raises InputError as :func:`make_report` does.

    Files of the report folder that are not the report's own are left alone, and all of them after an error.
    """
    report = make_report(run)
    write_report(report)
    return report


def make_report(run: Path) -> Report:
    """The report of a run, not written yet. Raises InputError when it is none, or a file in it is broken."""
    if is_ablation(run):
        return report_ablation(run)
    data = read_run(run)
    claims = make_claims(data)
    curves = [make_curve(stage) for stage in data.stages if stage.curve]
    return Report(
        f"Branch-Train-MiX report: {data.name}",
        make_sections(data, claims),
        run / REPORT_STAGE,
        _FILES,
        lambda: _draw(data, curves),
        _number_results(data, claims, curves),
        _printed_blocks(data, claims),
        claims.facts,
    )


def print_core(report: Report) -> None:
    """Print the core of a report, and where all of it lies."""
    print_blocks(report.printed)
    # From wherever the reader stands: a run calls this in its own directory, and repeats the line to its caller.
    print(f"report: {printable(str(report.page.resolve()))}")


def _draw(data: RunData, curves: list[LossCurve]) -> dict[str, Figure]:
    from megatron_btx.report.figure_curves import draw_curves
    from megatron_btx.report.figures import draw_losses, draw_routing, make_palette

    palette = make_palette(data.models, data.stages)
    figures: dict[str, Figure] = {}
    if data.domains:
        figures[LOSSES_FIGURE] = draw_losses(list(data.models.values()), data.domains, palette, data.on_split)
    if curves:
        figures[CURVES_FIGURE] = draw_curves(curves, palette)
    if data.mixtures():
        figures[ROUTING_FIGURE] = draw_routing(data.mixtures(), palette)
    return figures


def _printed_blocks(data: RunData, claims: Claims) -> tuple[Block, ...]:
    """The table of losses and the facts, for a terminal."""
    blocks: list[Block] = []
    if data.domains:
        blocks.append(Paragraph(f"loss{data.on_split}, nats per token (lower is better; * lowest of its column)"))
        blocks.append(losses_table(data, claims))
    else:
        blocks.append(Paragraph("no model was evaluated: no losses to show"))
    blocks += describe_difference(data, claims)
    return (*blocks, *make_bullets(data.marked), facts_table(claims.facts))


def _number_results(data: RunData, claims: Claims, curves: list[LossCurve]) -> dict[str, object]:
    """Every number of the report: for results.json."""
    numbered_curves = {}
    for curve in curves:
        numbered_curves[curve.stage] = {"unit": curve.unit, "x": curve.x, "loss": curve.loss, "smooth": curve.smooth}
    stages = {}
    models = {name: _number_model(model, data.domains) for name, model in data.models.items()}
    for stage in data.stages:
        stages[stage.name] = stage.written
        if stage.written and isinstance(stage.written.get("inputs"), list):
            stages[stage.name] = {**stage.written, "inputs": list(map(name_path, stage.written["inputs"]))}
    return {
        "run": data.name,
        "domains": data.domains,
        "models": models,
        "btx_minus_dense": _number_difference(claims.difference),
        "tokens_after_the_seed": claims.budgets._asdict(),
        "facts": claims.facts,
        "stages": stages,
        "curves": numbered_curves,
        "datasets": data.datasets.rows,
        "sources": data.datasets.sources,
        "notes": [*data.marked, *data.notes],
    }


def _number_difference(difference: Mapping[str | None, float | None] | None) -> dict[str, object] | None:
    if difference is None:
        return None
    domains = {domain: value for domain, value in difference.items() if domain is not None}
    return {"mean": difference[None], "domains": domains}


def _number_model(model: Model, domains: tuple[str, ...]) -> dict[str, object]:
    return {
        "losses": model.losses,
        "mean_loss": model.mean_loss(domains),
        "tokens": model.tokens,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "experts": model.experts or None,
        "routing": model.routing,
    }


if __name__ == "__main__":
    sys.exit(main())
