"""The report of an ablation: a table of its variants over their seeds, and two figures.

``python -m megatron_btx.recipe.report_ablation RUN`` writes RUN/report/{ablation.md, ablation.html, *.png, *.json} from
the metrics of its finetuning stages.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_btx.errors import InputError, exits_with_one_line
from megatron_btx.manifest import mark, write_atomically
from megatron_btx.recipe.ablation import stage_name
from megatron_btx.recipe.report_inputs import REPORT_FOLDER
from megatron_btx.recipe.report_pages import Block, Heading, Image, Paragraph, Table, row, to_html, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS = "lm loss validation "
MEAN = "mean"
_LOAD = re.compile(r"moe/load_layer_(\d+)_expert_(\d+)")


@dataclass(frozen=True)
class Outcome:
    """What one finetuning came to."""

    losses: Mapping[str, float]
    """Nats per token by domain, and their mean, after the last step."""
    loads: list[list[float]]
    """Share of a layer's choices per expert, over the last logged interval."""
    dead: int
    """(layer, expert) cells under 1 % of an even load over that interval."""
    dropped: float
    """Share of choices dropped there, mean over layers."""


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Write the report of an ablation and print its table."""
    from megatron_btx.recipe.figures import as_png

    parser = argparse.ArgumentParser(prog="btx report", description="Write the report of an ablation.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/ablation-tiny")
    arguments = parser.parse_args(argv)
    outcomes = read_outcomes(arguments.run)
    folder = arguments.run / REPORT_FOLDER
    folder.mkdir(exist_ok=True)
    mark(folder, folder.name)
    images = {name: as_png(figure) for name, figure in _figures(outcomes).items()}
    title, blocks = "Ablation", blocks_of(outcomes)
    files = {"ablation.html": to_html(title, blocks, images).encode(), **images}
    files["ablation.json"] = json.dumps(results_of(outcomes), indent=1).encode()
    files["ablation.md"] = to_markdown(title, blocks).encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
    print(_printed(outcomes))
    print(f"\nreport: {folder / 'ablation.html'}")
    return 0


def read_outcomes(run: Path) -> dict[str, dict[int, Outcome]]:
    """Variant -> seed -> outcome, in the recipe's order.

    Raises:
        InputError: no ablation's run, or a stage that has not come to its end.
    """
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise InputError(f"{recipe}: does not exist; expected the directory of an ablation's run")
    section = yaml.safe_load(recipe.read_text()).get("ablation")
    if not section:
        raise InputError(f"{recipe}: has no ablation; its report is btx report {run}")
    outcomes: dict[str, dict[int, Outcome]] = {}
    for variant, settings in section["variants"].items():
        seeds = (settings or {}).get("seeds", section.get("seeds"))
        outcomes[variant] = {seed: _outcome(run / stage_name(variant, seed) / "metrics.jsonl") for seed in seeds}
    return outcomes


def _outcome(file: Path) -> Outcome:
    """The last values of each kind that a stage logged."""
    if not file.is_file():
        raise InputError(f"{file}: does not exist; the stage has not run")
    last: dict[str, float] = {}
    for line in file.read_text().splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # cut short by a kill; the run went on after it
            continue
        last |= values
    losses = {name.removeprefix(LOSS): value for name, value in last.items() if name.startswith(LOSS)}
    cells = {(int(m[1]), int(m[2])): value for name, value in last.items() if (m := _LOAD.fullmatch(name))}
    if MEAN not in losses or not cells:
        raise InputError(
            f"{file}: holds no validation loss per domain or no routing; the stage has not come to its end"
        )
    layers, experts = sorted({layer for layer, _ in cells}), 1 + max(expert for _, expert in cells)
    dropped = [value for name, value in last.items() if name.startswith("moe/dropped_layer_")]
    return Outcome(
        losses,
        [[cells[layer, expert] for expert in range(experts)] for layer in layers],
        int(last["moe/dead_experts"]),
        sum(dropped) / len(dropped),
    )


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan for the latter of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _with_error(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.3f}" if math.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def _domains(outcomes: Mapping[str, Mapping[int, Outcome]]) -> list[str]:
    first = next(iter(next(iter(outcomes.values())).values()))
    return [*(domain for domain in first.losses if domain != MEAN), MEAN]


def _cells(runs: Mapping[int, Outcome], domains: Sequence[str]) -> list[str]:
    loads = [load for outcome in runs.values() for layer in outcome.loads for load in layer]
    dead = sorted(outcome.dead for outcome in runs.values())
    losses = [_with_error([outcome.losses[domain] for outcome in runs.values()]) for domain in domains]
    dropped = statistics.fmean(outcome.dropped for outcome in runs.values())
    return [*losses, ", ".join(map(str, dead)), f"{min(loads):.1%} to {max(loads):.1%}", f"{dropped:.1%}"]


def _header(domains: Sequence[str]) -> list[str]:
    return ["variant", *domains, "dead experts", "load", "dropped"]


def blocks_of(outcomes: Mapping[str, Mapping[int, Outcome]]) -> list[Block]:
    """The report's text."""
    domains = _domains(outcomes)
    best = min(outcomes, key=lambda v: spread([o.losses[MEAN] for o in outcomes[v].values()])[0])
    rows = tuple(row(variant, *_cells(runs, domains)) for variant, runs in outcomes.items())
    seeds = sorted({seed for runs in outcomes.values() for seed in runs})
    caption = (
        f"Validation loss in nats per token: mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}. "
        "Dead experts: (layer, expert) cells with under 1 % of an even load over the last logged interval, one number "
        "per seed. Load: smallest and largest share of a layer's choices that an expert got there."
    )
    return [
        Paragraph(f"Lowest mean loss: {best}, {_cells(outcomes[best], [MEAN])[0]}.", lead=True),
        Table(tuple(_header(domains)), rows, caption=caption),
        Heading("Losses"),
        Image(
            "ablation-losses.png", "Mean validation loss per variant", "Points: one seed each. Bars: mean ± deviation."
        ),
        Heading("Load"),
        Image(
            "ablation-load.png",
            "Load per layer and expert of every variant",
            "Share of a layer's choices per expert, mean over seeds; layers from top to bottom. 25 % is even for four.",
        ),
    ]


