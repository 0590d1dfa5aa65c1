"""What a report says: sections computed from one run or several, and nothing that they do not hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import chain

from megatron_btx.recipe.names import DATA_STAGE, EXPORT_STAGE, EXPORTED_FOLDER, LOG_FILE
from megatron_btx.report.claims import Fact, check_claims
from megatron_btx.report.inputs import RunData, join_runs
from megatron_btx.report.models import (
    AVERAGE,
    BASELINES,
    BTX,
    DENSE,
    MIX,
    SEED,
    TUNED_AVERAGE,
    Cast,
    Line,
    Model,
    count_home_expert,
    differences_to,
    find_best,
    make_lines,
    routing_distances,
)
from megatron_btx.report.pages import Block, Bullets, Cell, Image, Paragraph, Section, Table, make_bullets, make_row
from megatron_btx.report.quantities import (
    ABSENT,
    count_text,
    difference_text,
    loss_text,
    mean,
    percent_text,
    spread_text,
    total,
)
from megatron_btx.report.stages import MEAN, Stage
from megatron_btx.runner.schemas import LOSS
from megatron_btx.runner.tables import count_epochs, with_prefix

LOSSES_FIGURE, CURVES_FIGURE, WATCHED_FIGURE = "losses.png", "curves.png", "finetuning.png"
ROUTING_FIGURE, LOAD_FIGURE = "routing.png", "load.png"
FIGURES = (LOSSES_FIGURE, CURVES_FIGURE, WATCHED_FIGURE, ROUTING_FIGURE, LOAD_FIGURE)
PAIRS_SHOWN = 28
"""Of two domains each: all of eight domains."""
_TONES = {True: "good", False: "bad", None: "unknown"}
_EXPORTED = f"{EXPORT_STAGE}/{EXPORTED_FOLDER}"
_SETTINGS = ("lr", "min-lr", "lr-decay-style", "global-batch-size", "seq-length", "weight-decay", "clip-grad", "seed")
"""Of a stage that trains, as the report shows them."""


@dataclass(frozen=True)
class Study:
    """What all parts of a report are made from: one run, or several side by side."""

    runs: tuple[RunData, ...]
    cast: Cast
    """The models of all of them."""
    lines: tuple[Line, ...]
    """A line of the tables for each model, and for each variant."""
    facts: Mapping[str, list[Fact]]
    """Run -> its facts; an ablation has none."""
    prefix: str = ""
    """Of the files of figures."""

    @property
    def domains(self) -> tuple[str, ...]:
        """All on which some model has a loss."""
        return self.cast.domains

    @property
    def on_split(self) -> str:
        """ " on the test split", or what the losses are of; empty where the runs do not say it, or differ."""
        splits = {run.on_split for run in self.runs}
        return splits.pop() if len(splits) == 1 else ""

    def name(self, run: RunData, text: str) -> str:
        """A sentence about a run, with its name where there are several."""
        if len(self.runs) == 1:
            return text
        return f"{run.name}: {text}"

    def all_facts(self) -> list[Fact]:
        """The facts of all runs."""
        return list(chain.from_iterable(self.facts.values()))


def make_study(runs: Sequence[RunData], prefix: str) -> Study:
    """Everything that a report computes from its inputs, once."""
    cast = join_runs(runs)
    facts = {run.name: check_claims(run) for run in runs if not run.variants()}
    return Study(tuple(runs), cast, tuple(make_lines(cast)), facts, prefix)


def make_sections(study: Study) -> tuple[Section, ...]:
    """The whole report in reading order; sections that would be empty are left out."""
    run = study.runs[0]
    leads = [Paragraph(study.name(run, _lead(run)), lead=True) for run in study.runs]
    sections = [
        Section("", (*leads, *make_bullets(_marked(study)))),
        Section("Facts", tuple(facts_tables(study))),
        _losses_section(study),
        *(_measure_section(study, measure) for measure in _other_measures(study.cast)),
    ]
    if len(study.runs) == 1:
        sections += [_training_section(study), _watched_section(study), _routing_section(study), _load_section(study)]
        sections += [_export_section(run.stages), _sizes_section(study.cast), _accounting_section(run.stages)]
        sections += [_settings_section(run.stages), data_section(run)]
    else:
        sections += [_watched_section(study), _load_section(study), _sizes_section(study.cast), _costs_section(study)]
    notes = [study.name(run, note) for run in study.runs for note in run.notes]
    sections += [Section("Absent or broken", make_bullets(tuple(notes))), _reading_section(study)]
    return tuple(section for section in sections if section.blocks)


def printed_blocks(study: Study) -> tuple[Block, ...]:
    """The tables of what was measured and the facts, for a terminal."""
    blocks: list[Block] = []
    if study.domains:
        blocks.append(Paragraph(f"loss{study.on_split}, nats per token (lower is better; * lowest of its column)"))
        blocks.append(losses_table(study))
    else:
        blocks.append(Paragraph("no model was evaluated: no losses to show"))
    for measure in _other_measures(study.cast):
        blocks += _measure_section(study, measure).blocks
    if study.cast.variants():
        blocks += _load_section(study).blocks[:1]
        blocks += [Paragraph(_lead(run)) for run in study.runs]
    blocks += describe_differences(study)
    return (*blocks, *make_bullets(_marked(study)), *facts_tables(study))


# --- the opening -------------------------------------------------------------------------------------------


def _marked(study: Study) -> tuple[str, ...]:
    return tuple(study.name(run, sentence) for run in study.runs for sentence in run.marked)


def _lead(run: RunData) -> str:
    if run.variants():
        return _lead_of_variants(run)
    mixture, seed = run.find(BTX), run.find(SEED)
    reached = None
    if mixture is not None:
        reached = mixture.mean_loss(run.domains)
    if reached is None:
        return "This run has no finetuned mixture that was evaluated on every domain; the report shows what there is."
    parts = [f"The finetuned mixture reaches a mean loss of {loss_text(reached)} nats per token{run.on_split}"]
    before = None
    if seed is not None:
        before = seed.mean_loss(run.domains)
    if before is not None:
        parts.append(f"the seed, which was not finetuned, had {loss_text(before)}")
    compared = [sentence for role in BASELINES if (sentence := _compare(run, role))]
    if not compared and before is not None:
        compared = ["nothing finetuned stands beside it, so that nothing says how much of this the mixture gave"]
    return "; ".join([*parts, *compared]) + "."


def _compare(run: RunData, role: str) -> str:
    """By how much the mixture lies above or below a baseline; empty without a number."""
    difference = (differences_to(run, role) or {}).get(None)
    if difference is None or not math.isfinite(difference):
        return ""
    side = "from"
    if difference:
        side = "above" if difference > 0 else "below"
    name = {DENSE: "the dense model", TUNED_AVERAGE: "the average, finetuned as the mixture was"}[role]
    text = f"the mixture is {loss_text(abs(difference))} {side} {name}"
    own, others = run.tokens_after_seed(BTX), run.tokens_after_seed(role)
    if role != DENSE or own is None or others is None:
        return text
    if own == others:
        return f"{text} trained on as many tokens of each domain"
    text += f", which had {count_text(others)} tokens after the seed, the mixture and its experts "
    return text + count_text(own)


def _lead_of_variants(run: RunData) -> str:
    lines = [line for line in make_lines(run) if line.models and line.models[0].row.variant]
    best = find_best(lines, LOSS, None, run.domains)
    if not best:
        return "No variant came to its end on all of its seeds with losses that are finite numbers."
    lowest = spread_text(best[0].values(LOSS, None, run.domains))
    return f"Lowest mean loss: {' and '.join(line.label for line in best)}, {lowest}{run.on_split}."


def facts_tables(study: Study) -> list[Table]:
    """A row per fact; no table without one."""
    rows = []
    for run in study.runs:
        for fact in study.facts.get(run.name, ()):
            cell = Cell(fact.verdict, tone=_TONES[fact.holds])
            rows.append(make_row(cell, study.name(run, fact.text), fact.detail))
    caption = "Computed from this run's numbers: loss of the model, loss of what it is compared with, difference."
    table = Table(("verdict", "claim", "numbers"), tuple(rows), 3, caption)
    return [table] if rows else []


# --- what was measured -------------------------------------------------------------------------------------


def losses_table(study: Study) -> Table:
    """A row per model, and what the mixture and each baseline differ by."""
    columns = (*study.domains, None)
    rows = _value_rows(study.lines, LOSS, study.domains)
    for run in study.runs:
        for role in BASELINES:
            differences = differences_to(run, role)
            if differences is not None:
                cells = [difference_text(differences.get(column)) for column in columns]
                rows.append(make_row(study.name(run, f"{BTX} - {role}"), *cells))
    counts = [_count_evaluated(study.cast, domain) for domain in study.domains]
    if set(counts) != {ABSENT}:
        rows.append(make_row("tokens evaluated", *counts, ""))
    return Table(("model", *study.domains, _name_mean_column(study.domains)), tuple(rows))


def _name_mean_column(columns: Sequence[str]) -> str:
    """The heading of the means; another where a domain has that name."""
    if "mean" in columns:
        return "mean over domains"
    return "mean"


def _value_rows(lines: Sequence[Line], measure: str, columns: Sequence[str]) -> list[tuple[Cell, ...]]:
    """A row for each model or variant: its values, over seeds as mean ± deviation; the best of a column is strong."""
    shown = (*columns, None)
    best: dict[str | None, list[Line]] = {}
    if measure == LOSS:  # of others nothing says which value is better
        best = {column: find_best(lines, measure, column, columns) for column in shown}
    rows = []
    for line in lines:
        cells = [Cell(line.name)]
        for column in shown:
            values = line.values(measure, column, columns)
            text = ABSENT
            if values:
                text = spread_text(values)
            cells.append(Cell(text, strong=line in best.get(column, ())))
        rows.append(tuple(cells))
    return rows


def _count_evaluated(cast: Cast, domain: str) -> str:
    counts = {model.tokens[domain] for model in cast.models if domain in model.tokens}
    return " / ".join(map(count_text, sorted(counts))) or ABSENT


def describe_differences(study: Study) -> tuple[Paragraph, ...]:
    """What the row of the difference to the dense model is, or why there is none; nothing where none is asked for."""
    asked = [run for run in study.runs if run.asks_for(DENSE) and not run.variants()]
    if any(differences_to(run, DENSE) for run in study.runs):
        text = "btx - dense is shown whatever it is: below zero the mixture is better. Nothing is tuned for it."
    elif asked:
        text = "btx - dense was not computed, because btx and dense were not both evaluated."
    else:
        return ()
    return (Paragraph(text),)


def _losses_section(study: Study) -> Section:
    title = f"Loss{study.on_split}"
    if not study.domains:
        return Section(title, ())
    sentences = [f"{title} in nats per token, lower is better; bold: lowest of its column."]
    seeds = sorted({model.row.seed for model in study.cast.variants() if model.row.seed is not None})
    if seeds:
        sentences.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.")
    meant = [f"{name}: {meaning}" for name, meaning in _find_meanings(study).items()]
    if meant:
        sentences.append(f"{'; '.join(meant)}.")
    table = losses_table(study)
    points = "The same numbers as points, as many as fit. Dashed: the seed."
    if seeds:
        points += " Of a variant a point for each seed, and mean ± deviation."
    return Section(
        title,
        (
            Table(table.header, table.rows, caption=" ".join(sentences)),
            Image(study.prefix + LOSSES_FIGURE, f"{title} per model and domain", points),
            *describe_differences(study),
        ),
    )


def _find_meanings(study: Study) -> dict[str, str]:
    """What the models are, by name; of several runs where they agree."""
    meanings: dict[str, set[str]] = {}
    for run in study.runs:
        for model in run.measured:
            meaning = model.row.meaning or _describe_role(run, model)
            if meaning and not model.row.variant:
                meanings.setdefault(model.name, set()).add(meaning)
    return {name: found.pop() for name, found in meanings.items() if len(found) == 1}


def _describe_role(run: RunData, model: Model) -> str:
    parts: tuple[str, ...] = ("the experts",)
    if model.stage is not None and model.stage.experts:
        parts = model.stage.experts
    dense = "the seed continued on the blends of the mixture's experts, then on that of finetuning"
    if run.had_equal_tokens(DENSE):
        dense += ", with as many tokens of each domain"
    meanings = {
        SEED: "the model the experts branched from",
        AVERAGE: f"plain average of {', '.join(parts)}",
        TUNED_AVERAGE: "the plain average, finetuned as the mixture was",
        MIX: "the mixture before finetuning",
        BTX: "the mixture after finetuning, which no model above it had",
        DENSE: dense,
    }
    return meanings.get(model.role, "")


def _other_measures(cast: Cast) -> list[str]:
    """What was measured beside losses."""
    measures = dict.fromkeys(score.measure for model in cast.models for score in model.scores)
    return [measure for measure in measures if measure != LOSS]


def _measure_section(study: Study, measure: str) -> Section:
    """The values of a measure: a row per model, a column per data set or task."""
    scores = [score for model in study.cast.models for score in model.scores if score.measure == measure]
    columns = tuple(dict.fromkeys(score.data for score in scores))
    title = measure.capitalize()
    lines = [line for line in study.lines if any(model.values(measure) for model in line.models)]
    header = ("model", *columns, _name_mean_column(columns))
    caption = f"{title}{study.on_split}" + f", {scores[0].unit}" * bool(scores[0].unit)
    return Section(title, (Table(header, tuple(_value_rows(lines, measure, columns)), caption=f"{caption}."),))


# --- training ----------------------------------------------------------------------------------------------


def _training_section(study: Study) -> Section:
    if not any(stage.curve for stage in study.runs[0].stages):
        return Section("Training", ())
    caption = (
        "Training loss of each stage over the tokens it saw, each stage from zero. Strong: moving average over "
        "about 5 % of the stage; faint: before smoothing. Skipped steps, which trained nothing, are left out. Each "
        "panel has its own scales. The curve of an unfinished stage ends where the stage did."
    )
    image = Image(study.prefix + CURVES_FIGURE, "Training loss of every stage over tokens", caption)
    return Section("Training", (image,))


def find_watched(cast: Cast) -> list[Model]:
    """The models whose loss per domain was measured more than once while they were trained."""
    found = []
    for model in cast.models:
        if model.stage is not None and any(len(curve) > 1 for curve in model.stage.watched.values()):
            found.append(model)
    return found


def watched_curve(cast: Cast, model: Model, domain: str) -> list[tuple[int, float]]:
    """(iteration, loss) on a domain; the mixture's begins with what the mix was measured to have."""
    assert model.stage is not None
    curve = list(model.stage.watched.get(domain, ()))
    start = cast.find(MIX)
    if start is None or model.role != BTX or model.row.variant or not curve:
        return curve
    loss = start.mean_loss(cast.domains) if domain == MEAN else start.losses.get(domain)
    return curve if loss is None else [(0, loss), *curve]


