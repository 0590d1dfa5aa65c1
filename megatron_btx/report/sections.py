"""What the report of a plain run says: sections computed from the run, and nothing that it does not hold."""

from __future__ import annotations

import math

from megatron_btx.report.blocks import Block, Cell, Image, Paragraph, Section, Table, make_bullets, make_row
from megatron_btx.report.budgets import Budgets, averaged_models
from megatron_btx.report.comparisons import count_home_expert, loss_in, name_mean_column, routing_distances
from megatron_btx.report.facts import Claims, Fact
from megatron_btx.report.inputs import AVERAGE, BTX, DENSE, MIX, SEED, Model, RunData
from megatron_btx.report.quantities import ABSENT, count_text, difference_text, loss_text
from megatron_btx.report.section_costs import (
    accounting_section,
    data_section,
    export_section,
    reading_section,
    settings_section,
    sizes_section,
)

LOSSES_FIGURE, CURVES_FIGURE, ROUTING_FIGURE = "losses.png", "curves.png", "routing.png"
PAIRS_SHOWN = 28
"""Of two domains each: all of eight domains."""
_TONES = {True: "good", False: "bad", None: "unknown"}


def make_sections(data: RunData, claims: Claims) -> tuple[Section, ...]:
    """The whole report in reading order; sections that would be empty are left out."""
    sections = [
        _opening_section(data, claims),
        Section("Facts", (facts_table(claims.facts),)),
        _losses_section(data, claims),
        _training_section(data),
        _routing_section(data),
        export_section(data.stages),
        sizes_section(data),
        accounting_section(data.stages),
        settings_section(data.stages),
        data_section(data.datasets, data.stages),
        Section("Absent or broken", make_bullets(data.notes)),
        reading_section(claims.budgets),
    ]
    return tuple(section for section in sections if section.blocks)


def _opening_section(data: RunData, claims: Claims) -> Section:
    return Section("", (Paragraph(_lead(data, claims), lead=True), *make_bullets(data.marked)))


def _lead(data: RunData, claims: Claims) -> str:
    mean = _mean_loss(data, BTX)
    if mean is None:
        return "This run has no finetuned mixture that was evaluated on every domain; the report shows what there is."
    parts = [f"The finetuned mixture reaches a mean loss of {loss_text(mean)} nats per token{data.on_split}"]
    before = _mean_loss(data, SEED)
    if before is not None:
        parts.append(f"the seed, which was not finetuned, had {loss_text(before)}")
    difference = (claims.difference or {}).get(None)
    if difference is not None and math.isfinite(difference):
        compared = _compare_budgets(claims.budgets)
        parts.append(f"the mixture is {loss_text(abs(difference))} {_side(difference)} the dense model{compared}")
    elif before is not None:
        parts.append("no dense model was finetuned beside it, so that nothing says how much of this the mixture gave")
    return "; ".join(parts) + "."


def _mean_loss(data: RunData, name: str) -> float | None:
    if name not in data.models:
        return None
    return data.models[name].mean_loss(data.domains)


def _side(difference: float) -> str:
    if difference > 0:
        return "above"
    if difference < 0:
        return "below"
    return "from"


def _compare_budgets(budgets: Budgets) -> str:
    """What may be said of the data of btx and dense side by side."""
    btx, dense = budgets.btx_tokens, budgets.dense_tokens
    if btx is None or dense is None:
        return ""
    if budgets.are_equal():
        return " trained on as many tokens of each domain"
    return f", which had {count_text(dense)} tokens after the seed, the mixture and its experts {count_text(btx)}"


def _meanings(data: RunData, claims: Claims) -> dict[str, str]:
    """What the models of well-known names are."""
    parts = averaged_models(data.stages) or ("the experts",)
    dense = "the seed continued on the blends of the mixture's experts, then on that of finetuning"
    if claims.budgets.are_equal():
        dense += ", with as many tokens of each domain"
    return {
        SEED: "the model the experts branched from",
        AVERAGE: f"plain average of {', '.join(parts)}",
        MIX: "the mixture before finetuning",
        BTX: "the mixture after finetuning, which no model above it had",
        DENSE: dense,
    }


def facts_table(facts: tuple[Fact, ...]) -> Table:
    """A row per fact."""
    rows = [make_row(Cell(fact.verdict, tone=_TONES[fact.holds]), fact.text, fact.detail) for fact in facts]
    caption = "Computed from this run's numbers: loss of the model, loss of what it is compared with, difference."
    return Table(("verdict", "claim", "numbers"), tuple(rows), 3, caption)


