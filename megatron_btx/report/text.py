"""What the report says, as blocks: sentences and tables computed from the run, and nothing that it does not hold."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_btx.report.budgets import Budgets, averaged, budgets_of
from megatron_btx.report.facts import (
    BTX,
    SEED,
    Fact,
    best_per_column,
    check_facts,
    difference_to_dense,
    home_expert,
    loss_in,
    mean_column,
    routing_distances,
)
from megatron_btx.report.inputs import RunData
from megatron_btx.report.numbers import in_count, in_digits, total
from megatron_btx.report.pages import Block, Bullets, Cell, Heading, Image, Paragraph, Table, row
from megatron_btx.report.stages import Stage, parents_of

ABSENT = "–"
PAIRS_SHOWN = 28
"""Of two domains each: all of eight domains."""
TONES = {True: "good", False: "bad", None: "unknown"}


def title_of(data: RunData) -> str:
    return f"Branch-Train-MiX report: {data.name}"


def blocks_of(data: RunData, images: set[str]) -> list[Block]:
    """The whole report in reading order; ``images`` are the figures that could be drawn."""
    blocks: list[Block] = [Paragraph(_lead(data), lead=True)]
    if data.marked:
        blocks.append(Bullets(data.marked))
    blocks += _facts(check_facts(data.models, data.domains))
    blocks += _losses(data, images)
    if "curves.png" in images:
        caption = (
            "Training loss of each stage over the tokens it saw, each stage from zero. Strong: moving average over "
            "about 5 % of the stage; faint: before smoothing. Each panel has its own scales. The curve of an "
            "unfinished stage ends where the stage did."
        )
        blocks += [Heading("Training"), Image("curves.png", "Training loss of every stage over tokens", caption)]
    blocks += _routing(data, images)
    blocks += _sizes(data)
    blocks += _accounting(data.stages)
    blocks += _data_statement(data)
    if data.notes:
        blocks += [Heading("Absent or broken"), Bullets(data.notes)]
    blocks += _how_to_read(budgets_of(data.stages))
    return blocks


def _lead(data: RunData) -> str:
    btx, seed = data.models.get(BTX), data.models.get(SEED)
    mean = btx.mean_loss(data.domains) if btx else None
    if mean is None:
        return "This run has no finetuned mixture that was evaluated on every domain; the report shows what there is."
    before = seed.mean_loss(data.domains) if seed else None
    difference = (difference_to_dense(data.models, data.domains) or {}).get(None)
    parts = [f"The finetuned mixture reaches a mean validation loss of {in_digits(mean)} nats per token"]
    if before is not None:
        parts.append(f"the seed had {in_digits(before)}")
    if difference is not None and math.isfinite(difference):
        side = "above" if difference > 0 else "below" if difference < 0 else "from"
        compared = _compared(budgets_of(data.stages))
        parts.append(f"the mixture is {in_digits(abs(difference))} {side} the dense model{compared}")
    return "; ".join(parts) + "."


def _compared(budgets: Budgets) -> str:
    """What may be said of the data of btx and dense side by side."""
    btx, dense = budgets.btx_tokens, budgets.dense_tokens
    if btx is None or dense is None:
        return ""
    if budgets.are_equal():
        return " trained on as many tokens of each domain"
    return f", which had {in_count(dense)} tokens after the seed, the mixture and its experts {in_count(btx)}"


def meanings(data: RunData) -> dict[str, str]:
    """What the models of well-known names are."""
    parts = averaged(data.stages)
    dense = "the seed continued on the blends of the mixture's experts, then on that of finetuning"
    if budgets_of(data.stages).are_equal():
        dense += ", with as many tokens of each domain"
    return {
        "seed": "the model the experts branched from",
        "average": f"plain average of {', '.join(parts) if parts else 'the experts'}",
        "mix": "the mixture before finetuning",
        "btx": "the mixture after finetuning",
        "dense": dense,
    }


def _facts(facts: list[Fact]) -> list[Block]:
    rows = tuple(row(Cell(fact.verdict, tone=TONES[fact.holds]), fact.text, fact.detail) for fact in facts)
    caption = "Computed from this run's numbers: loss of the model, loss of what it is compared with, difference."
    return [Heading("Facts"), Table(("verdict", "claim", "numbers"), rows, 3, caption)]


def _losses(data: RunData, images: set[str]) -> list[Block]:
    if not data.domains:
        return []
    columns, best = (*data.domains, None), best_per_column(data.models, data.domains)
    rows = []
    for model in data.models.values():
        losses = [loss_in(model, column, data.domains) for column in columns]
        cells = [
            Cell(_loss(loss), strong=loss is not None and loss == best.get(column))
            for loss, column in zip(losses, columns, strict=True)
        ]
        rows.append(row(model.name, *cells))
    difference = difference_to_dense(data.models, data.domains)
    if difference is not None:
        rows.append(row("btx - dense", *(_signed(difference[column]) for column in columns)))
    rows.append(row("tokens evaluated", *(_tokens(data, domain) for domain in data.domains), ""))
    known = meanings(data)
    meant = [f"{name}: {known[name]}" for name in data.models if name in known]
    caption = "Validation loss in nats per token, lower is better; bold: lowest of its column. " + "; ".join(meant)
    blocks: list[Block] = [
        Heading("Validation loss"),
        Table(("model", *data.domains, mean_column(data.domains)), tuple(rows), 1, f"{caption}."),
    ]
    if "losses.png" in images:
        caption = "The same numbers as points, as many as fit. Dashed: the seed."
        blocks.append(Image("losses.png", "Validation loss per model and domain", caption))
    if difference is None:
        blocks.append(Paragraph("btx - dense was not computed, because btx and dense were not both evaluated."))
    else:
        blocks.append(
            Paragraph("btx - dense is shown whatever it is: below zero the mixture is better. Nothing is tuned for it.")
        )
    return blocks


def _routing(data: RunData, images: set[str]) -> list[Block]:
    mixtures = [model for model in data.models.values() if model.routing]
    if not mixtures:
        return []
    blocks: list[Block] = [Heading("Routing")]
    if "routing.png" in images:
        caption = (
            "Share of the routed (token, expert) pairs that each expert gets, per layer, for the validation tokens of "
            "each domain, of as many domains as fit. Layers count from the input."
        )
        blocks.append(Image("routing.png", "Share of tokens per expert, layer and domain", caption))
    distances = {model.name: routing_distances(model) for model in mixtures}
    pairs = dict.fromkeys(pair for of_model in distances.values() for pair in of_model)
    if pairs:
        shown = list(pairs)[:PAIRS_SHOWN]
        rows = tuple(
            row(" and ".join(pair), *(_share(of_model.get(pair)) for of_model in distances.values())) for pair in shown
        )
        caption = "Total-variation distance between two domains' expert shares, mean over layers: 0 alike, 1 disjoint."
        if len(shown) < len(pairs):
            caption += f" The first {len(shown)} of {len(pairs)} pairs; results.json has the shares of all."
        blocks.append(Table(("domains", *distances), rows, 1, caption))
    for model in mixtures:
        home = home_expert(model)
        if home.cells:
            text = f"{model.name}: the expert of the domain's own name gets the largest share in {home.first} of "
            text += f"{home.cells} (domain, layer) cells."
            if home.tied:
                text += f" In {home.tied} no single expert does: the largest shares are equal."
            blocks.append(Paragraph(text))
    return blocks


def _sizes(data: RunData) -> list[Block]:
    alike: dict[tuple[int | None, int | None], list[str]] = {}
    for model in data.models.values():
        alike.setdefault((model.parameters, model.active_parameters), []).append(model.name)
    rows = tuple(
        row(", ".join(names), _count(parameters), _count(active)) for (parameters, active), names in alike.items()
    )
    if not rows:
        return []
    return [Heading("Sizes"), Table(("models", "parameters", "active per token"), rows, 1)]


def _accounting(stages: tuple[Stage, ...]) -> list[Block]:
    recorded = [stage for stage in stages if stage.manifest is not None]
    if not recorded:
        return []
    depths = _depths(recorded)
    rows = [_stage_row(stage) for stage in sorted(recorded, key=lambda stage: depths[stage.name])]
    sums = {key: [cost for stage in recorded if (cost := stage.cost(key)) is not None] for key in _COSTS}
    together = {key: total(values) if values else None for key, values in sums.items()}
    rows.append(row("sum", "", *_costs(together)))
    header = ("stage", "made from", "tokens", "seconds", "tokens/s, start included", "FLOPs")
    caption = (
        f"From the manifests; of unfinished stages, tokens and FLOPs up to where they went. {ABSENT}: the stage states "
        "none. Stages may have run side by side. Seconds are those of whole programs, their start included."
    )
    return [Heading("Accounting"), Table(header, tuple(rows), 2, caption)]


def _depths(stages: list[Stage]) -> dict[str, int]:
    """How many stages each one stands behind, by the manifests' parents: the order in which they can have run."""
    depths = dict.fromkeys((stage.name for stage in stages), 0)
    for _ in stages:
        for stage in stages:
            behind = [
                depths[parent] + 1 for parent in parents_of(stage.manifest) if parent in depths and parent != stage.name
            ]
            depths[stage.name] = max(behind, default=0)
    return depths