def results_of(outcomes: Mapping[str, Mapping[int, Outcome]]) -> dict[str, Any]:
    """The numbers, for programs."""
    return {v: {str(seed): vars(outcome) for seed, outcome in runs.items()} for v, runs in outcomes.items()}


def _printed(outcomes: Mapping[str, Mapping[int, Outcome]]) -> str:
    domains = _domains(outcomes)
    lines = [_header(domains), *([variant, *_cells(runs, domains)] for variant, runs in outcomes.items())]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _figures(outcomes: Mapping[str, Mapping[int, Outcome]]) -> dict[str, Figure]:
    return {"ablation-losses.png": _draw_losses(outcomes), "ablation-load.png": _draw_load(outcomes)}


def _draw_losses(outcomes: Mapping[str, Mapping[int, Outcome]]) -> Figure:
    from matplotlib.figure import Figure

    from megatron_btx.recipe.figures import CYCLE, FAINT, PAGE_WIDTH_INCHES

    figure = Figure(figsize=(PAGE_WIDTH_INCHES, 1.0 + 0.38 * len(outcomes)), layout="constrained")
    panel = figure.subplots()
    for at, runs in enumerate(outcomes.values()):
        values = [outcome.losses[MEAN] for outcome in runs.values()]
        mean, deviation = spread(values)
        panel.plot(values, [at] * len(values), "o", color=CYCLE[0], alpha=0.45, markersize=5, markeredgewidth=0)
        panel.errorbar(mean, at, xerr=0 if math.isnan(deviation) else deviation, fmt="|", color="black", capsize=4)
    panel.set_yticks(range(len(outcomes)), list(outcomes))
    panel.invert_yaxis()
    panel.grid(axis="x", color=FAINT)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_xlabel("validation loss, mean of domains (nats per token)")
    return figure


def _draw_load(outcomes: Mapping[str, Mapping[int, Outcome]]) -> Figure:
    from matplotlib.figure import Figure

    from megatron_btx.recipe.figures import PAGE_WIDTH_INCHES

    columns = min(5, len(outcomes))
    lines = math.ceil(len(outcomes) / columns)
    figure = Figure(figsize=(PAGE_WIDTH_INCHES, 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(outcomes) :]:
        panel.set_axis_off()
    for panel, (variant, runs) in zip(panels, outcomes.items(), strict=False):
        tables = [outcome.loads for outcome in runs.values()]
        mean_LE = [
            [statistics.fmean(cells) for cells in zip(*layer, strict=True)] for layer in zip(*tables, strict=True)
        ]
        image = panel.imshow(mean_LE, vmin=0.0, vmax=1.0, cmap="cividis", aspect="auto")
        for layer, row_E in enumerate(mean_LE):
            for expert, load in enumerate(row_E):
                ink = "white" if load < 0.5 else "black"
                panel.text(expert, layer, f"{load:.0%}", ha="center", va="center", color=ink, fontsize=6.5)
        panel.set_title(variant, fontsize=8)
        panel.set_xticks(range(len(mean_LE[0])))
        panel.set_yticks(range(len(mean_LE)), [str(layer + 1) for layer in range(len(mean_LE))])
        panel.tick_params(labelsize=7, length=0)
    figure.colorbar(image, ax=list(panels), shrink=0.6, label="share of the layer's choices")
    figure.supxlabel("expert, in the order of the mix", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
