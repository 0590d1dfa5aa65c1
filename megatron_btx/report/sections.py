"""What a report says: sections computed from one run or several, and nothing that they do not hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import chain

from megatron_btx.recipe.names import DATA_STAGE, EXPORT_STAGE, EXPORTED_FOLDER, LOG_FILE
from megatron_btx.report.claims import Fact, check_claims
from megatron_btx.report.evidence import (
    MARGIN,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    UNTESTED,
    Finding,
    find_replicates,
    judge_claims,
)
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
    differences_to,
    find_best,
    make_lines,
    routing_distances,
)
from megatron_btx.report.pages import Block, Cell, Image, Paragraph, Section, Table, make_bullets, make_row
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
from megatron_btx.report.stages import Stage
from megatron_btx.runner.schemas import LOSS
from megatron_btx.runner.tables import count_epochs, with_prefix

PAIRS_SHOWN = 28
"""Of two domains each: all of eight domains."""
_VERDICTS = {
    True: Cell("true", tone="good"),
    False: Cell("false", tone="bad"),
    None: Cell("not checked", tone="unknown"),
}
_TONES = {SUPPORTED: "good", REFUTED: "bad", UNDECIDED: "unknown", UNTESTED: "unknown"}
_WATCHED_TITLE, _LOAD_TITLE = "Loss per domain while finetuning", "Load while finetuning"
_SAME_SHARE = 1e-12
"""Shares this close are equal: what they differ by is rounding."""
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
    findings: Mapping[str, list[Finding]]
    """Names of runs of one recipe, which differ in their seed -> what they say of the paper's claims."""
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


def make_study(runs: Sequence[RunData], prefix: str) -> Study:
    """Everything that a report computes from its inputs, once."""
    cast = join_runs(runs)
    facts = {run.name: check_claims(run) for run in runs if not run.variants()}
    findings = {}
    for replicates in find_replicates(runs):
        findings[", ".join(replicates.run_names)] = judge_claims(replicates)
    return Study(tuple(runs), cast, tuple(make_lines(cast)), facts, findings, prefix)


def make_sections(study: Study) -> tuple[Section, ...]:
    """The whole report in reading order; sections that would be empty are left out."""
    notes = [study.name(run, note) for run in study.runs for note in run.notes]
    opening: list[Block] = [Paragraph(study.name(run, _lead(run)), lead=True) for run in study.runs]
    parts: list[tuple[str, Iterable[Block]]] = [("", [*opening, *make_bullets(_marked(study))])]
    parts.append(("Facts", tabulate_facts(study)))
    parts.append(("The paper's claims", _tabulate_findings(study)))
    parts.append((f"Loss{study.on_split}", _show_losses(study)))
    parts += [(measure.capitalize(), [_tabulate_measure(study, measure)]) for measure in _other_measures(study.cast)]
    if len(study.runs) == 1:
        run = study.runs[0]
        parts += [
            ("Training", _show_training(study)),
            (_WATCHED_TITLE, _show_watched(study)),
            ("Routing", _show_routing(study)),
            (_LOAD_TITLE, _show_loads(study)),
            ("Export", _say_export(run)),
            ("Sizes", _tabulate_sizes(study.cast)),
            ("Accounting", _tabulate_stages(run)),
            ("Settings", _show_settings(run)),
            ("Data", show_data(run)),
        ]
    else:
        parts += [
            (_WATCHED_TITLE, _show_watched(study)),
            (_LOAD_TITLE, _show_loads(study)),
            ("Sizes", _tabulate_sizes(study.cast)),
            ("Accounting", _tabulate_runs(study)),
        ]
    parts += [("Absent or broken", make_bullets(notes)), ("How to read this", make_bullets(_say_caution(study)))]
    sections = [Section(title, tuple(blocks)) for title, blocks in parts]
    return tuple(section for section in sections if section.blocks)