_COSTS = ("tokens", "seconds", "flops")


def _stage_row(stage: Stage) -> tuple[Cell, ...]:
    costs = {key: stage.cost(key) for key in _COSTS}
    speed = costs["tokens"] / costs["seconds"] if costs["tokens"] and costs["seconds"] else None
    name = f"{stage.name} ({stage.unfinished})" if stage.unfinished else stage.name
    return row(name, ", ".join(parents_of(stage.manifest)) or ABSENT, *_costs(costs, speed))


def _costs(costs: Mapping[str, float | None], tokens_per_second: float | None = None) -> tuple[str, ...]:
    flops = costs["flops"]
    return (
        _count(costs["tokens"]),
        ABSENT if costs["seconds"] is None else in_count(costs["seconds"], decimals=1),
        _count(tokens_per_second),
        ABSENT if flops is None else f"{flops:.2e}",
    )


def _data_statement(data: RunData) -> list[Block]:
    if not data.corpora:
        return []
    rows = tuple(
        row(corpus.domain, corpus.split, _count(corpus.documents), _count(corpus.tokens), _count(corpus.size_bytes))
        for corpus in data.corpora
    )
    header = ("domain", "split", "documents", "tokens", "bytes of text")
    blocks: list[Block] = [Heading("Data"), Table(header, rows, 2)]
    if data.sources:
        blocks.append(Table(("stated", "value"), tuple(row(*pair) for pair in data.sources.items()), 2))
    return blocks