def _watched_section(study: Study) -> Section:
    title = "Loss per domain while finetuning"
    if not find_watched(study.cast):
        return Section(title, ())
    caption = f"Loss{study.on_split} of every domain, and their mean, measured while the model was trained. Each panel "
    caption += "has its own scale. The mixture's begins with the mix. Dashed: the seed."
    return Section(title, (Image(study.prefix + WATCHED_FIGURE, title, caption),))


def _load_section(study: Study) -> Section:
    """How the mixtures loaded their experts while they were trained."""
    title = "Load while finetuning"
    rows = []
    for line in study.lines:
        logs = [model.stage.routing for model in line.models if model.stage is not None and model.stage.routing]
        if not logs or line.models[0].row.role != BTX:
            continue
        dead = [ABSENT if log.dead is None else str(log.dead) for log in logs]
        loads = list(chain.from_iterable(chain.from_iterable(log.loads for log in logs)))
        spread = ABSENT
        if any(map(math.isnan, loads)):
            spread = "NaN"
        elif loads:
            spread = f"{percent_text(min(loads))} to {percent_text(max(loads))}"
        rows.append(make_row(line.name, ", ".join(dead), spread, percent_text(mean(log.dropped for log in logs))))
    if not rows:
        return Section(title, ())
    caption = (
        "Over the last logged interval. Dead experts: (layer, expert) cells with under 1 % of an even load, one number "
        "per seed. Load: smallest and largest share of a layer's choices that an expert got."
    )
    blocks: list[Block] = [Table(("model", "dead experts", "load", "dropped"), tuple(rows), caption=caption)]
    variants = find_loads(study)
    if variants:
        experts = max(len(seeds[0][0]) for seeds in variants.values())
        text = "Share of a layer's choices per expert, mean over seeds; layers from top to bottom. "
        text += f"{percent_text(1 / experts)} is even."
        blocks.append(Image(study.prefix + LOAD_FIGURE, "Load per layer and expert of every variant", text))
    return Section(title, tuple(blocks))