def printed_blocks(study: Study) -> tuple[Block, ...]:
    """The tables of what was measured and the facts, for a terminal."""
    blocks: list[Block] = []
    if study.domains:
        blocks.append(Paragraph(f"loss{study.on_split}, nats per token (lower is better; * lowest of its column)"))
        blocks.append(_tabulate_losses(study))
    else:
        blocks.append(Paragraph("no model was evaluated: no losses to show"))
    blocks += [_tabulate_measure(study, measure) for measure in _other_measures(study.cast)]
    if study.cast.variants():
        blocks += list(_show_loads(study))[:1]
        blocks += [Paragraph(_lead(run)) for run in study.runs]
    blocks += _describe_differences(study)
    if len(study.runs) > 1:
        blocks += _tabulate_findings(study)
    return (*blocks, *make_bullets(_marked(study)), *tabulate_facts(study))


# --- the opening -------------------------------------------------------------------------------------------


def _marked(study: Study) -> list[str]:
    return [study.name(run, sentence) for run in study.runs for sentence in run.marked]


def _lead(run: RunData) -> str:
    if run.variants():
        lines = [line for line in make_lines(run) if line.models and line.models[0].row.variant]
        best = find_best(lines, run.domains)
        if not best:
            return "No variant came to its end on all of its seeds with losses that are finite numbers."
        lowest = spread_text(best[0].values(LOSS, run.domains))
        return f"Lowest mean loss: {' and '.join(line.label for line in best)}, {lowest}{run.on_split}."
    reached, before = run.loss(BTX), run.loss(SEED)
    if reached is None:
        return "This run has no finetuned mixture that was evaluated on every domain; the report shows what there is."
    parts = [f"The finetuned mixture reaches a mean loss of {loss_text(reached)} nats per token{run.on_split}"]
    if before is not None:
        parts.append(f"the seed, which was not finetuned, had {loss_text(before)}")
    compared = list(filter(None, [_compare(run, role) for role in BASELINES]))
    if not compared and before is not None:
        compared = ["nothing finetuned stands beside it, so that nothing says how much of this the mixture gave"]
    return "; ".join([*parts, *compared]) + "."


def _compare(run: RunData, role: str) -> str:
    """By how much the mixture lies above or below a baseline; empty without a number."""
    differences = differences_to(run, role)
    if differences is None or differences.mean is None or not math.isfinite(differences.mean):
        return ""
    side = "from"
    if differences.mean:
        side = "above" if differences.mean > 0 else "below"
    name = {DENSE: "the dense model", TUNED_AVERAGE: "the average, finetuned as the mixture was"}[role]
    text = f"the mixture is {loss_text(abs(differences.mean))} {side} {name}"
    own, others = run.tokens_after_seed(BTX), run.tokens_after_seed(role)
    if role != DENSE or own is None or others is None:
        return text
    if own == others:
        return f"{text} trained on as many tokens of each domain"
    text += f", which had {count_text(others)} tokens after the seed, the mixture and its experts "
    return text + count_text(own)


def tabulate_facts(study: Study) -> list[Table]:
    """A row per fact; no table without one."""
    rows = []
    for run in study.runs:
        for fact in study.facts.get(run.name, ()):
            rows.append(make_row(_VERDICTS[fact.holds], study.name(run, fact.text), fact.detail))
    caption = "Computed from this run's numbers: loss of the model, loss of what it is compared with, difference."
    return [Table(("verdict", "claim", "numbers"), tuple(rows), 3, caption)] * bool(rows)


def _tabulate_findings(study: Study) -> Iterator[Block]:
    """A table of the nine claims for every recipe of which there are runs."""
    for names, findings in study.findings.items():
        rows = []
        for each in findings:
            p = ABSENT if each.adjusted_p is None else f"{each.adjusted_p:.3f}"
            verdict = Cell(each.verdict, tone=_TONES[each.verdict])
            rows.append(make_row(verdict, f"{each.number}. {each.text}", each.detail, p))
        caption = (
            "Differences in nats per token, above zero for the claim, mean over seeds ± half of the 95 % interval (t). "
            "Supported: the interval of each lies above zero, or where a claim says no worse above "
            f"-{MARGIN}. One seed decides nothing. p: after Holm's correction for the claims that were tested."
        )
        if len(study.findings) > 1:
            caption = f"{names}. {caption}"
        yield Table(("verdict", "claim", "differences", "p"), tuple(rows), 3, caption)


