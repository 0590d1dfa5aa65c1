"""The report of an ablation: variants of finetuning over several seeds, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.recipe.names import REPORT_STAGE
from megatron_btx.report.ablation_outcomes import MEAN, Outcome, Outcomes, losses_over_seeds, read_outcomes
from megatron_btx.report.blocks import Block, Cell, Image, Paragraph, Section, Table, make_bullets, make_row
from megatron_btx.report.pages import Files, Report
from megatron_btx.report.quantities import ABSENT, mean, percent_text, spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES_FIGURE, LOAD_FIGURE = "ablation-losses.png", "ablation-load.png"
_FILES = Files("ablation.html", "ablation.md", "ablation.json", (LOSSES_FIGURE, LOAD_FIGURE))


def report_ablation(run: Path) -> Report:
    """The report of the ablation in the directory ``run``.

    Raises:
        InputError: no ablation's run, or none of its stages has come to its end.
    """
    outcomes = read_outcomes(run)

    def draw() -> dict[str, Figure]:
        from megatron_btx.report.figure_ablation import draw_loads, draw_variants

        return {LOSSES_FIGURE: draw_variants(outcomes.runs, outcomes.on_split), LOAD_FIGURE: draw_loads(outcomes.runs)}

    table = _outcomes_table(outcomes)
    bare = Table(table.header, table.rows)
    printed: tuple[Block, ...] = (bare, Paragraph(_lead(outcomes)), *make_bullets(outcomes.notes))
    sections = _make_sections(outcomes, table)
    return Report("Ablation", sections, run / REPORT_STAGE, _FILES, draw, outcomes.runs, printed)


def find_best(outcomes: Outcomes) -> list[str]:
    """The variants with the lowest mean loss, of those that came to their end on all seeds with finite losses."""
    finite = {}
    for variant, runs in outcomes.runs.items():
        loss = mean(losses_over_seeds(runs, MEAN))
        if outcomes.is_whole(variant) and math.isfinite(loss):
            finite[variant] = loss
    lowest = min(finite.values(), default=math.nan)
    return [variant for variant, loss in finite.items() if loss == lowest]


def _outcomes_table(outcomes: Outcomes) -> Table:
    """A row per variant, with the number of its seeds where some are missing."""
    domains = outcomes.domains()
    rows: list[tuple[Cell, ...]] = []
    for variant, seeds in outcomes.seeds.items():
        runs = outcomes.runs.get(variant, {})
        name = variant
        if not outcomes.is_whole(variant):
            name += f" ({len(runs)} of {len(seeds)} seeds)"
        cells = [ABSENT] * (len(domains) + 3)
        if runs:
            cells = _make_cells(runs, domains)
        rows.append(make_row(name, *cells))
    caption = (
        f"Loss{outcomes.on_split} in nats per token: mean ± sample standard deviation over seeds "
        f"{', '.join(map(str, outcomes.all_seeds()))}. Dead experts: (layer, expert) cells with under 1 % of an even "
        "load over the last logged interval, one number per seed. Load: smallest and largest share of a layer's "
        "choices that an expert got there."
    )
    return Table(("variant", *domains, "dead experts", "load", "dropped"), tuple(rows), caption=caption)


def _make_cells(runs: Mapping[int, Outcome], domains: Sequence[str]) -> list[str]:
    dead, dropped = [], []
    for outcome in runs.values():
        dropped.append(outcome.dropped)
        if outcome.dead is None:
            dead.append(ABSENT)
        else:
            dead.append(str(outcome.dead))
    losses = [spread_text(losses_over_seeds(runs, domain)) for domain in domains]
    return [*losses, ", ".join(dead), _load_range(runs), percent_text(mean(dropped))]


def _load_range(runs: Mapping[int, Outcome]) -> str:
    """The smallest and the largest load of an expert."""
    loads = list(chain.from_iterable(chain.from_iterable(outcome.loads for outcome in runs.values())))
    if any(map(math.isnan, loads)):
        return "NaN"
    return f"{percent_text(min(loads))} to {percent_text(max(loads))}"


def _make_sections(outcomes: Outcomes, table: Table) -> tuple[Section, ...]:
    opening: tuple[Block, ...] = (Paragraph(_lead(outcomes), lead=True), *make_bullets(outcomes.notes), table)
    experts = len(outcomes.first().loads[0])
    losses = Image(LOSSES_FIGURE, "Mean loss per variant", "Points: one seed each. Bars: mean ± deviation.")
    load = Image(
        LOAD_FIGURE,
        "Load per layer and expert of every variant",
        "Share of a layer's choices per expert, mean over seeds; layers from top to bottom. "
        f"{percent_text(1 / experts)} is even.",
    )
    return (Section("", opening), Section("Losses", (losses,)), Section("Load", (load,)))


def _lead(outcomes: Outcomes) -> str:
    best = find_best(outcomes)
    if not best:
        return "No variant came to its end on all of its seeds with losses that are finite numbers."
    lowest = spread_text(losses_over_seeds(outcomes.runs[best[0]], MEAN))
    return f"Lowest mean loss: {' and '.join(best)}, {lowest}{outcomes.on_split}."