def find_loads(study: Study) -> dict[str, list[list[list[float]]]]:
    """Variant -> for every seed the load of all layers and experts, [L][E]; of one shape."""
    loads: dict[str, list[list[list[float]]]] = {}
    for model in study.cast.variants():
        if model.scores and model.stage is not None and model.stage.routing and model.stage.routing.loads:
            loads.setdefault(model.label, []).append(model.stage.routing.loads)
    return loads


# --- routing -----------------------------------------------------------------------------------------------


def _routing_section(study: Study) -> Section:
    mixtures = study.cast.mixtures()
    if not mixtures:
        return Section("Routing", ())
    caption = (
        "Share of the routed (token, expert) pairs that each expert gets, per layer, for the evaluated tokens of "
        "each domain, of as many domains as fit. Layers count from the input."
    )
    alternative = "Share of tokens per expert, layer and domain"
    blocks: list[Block] = [Image(study.prefix + ROUTING_FIGURE, alternative, caption)]
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


# --- sizes, costs and data ---------------------------------------------------------------------------------


def _sizes_section(cast: Cast) -> Section:
    """Parameters, a row for all models of one size."""
    alike: dict[tuple[int | None, int | None], list[str]] = {}
    for model in cast.measured:
        alike.setdefault((model.parameters, model.active_parameters), []).append(model.label)
    alike.pop((None, None), None)
    if not alike:
        return Section("Sizes", ())
    rows = []
    for (parameters, active), names in alike.items():
        rows.append(make_row(", ".join(names), count_text(parameters), count_text(active)))
    return Section("Sizes", (Table(("models", "parameters", "active per token"), tuple(rows)),))