# --- what was measured -------------------------------------------------------------------------------------


def _make_columns(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Heading -> the domains or tasks whose mean stands under it: each alone, then all together."""
    columns = {name: (name,) for name in names}
    return {**columns, "mean over domains" if "mean" in names else "mean": tuple(names)}


def _tabulate_losses(study: Study, caption: str = "") -> Table:
    """A row per model, and what the mixture and each baseline differ by."""
    columns = _make_columns(study.domains)
    rows = _value_rows(study.lines, LOSS, columns)
    for run in study.runs:
        for role in BASELINES:
            found = differences_to(run, role)
            if found is not None:
                values = [*map(found.domains.get, study.domains), found.mean]
                rows.append(make_row(study.name(run, f"{BTX} - {role}"), *map(difference_text, values)))
    counts = []
    for domain in study.domains:
        counted = {model.tokens[domain] for model in study.cast.models if domain in model.tokens}
        counts.append(" / ".join(map(count_text, sorted(counted))) or ABSENT)
    if set(counts) != {ABSENT}:
        rows.append(make_row("tokens evaluated", *counts, ""))
    return Table(("model", *columns), tuple(rows), caption=caption)


def _value_rows(lines: Sequence[Line], measure: str, columns: Mapping[str, Sequence[str]]) -> list[tuple[Cell, ...]]:
    """A row for each model or variant: its values, over seeds as mean ± deviation; the lowest loss is strong."""
    best: dict[str, list[Line]] = {}
    if measure == LOSS:  # of others nothing says which value is better
        best = {heading: find_best(lines, data) for heading, data in columns.items()}
    rows = []
    for line in lines:
        cells = [Cell(line.name)]
        for heading, data in columns.items():
            values = line.values(measure, data)
            text = spread_text(values) if values else ABSENT
            cells.append(Cell(text, strong=line in best.get(heading, ())))
        rows.append(tuple(cells))
    return rows


def _describe_differences(study: Study) -> list[Paragraph]:
    """What the row of the difference to the dense model is, or why there is none; nothing where none is asked for."""
    if any(differences_to(run, DENSE) for run in study.runs):
        text = "btx - dense is shown whatever it is: below zero the mixture is better. Nothing is tuned for it."
    elif any(run.asks_for(DENSE) and not run.variants() for run in study.runs):
        text = "btx - dense was not computed, because btx and dense were not both evaluated."
    else:
        return []
    return [Paragraph(text)]


def _show_losses(study: Study) -> Iterator[Block]:
    if not study.domains:
        return
    title = f"Loss{study.on_split}"
    sentences = [f"{title} in nats per token, lower is better; bold: lowest of its column."]
    points = "The same numbers as points, as many as fit. Dashed: the seed."
    seeds = sorted({model.row.seed for model in study.cast.variants() if model.row.seed is not None})
    if seeds:
        sentences.append(f"Mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}.")
        points += " Of a variant a point for each seed, and mean ± deviation."
    meant = [f"{name}: {meaning}" for name, meaning in _find_meanings(study).items()]
    if meant:
        sentences.append(f"{'; '.join(meant)}.")
    yield _tabulate_losses(study, " ".join(sentences))
    yield Image(study.prefix + "losses.png", f"{title} per model and domain", points)
    yield from _describe_differences(study)


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
    measures = dict.fromkeys(score.measure for model in cast.models for score in model.scores)
    return [measure for measure in measures if measure != LOSS]


def _tabulate_measure(study: Study, measure: str) -> Table:
    """The values of a measure: a row per model, a column per data set or task."""
    scores = [score for model in study.cast.models for score in model.scores if score.measure == measure]
    columns = _make_columns(list(dict.fromkeys(score.data for score in scores)))
    lines = [line for line in study.lines if any(model.values(measure) for model in line.models)]
    caption = f"{measure.capitalize()}{study.on_split}" + f", {scores[0].unit}" * bool(scores[0].unit)
    return Table(("model", *columns), tuple(_value_rows(lines, measure, columns)), caption=f"{caption}.")


# --- training ----------------------------------------------------------------------------------------------


def _show_training(study: Study) -> Iterator[Block]:
    if any(stage.log.curve for stage in study.runs[0].stages):
        caption = (
            "Training loss of each stage over the tokens it saw, each stage from zero. Strong: moving average over "
            "about 5 % of the stage; faint: before smoothing. Skipped steps, which trained nothing, are left out. Each "
            "panel has its own scales. The curve of an unfinished stage ends where the stage did."
        )
        yield Image(study.prefix + "curves.png", "Training loss of every stage over tokens", caption)


def find_watched(cast: Cast) -> list[tuple[Model, Stage]]:
    """The models whose loss per domain was measured more than once while a stage trained them."""
    found = []
    for model in cast.models:
        if model.stage is not None and any(len(curve) > 1 for curve in model.stage.log.watched.values()):
            found.append((model, model.stage))
    return found


def _show_watched(study: Study) -> Iterator[Block]:
    if find_watched(study.cast):
        caption = (
            f"Loss{study.on_split} of every domain, and their mean, measured while the model was trained. Each panel "
            "has its own scale. The mixture's begins with the mix. Dashed: the seed."
        )
        yield Image(study.prefix + "finetuning.png", _WATCHED_TITLE, caption)


def _show_loads(study: Study) -> Iterator[Block]:
    rows = []
    for line in study.lines:
        logs = [model.stage.log.routing for model in line.models if model.stage is not None]
        known = list(filter(None, logs))
        if not known or line.models[0].role != BTX:
            continue
        dead = [ABSENT if log.dead is None else str(log.dead) for log in known]
        layers = chain.from_iterable(log.loads for log in known)
        loads = list(chain.from_iterable(layers))
        spread = ABSENT
        if any(map(math.isnan, loads)):
            spread = "NaN"
        elif loads:
            spread = f"{percent_text(min(loads))} to {percent_text(max(loads))}"
        rows.append(make_row(line.name, ", ".join(dead), spread, percent_text(mean(log.dropped for log in known))))
    if not rows:
        return
    caption = (
        "Over the last logged interval. Dead experts: (layer, expert) cells with under 1 % of an even load, one number "
        "per seed. Load: smallest and largest share of a layer's choices that an expert got."
    )
    yield Table(("model", "dead experts", "load", "dropped"), tuple(rows), caption=caption)
    variants = find_loads(study)
    if variants:
        experts = max(len(seeds[0][0]) for seeds in variants.values())
        text = "Share of a layer's choices per expert, mean over seeds; layers from top to bottom. "
        text += f"{percent_text(1 / experts)} is even."
        yield Image(study.prefix + "load.png", "Load per layer and expert of every variant", text)


def find_loads(study: Study) -> dict[str, list[list[list[float]]]]:
    """Variant -> for every seed the load of all layers and experts, [L][E]; of one shape."""
    loads: dict[str, list[list[list[float]]]] = {}
    for model in study.cast.variants():
        if model.scores and model.stage is not None and model.stage.log.routing and model.stage.log.routing.loads:
            loads.setdefault(model.label, []).append(model.stage.log.routing.loads)
    return loads


# --- routing -----------------------------------------------------------------------------------------------


def _show_routing(study: Study) -> Iterator[Block]:
    mixtures = study.cast.mixtures()
    if not mixtures:
        return
    caption = (
        "Share of the routed (token, expert) pairs that each expert gets, per layer, for the evaluated tokens of "
        "each domain, of as many domains as fit. Layers count from the input."
    )
    yield Image(study.prefix + "routing.png", "Share of tokens per expert, layer and domain", caption)
    distances = {model.name: routing_distances(model) for model in mixtures if model.chooses_experts()}
    pairs = list(dict.fromkeys(chain.from_iterable(distances.values())))
    if pairs:
        rows = []
        for pair in pairs[:PAIRS_SHOWN]:
            cells = [loss_text(of_model.get(pair)) for of_model in distances.values()]
            rows.append(make_row(" and ".join(pair), *cells))
        caption = "Total-variation distance between two domains' expert shares, mean over layers: 0 alike, 1 disjoint."
        if len(rows) < len(pairs):
            caption += f" The first {len(rows)} of {len(pairs)} pairs; results.json has the shares of all."
        yield Table(("domains", *distances), tuple(rows), caption=caption)
    for model in mixtures:
        if model.chooses_experts():
            yield from _say_home(model)
        else:
            text = "soft routing sends every token to every expert, so that all shares are equal."
            yield Paragraph(f"{model.name}: {text}")


def _say_home(model: Model) -> Iterator[Paragraph]:
    """How often the expert of a domain's name has the largest share; nothing where no domain is named like one."""
    first = tied = cells = 0
    for domain, layers in model.routed_layers.items():
        if domain not in model.experts:
            continue
        home = model.experts.index(domain)
        for shares in layers:
            largest = max(shares) - _SAME_SHARE
            leaders = [expert for expert, share in enumerate(shares) if share >= largest]
            cells += 1
            tied += len(leaders) > 1
            first += leaders == [home]
    text = f"{model.name}: the expert of the domain's own name gets the largest share in {first} of "
    text += f"{cells} (domain, layer) cells."
    if tied:
        text += f" In {tied} no single expert does: the largest shares are equal."
    if cells:
        yield Paragraph(text)


# --- sizes, costs and data ---------------------------------------------------------------------------------


def _tabulate_sizes(cast: Cast) -> Iterator[Block]:
    """Parameters, a row for all models of one size."""
    alike: dict[tuple[int | None, int | None], list[str]] = {}
    for model in cast.measured:
        alike.setdefault((model.parameters, model.active_parameters), []).append(model.label)
    alike.pop((None, None), None)
    rows = []
    for (parameters, active), names in alike.items():
        rows.append(make_row(", ".join(names), count_text(parameters), count_text(active)))
    if rows:
        yield Table(("models", "parameters", "active per token"), tuple(rows))


def _tabulate_stages(run: RunData) -> Iterator[Block]:
    recorded = {stage.name: stage for stage in run.stages if stage.written is not None}
    if not recorded:
        return
    rows = []
    for name in TopologicalSorter({name: stage.manifest.parents for name, stage in recorded.items()}).static_order():
        if name not in recorded:  # a parent that left no manifest
            continue
        stage = recorded[name]
        label = name + f" ({stage.unfinished})" * bool(stage.unfinished)
        speed = None
        if stage.tokens and stage.manifest.seconds:
            speed = stage.tokens / stage.manifest.seconds
        tokens, seconds, flops = _sum_costs([stage])
        parents = ", ".join(stage.manifest.parents) or ABSENT
        rows.append(make_row(label, parents, tokens, seconds, count_text(speed), flops))
    tokens, seconds, flops = _sum_costs(recorded.values())
    rows.append(make_row("sum", "", tokens, seconds, ABSENT, flops))
    header = ("stage", "made from", "tokens", "seconds", "tokens/s, start included", "FLOPs")
    caption = (
        f"From the manifests; of unfinished stages, tokens and FLOPs up to where they went. {ABSENT}: the stage states "
        "none. Stages may have run side by side. Seconds are those of whole programs, their start included."
    )
    yield Table(header, tuple(rows), 2, caption)


def _tabulate_runs(study: Study) -> Iterator[Block]:
    rows = []
    for run in study.runs:
        rows.append(make_row(run.name, *_sum_costs(stage for stage in run.stages if stage.written is not None)))
    caption = "The sums of the runs' manifests. Each run's own report has its stages."
    yield Table(("run", "tokens", "seconds", "FLOPs"), tuple(rows), caption=caption)


def _sum_costs(stages: Iterable[Stage]) -> tuple[str, str, str]:
    """Tokens, seconds and FLOPs of all stages that state them, as text."""
    costs = [(stage.tokens, stage.manifest.seconds, stage.flops) for stage in stages]
    sums: list[float | None] = []
    for column in zip(*costs, strict=True):
        known = [cost for cost in column if cost is not None]
        sums.append(total(known) if known else None)
    tokens, seconds, flops = sums or (None, None, None)
    return count_text(tokens), count_text(seconds, decimals=1), ABSENT if flops is None else with_prefix(flops)


def _say_export(run: RunData) -> Iterator[Block]:
    if any(stage.name == EXPORT_STAGE and not stage.unfinished for stage in run.stages):
        text = f"The finetuned mixture and its tokenizer lie as a Hugging Face model in {_EXPORTED}, in this run's "
        text += f"folder. Every tensor was read back and verified ({EXPORT_STAGE}/{LOG_FILE}). "
        text += f'To load both: AutoModelForCausalLM.from_pretrained("{_EXPORTED}") and AutoTokenizer likewise.'
        yield Paragraph(text)


def _show_settings(run: RunData) -> Iterator[Block]:
    """What the stages that train were set to, and the versions of what made the run."""
    rows, versions = [], set()
    for stage in run.stages:
        if stage.log.curve and stage.settings:
            rows.append(make_row(stage.name, *(str(stage.settings.get(flag, ABSENT)) for flag in _SETTINGS)))
        if stage.manifest.versions is not None:
            versions.add(", ".join(f"{name} {version}" for name, version in stage.manifest.versions.items()))
    if rows:
        caption = "Megatron's flags. Every setting that decided a stage's result is in results.json, under stages."
        yield Table(("stage", *_SETTINGS), tuple(rows), caption=caption)
    for version in sorted(versions):
        yield Paragraph(f"Made by {version}.")


def show_data(run: RunData) -> Iterator[Block]:
    """The data statement, and how often each stage read its texts."""
    datasets = run.datasets
    if not datasets.rows:
        return
    rows = []
    for row in datasets.rows:
        sizes = (count_text(row.documents), count_text(row.tokens), count_text(row.size_bytes))
        rows.append(make_row(row.domain, row.split, *sizes))
    yield Table(("domain", "split", "documents", "tokens", "bytes of text"), tuple(rows), 2)
    known = {f"{DATA_STAGE}/{row.domain}.{row.split}": row.tokens for row in datasets.rows if row.tokens}
    for stage in run.stages:
        epochs = count_epochs(stage.settings, stage.tokens, known)
        read = ", ".join(f"{name.removeprefix(f'{DATA_STAGE}/')} {times:.2f}" for name, times in epochs.items())
        if read:
            yield Paragraph(f"Epochs of {stage.name}, the times that it read a text: {read}.")
    if datasets.sources:
        yield Table(("made of", "value"), tuple(make_row(*pair) for pair in datasets.sources.items()), 2)


def _say_caution(study: Study) -> list[str]:
    samples = (
        "Every stage reads each domain from its first sample on. Experts that share a domain read the same samples of "
        "it, finetuning reads some of them again, and later samples may be read by none."
    )
    if any(run.had_equal_tokens(DENSE) for run in study.runs):
        samples += " The dense model reads as many tokens of each domain, and fewer samples twice."
    seeds = "One run with one random seed. "
    if study.cast.variants():
        seeds = ""
    return [
        f"{seeds}At small sizes, losses on small sets move by about 0.1 nats between "
        "seeds: read the sign and the size of a difference, and repeat the run before relying on a small one.",
        samples,
        "Losses per token compare models of one tokenizer only. The mean weighs every domain alike, whatever its "
        "number of tokens.",
        "Facts are checked by sign. One whose inputs are missing is not checked; a model whose loss is not a finite "
        "number does not hold a claim made for it.",
        "All numbers are in results.json beside this page.",
    ]
