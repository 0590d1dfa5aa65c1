"""The report of an ablation: a table of its variants over their seeds, and two figures.

``python -m megatron_btx.report.ablation RUN`` writes RUN/report/{ablation.md, ablation.html, *.png, *.json} from
the metrics of its finetuning stages.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.ground.errors import exits_with_one_line, printable
from megatron_btx.ground.files import write_atomically
from megatron_btx.ground.manifest import mark
from megatron_btx.report.ablation_outcomes import MEAN, Outcome, Outcomes, read_outcomes
from megatron_btx.report.inputs import REPORT_FOLDER
from megatron_btx.report.numbers import in_digits, mean, total, usable
from megatron_btx.report.pages import (
    Block,
    Bullets,
    Heading,
    Image,
    Paragraph,
    Table,
    as_json,
    row,
    to_html,
    to_markdown,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Runs = Mapping[str, Mapping[int, Outcome]]
ABSENT = "–"
CELLS_WRITTEN = 80
"""Up to so many cells of a load have their number in the figure; more would lie over each other."""


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the report of an ablation and print its table."""
    from megatron_btx.report.figures import as_png

    parser = argparse.ArgumentParser(prog="btx report", description="Write the report of an ablation.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/ablation-tiny")
    arguments = parser.parse_args(argv)
    outcomes = read_outcomes(arguments.run)
    images = {name: as_png(figure) for name, figure in _figures(outcomes.runs).items()}
    title, blocks = "Ablation", blocks_of(outcomes)
    files = {"ablation.html": to_html(title, blocks, images).encode(), **images}
    files["ablation.json"] = as_json(results_of(outcomes))
    files["ablation.md"] = to_markdown(title, blocks).encode()
    folder = arguments.run / REPORT_FOLDER
    mark(folder, folder.name)
    for name, content in files.items():
        write_atomically(folder / name, content)
    print("\n".join([_printed(outcomes), *outcomes.notes]))
    print(f"\nreport: {printable(str((folder / 'ablation.html').resolve()))}")
    return 0


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan for the latter of one value, and of values that are not all finite."""
    average = mean(values)
    if len(values) < 2 or not math.isfinite(average):
        return average, math.nan
    squares = total((value - average) * (value - average) for value in values)
    return average, math.sqrt(squares / (len(values) - 1))


def best_of(outcomes: Outcomes) -> list[str]:
    """The variants with the lowest mean loss, of those that came to their end on all seeds with finite losses."""
    means = {variant: _mean_loss(runs) for variant, runs in outcomes.runs.items() if outcomes.is_whole(variant)}
    finite = {variant: loss for variant, loss in means.items() if math.isfinite(loss)}
    return [variant for variant, loss in finite.items() if loss == min(finite.values())]


def _mean_loss(runs: Mapping[int, Outcome]) -> float:
    return mean(outcome.losses[MEAN] for outcome in runs.values())


def _with_error(values: Sequence[float]) -> str:
    average, deviation = spread(values)
    return in_digits(average) if math.isnan(deviation) else f"{in_digits(average)} ± {in_digits(deviation)}"


def _domains(outcomes: Outcomes) -> list[str]:
    first = next(iter(next(iter(outcomes.runs.values())).values()))
    return [*(domain for domain in first.losses if domain != MEAN), MEAN]


def _rows(outcomes: Outcomes, domains: Sequence[str]) -> list[list[str]]:
    """The table: a row per variant, with the number of its seeds where some are missing."""
    rows = []
    for variant, seeds in outcomes.seeds.items():
        runs = outcomes.runs.get(variant, {})
        name = variant if outcomes.is_whole(variant) else f"{variant} ({len(runs)} of {len(seeds)} seeds)"
        rows.append([name, *(_cells(runs, domains) if runs else [ABSENT] * (len(domains) + 3))])
    return rows


def _cells(runs: Mapping[int, Outcome], domains: Sequence[str]) -> list[str]:
    loads = [load for outcome in runs.values() for layer in outcome.loads for load in layer]
    dead = [ABSENT if outcome.dead is None else str(outcome.dead) for outcome in runs.values()]
    losses = [_with_error([outcome.losses[domain] for outcome in runs.values()]) for domain in domains]
    load = "NaN" if any(map(math.isnan, loads)) else f"{_percent(min(loads))} to {_percent(max(loads))}"
    return [*losses, ", ".join(dead), load, _percent(mean(outcome.dropped for outcome in runs.values()))]


def _percent(share: float) -> str:
    return f"{share:.1%}" if usable(share) else in_digits(share)


def _header(domains: Sequence[str]) -> list[str]:
    return ["variant", *domains, "dead experts", "load", "dropped"]


def blocks_of(outcomes: Outcomes) -> list[Block]:
    """The report's text."""
    domains = _domains(outcomes)
    rows = tuple(row(*cells) for cells in _rows(outcomes, domains))
    seeds = sorted({seed for of in outcomes.seeds.values() for seed in of})
    caption = (
        f"Validation loss in nats per token: mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}. "
        "Dead experts: (layer, expert) cells with under 1 % of an even load over the last logged interval, one number "
        "per seed. Load: smallest and largest share of a layer's choices that an expert got there."
    )
    experts = len(next(iter(next(iter(outcomes.runs.values())).values())).loads[0])
    return [
        Paragraph(_lead(outcomes), lead=True),
        *([Bullets(outcomes.notes)] if outcomes.notes else []),
        Table(tuple(_header(domains)), rows, caption=caption),
        Heading("Losses"),
        Image(
            "ablation-losses.png", "Mean validation loss per variant", "Points: one seed each. Bars: mean ± deviation."
        ),
        Heading("Load"),
        Image(
            "ablation-load.png",
            "Load per layer and expert of every variant",
            "Share of a layer's choices per expert, mean over seeds; layers from top to bottom. "
            f"{_percent(1 / experts)} is even.",
        ),
    ]