def _accounting_section(stages: tuple[Stage, ...]) -> Section:
    """What each stage took, and all together."""
    recorded = [stage for stage in stages if stage.manifest is not None]
    if not recorded:
        return Section("Accounting", ())
    order = list(TopologicalSorter({stage.name: stage.parents for stage in recorded}).static_order())
    recorded.sort(key=lambda stage: order.index(stage.name))
    rows = list(map(_stage_row, recorded))
    tokens, seconds, operations = _sum_costs(recorded)
    rows.append(make_row("sum", "", tokens, seconds, ABSENT, operations))
    header = ("stage", "made from", "tokens", "seconds", "tokens/s, start included", "FLOPs")
    caption = (
        f"From the manifests; of unfinished stages, tokens and FLOPs up to where they went. {ABSENT}: the stage states "
        "none. Stages may have run side by side. Seconds are those of whole programs, their start included."
    )
    return Section("Accounting", (Table(header, tuple(rows), 2, caption),))


def _stage_row(stage: Stage) -> tuple[Cell, ...]:
    name = stage.name
    if stage.unfinished:
        name += f" ({stage.unfinished})"
    speed = None
    if stage.tokens and stage.seconds:
        speed = stage.tokens / stage.seconds
    costs = (count_text(stage.tokens), count_text(stage.seconds, decimals=1), count_text(speed))
    return make_row(name, ", ".join(stage.parents) or ABSENT, *costs, _flops_text(stage.flops))