def losses_table(data: RunData, claims: Claims) -> Table:
    """A row per model, and what btx and dense differ by."""
    columns = (*data.domains, None)
    rows = [_loss_row(model, data, claims) for model in data.models.values()]
    if claims.difference is not None:
        differences = [difference_text(claims.difference[column]) for column in columns]
        rows.append(make_row("btx - dense", *differences))
    counts = [_count_evaluated(data, domain) for domain in data.domains]
    rows.append(make_row("tokens evaluated", *counts, ""))
    return Table(("model", *data.domains, name_mean_column(data.domains)), tuple(rows))


def _loss_row(model: Model, data: RunData, claims: Claims) -> tuple[Cell, ...]:
    cells = [Cell(model.name)]
    for column in (*data.domains, None):
        loss = loss_in(model, column, data.domains)
        is_best = loss is not None and loss == claims.best.get(column)
        cells.append(Cell(loss_text(loss), strong=is_best))
    return tuple(cells)


def _count_evaluated(data: RunData, domain: str) -> str:
    counts = {model.tokens[domain] for model in data.models.values() if domain in model.tokens}
    return " / ".join(map(count_text, sorted(counts))) or ABSENT


def describe_difference(data: RunData, claims: Claims) -> tuple[Paragraph, ...]:
    """What the row of the difference is, or why there is none; nothing where the recipe asks for none."""
    text = "btx - dense is shown whatever it is: below zero the mixture is better. Nothing is tuned for it."
    if claims.difference is None:
        text = "btx - dense was not computed, because btx and dense were not both evaluated."
        if not data.asks_for(DENSE):
            return ()
    return (Paragraph(text),)


def _losses_section(data: RunData, claims: Claims) -> Section:
    title = f"Loss{data.on_split}"
    if not data.domains:
        return Section(title, ())
    meanings = _meanings(data, claims)
    meant = [f"{name}: {meanings[name]}" for name in data.models if name in meanings]
    caption = f"{title} in nats per token, lower is better; bold: lowest of its column. {'; '.join(meant)}"
    table = losses_table(data, claims)
    points = "The same numbers as points, as many as fit. Dashed: the seed."
    return Section(
        title,
        (
            Table(table.header, table.rows, caption=f"{caption}."),
            Image(LOSSES_FIGURE, f"{title} per model and domain", points),
            *describe_difference(data, claims),
        ),
    )


def _training_section(data: RunData) -> Section:
    if not any(stage.curve for stage in data.stages):
        return Section("Training", ())
    caption = (
        "Training loss of each stage over the tokens it saw, each stage from zero. Strong: moving average over "
        "about 5 % of the stage; faint: before smoothing. Skipped steps, which trained nothing, are left out. Each "
        "panel has its own scales. The curve of an unfinished stage ends where the stage did."
    )
    return Section("Training", (Image(CURVES_FIGURE, "Training loss of every stage over tokens", caption),))


def _routing_section(data: RunData) -> Section:
    mixtures = data.mixtures()
    if not mixtures:
        return Section("Routing", ())
    caption = (
        "Share of the routed (token, expert) pairs that each expert gets, per layer, for the evaluated tokens of "
        "each domain, of as many domains as fit. Layers count from the input."
    )
    blocks: list[Block] = [Image(ROUTING_FIGURE, "Share of tokens per expert, layer and domain", caption)]
    choosing = [model for model in mixtures if model.chooses_experts()]
    if any(map(routing_distances, choosing)):
        blocks.append(_distances_table(choosing))
    sentences = filter(None, map(_say_home, mixtures))
    return Section("Routing", (*blocks, *map(Paragraph, sentences)))


def _distances_table(mixtures: list[Model]) -> Table:
    distances = {model.name: routing_distances(model) for model in mixtures}
    pairs: dict[tuple[str, str], None] = {}
    for of_model in distances.values():
        pairs |= dict.fromkeys(of_model)
    rows = []
    for pair in list(pairs)[:PAIRS_SHOWN]:
        cells = [loss_text(of_model.get(pair)) for of_model in distances.values()]
        rows.append(make_row(" and ".join(pair), *cells))
    caption = "Total-variation distance between two domains' expert shares, mean over layers: 0 alike, 1 disjoint."
    if len(rows) < len(pairs):
        caption += f" The first {len(rows)} of {len(pairs)} pairs; results.json has the shares of all."
    return Table(("domains", *distances), tuple(rows), 1, caption)


def _say_home(model: Model) -> str:
    """How often the expert at home leads; empty where no domain is named like an expert."""
    if not model.chooses_experts():
        return f"{model.name}: soft routing sends every token to every expert, so that all shares are equal."
    home = count_home_expert(model)
    if not home.cells:
        return ""
    text = f"{model.name}: the expert of the domain's own name gets the largest share in {home.first} of "
    text += f"{home.cells} (domain, layer) cells."
    if home.tied:
        text += f" In {home.tied} no single expert does: the largest shares are equal."
    return text