def _lead(outcomes: Outcomes) -> str:
    best = best_of(outcomes)
    if not best:
        return "No variant came to its end on all of its seeds with losses that are finite numbers."
    return f"Lowest mean loss: {' and '.join(best)}, {_cells(outcomes.runs[best[0]], [MEAN])[0]}."


def results_of(outcomes: Outcomes) -> dict[str, Any]:
    """The numbers, for programs."""
    return {v: {str(seed): vars(outcome) for seed, outcome in runs.items()} for v, runs in outcomes.runs.items()}


def _printed(outcomes: Outcomes) -> str:
    domains = _domains(outcomes)
    lines = [[printable(cell) for cell in line] for line in (_header(domains), *_rows(outcomes, domains))]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _figures(outcomes: Runs) -> dict[str, Figure]:
    return {"ablation-losses.png": _draw_losses(outcomes), "ablation-load.png": _draw_load(outcomes)}


def _draw_losses(outcomes: Runs) -> Figure:
    from matplotlib.figure import Figure

    from megatron_btx.report.figures import CYCLE, FAINT, PAGE_WIDTH_INCHES, shortened

    figure = Figure(figsize=(PAGE_WIDTH_INCHES, 1.0 + 0.38 * len(outcomes)), layout="constrained")
    panel = figure.subplots()
    for at, runs in enumerate(outcomes.values()):
        all_values = [outcome.losses[MEAN] for outcome in runs.values()]
        values = [value for value in all_values if usable(value)]
        if len(values) < len(all_values):
            shown = ", ".join(in_digits(value) for value in all_values if not usable(value))
            panel.text(0.01, at, shown, transform=panel.get_yaxis_transform(), va="center", fontsize=8, style="italic")
        panel.plot(values, [at] * len(values), "o", color=CYCLE[0], alpha=0.45, markersize=5, markeredgewidth=0)
        average, deviation = spread(all_values)
        if len(values) == len(all_values):
            error = 0 if math.isnan(deviation) else deviation
            panel.errorbar(average, at, xerr=error, fmt="|", color="black", capsize=4)
    panel.set_yticks(range(len(outcomes)), [shortened(variant, 30) for variant in outcomes])
    panel.invert_yaxis()
    panel.grid(axis="x", color=FAINT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("validation loss, mean of domains (nats per token)")
    return figure


def _draw_load(outcomes: Runs) -> Figure:
    from matplotlib.figure import Figure

    from megatron_btx.report.figures import PAGE_WIDTH_INCHES, shortened

    columns = min(5, len(outcomes))
    lines = math.ceil(len(outcomes) / columns)
    figure = Figure(figsize=(PAGE_WIDTH_INCHES, 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(outcomes) :]:
        panel.set_axis_off()
    for panel, (variant, runs) in zip(panels, outcomes.items(), strict=False):
        tables = [outcome.loads for outcome in runs.values()]
        mean_LE = [_column_means(layer) for layer in zip(*tables, strict=True)]
        image = panel.imshow(mean_LE, vmin=0.0, vmax=1.0, cmap="cividis", aspect="auto")
        written = mean_LE if len(mean_LE) * len(mean_LE[0]) <= CELLS_WRITTEN else []
        for layer, row_E in enumerate(written):
            for expert, load in enumerate(row_E):
                ink = "white" if load < 0.5 else "black"
                panel.text(
                    expert,
                    layer,
                    f"{load:.0%}" if usable(load) else "NaN",
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=6.5,
                )
        panel.set_title(shortened(variant), fontsize=8)
        layers = range(0, len(mean_LE), math.ceil(len(mean_LE) / 8))
        panel.set_xticks(range(0, len(mean_LE[0]), math.ceil(len(mean_LE[0]) / 8)))
        panel.set_yticks(layers, [str(layer + 1) for layer in layers])
        panel.tick_params(labelsize=7, length=0)
    figure.colorbar(image, ax=list(panels), shrink=0.6, label="share of the layer's choices")
    figure.supxlabel("expert, in the order of the mix", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    return figure


def _column_means(rows_E: Sequence[Sequence[float]]) -> list[float]:
    """Per expert the mean over the seeds."""
    return [mean(column) for column in zip(*rows_E, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