def _sum_costs(stages: Sequence[Stage]) -> tuple[str, str, str]:
    """Tokens, seconds and FLOPs of all stages that state them, as text."""
    tokens = _sum_known(stage.tokens for stage in stages)
    seconds, flops = _sum_known(stage.seconds for stage in stages), _sum_known(stage.flops for stage in stages)
    return count_text(tokens), count_text(seconds, decimals=1), _flops_text(flops)


def _flops_text(flops: float | None) -> str:
    if flops is None:
        return ABSENT
    return with_prefix(flops)


def _sum_known(costs: Iterable[float | None]) -> float | None:
    """The sum of those that are stated; None where none is."""
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    return total(known)


def _export_section(stages: tuple[Stage, ...]) -> Section:
    """Where the exported model lies, and how it is loaded."""
    blocks = []
    for stage in stages:
        if stage.name == EXPORT_STAGE and not stage.unfinished:
            text = f"The finetuned mixture and its tokenizer lie as a Hugging Face model in {_EXPORTED}, in this run's "
            text += f"folder. Every tensor was read back and verified ({EXPORT_STAGE}/{LOG_FILE}). "
            text += f'To load both: AutoModelForCausalLM.from_pretrained("{_EXPORTED}") and AutoTokenizer likewise.'
            blocks.append(Paragraph(text))
    return Section("Export", tuple(blocks))