def _how_to_read(budgets: Budgets) -> list[Block]:
    samples = (
        "Every stage reads each domain from its first sample on. Experts that share a domain read the same samples of "
        "it, finetuning reads some of them again, and later samples may be read by none."
    )
    if budgets.are_equal():
        samples += " The dense model reads as many tokens of each domain, and fewer samples twice."
    items = (
        "One run with one random seed. At small sizes, losses on small validation sets move by about 0.1 nats between "
        "seeds: read the sign and the size of a difference, and repeat the run before relying on a small one.",
        samples,
        "Losses per token compare models of one tokenizer only. The mean weighs every domain alike, whatever its "
        "number of tokens.",
        "Facts are checked by sign. One whose inputs are missing is not checked; a model whose loss is not a finite "
        "number does not hold a claim made for it.",
        "All numbers are in results.json beside this page.",
    )
    return [Heading("How to read this"), Bullets(items)]


def _loss(loss: float | None) -> str:
    return ABSENT if loss is None else in_digits(loss)


def _signed(difference: float | None) -> str:
    return ABSENT if difference is None else in_digits(difference, "+")


def _tokens(data: RunData, domain: str) -> str:
    counts = sorted({model.tokens[domain] for model in data.models.values() if domain in model.tokens})
    return " / ".join(map(_count, counts)) or ABSENT


def _share(share: float | None) -> str:
    return ABSENT if share is None else f"{share:.3f}"


def _count(count: float | None) -> str:
    return ABSENT if count is None else in_count(count)