def _settings_section(stages: tuple[Stage, ...]) -> Section:
    """What the stages that train were set to, and the versions of what made the run."""
    rows, versions = [], set()
    for stage in stages:
        if stage.curve and stage.settings:
            rows.append(make_row(stage.name, *(str(stage.settings.get(flag, ABSENT)) for flag in _SETTINGS)))
        found = (stage.written or {}).get("versions")
        if isinstance(found, dict):
            versions.add(", ".join(f"{name} {version}" for name, version in found.items()))
    blocks: list[Block] = [Paragraph(f"Made by {version}.") for version in sorted(versions)]
    if rows:
        caption = "Megatron's flags. Every setting that decided a stage's result is in results.json, under stages."
        blocks.insert(0, Table(("stage", *_SETTINGS), tuple(rows), caption=caption))
    return Section("Settings", tuple(blocks))


def data_section(run: RunData) -> Section:
    """The data statement, and how often each stage read its texts."""
    datasets = run.datasets
    if not datasets.rows:
        return Section("Data", ())
    rows = []
    for row in datasets.rows:
        sizes = (count_text(row.documents), count_text(row.tokens), count_text(row.size_bytes))
        rows.append(make_row(row.domain, row.split, *sizes))
    blocks: list[Block] = [Table(("domain", "split", "documents", "tokens", "bytes of text"), tuple(rows), 2)]
    known = {f"{DATA_STAGE}/{row.domain}.{row.split}": row.tokens for row in datasets.rows if row.tokens}
    for stage in run.stages:
        epochs = count_epochs(stage.settings, stage.tokens, known)
        read = ", ".join(f"{name.removeprefix(f'{DATA_STAGE}/')} {times:.2f}" for name, times in epochs.items())
        if read:
            blocks.append(Paragraph(f"Epochs of {stage.name}, the times that it read a text: {read}."))
    if datasets.sources:
        stated = [make_row(*pair) for pair in datasets.sources.items()]
        blocks.append(Table(("made of", "value"), tuple(stated), 2))
    return Section("Data", tuple(blocks))


def _costs_section(study: Study) -> Section:
    """What all stages of each run took."""
    rows = []
    for run in study.runs:
        recorded = [stage for stage in run.stages if stage.manifest is not None]
        rows.append(make_row(run.name, *_sum_costs(recorded)))
    caption = "The sums of the runs' manifests. Each run's own report has its stages."
    return Section("Accounting", (Table(("run", "tokens", "seconds", "FLOPs"), tuple(rows), caption=caption),))


def _reading_section(study: Study) -> Section:
    """What to keep in mind."""
    samples = (
        "Every stage reads each domain from its first sample on. Experts that share a domain read the same samples of "
        "it, finetuning reads some of them again, and later samples may be read by none."
    )
    if any(run.had_equal_tokens(DENSE) for run in study.runs):
        samples += " The dense model reads as many tokens of each domain, and fewer samples twice."
    seeds = "One run with one random seed. "
    if study.cast.variants():
        seeds = ""
    items = (
        f"{seeds}At small sizes, losses on small sets move by about 0.1 nats between "
        "seeds: read the sign and the size of a difference, and repeat the run before relying on a small one.",
        samples,
        "Losses per token compare models of one tokenizer only. The mean weighs every domain alike, whatever its "
        "number of tokens.",
        "Facts are checked by sign. One whose inputs are missing is not checked; a model whose loss is not a finite "
        "number does not hold a claim made for it.",
        "All numbers are in results.json beside this page.",
    )
    return Section("How to read this", (Bullets(items),))
