"""Sections of a report about sizes, costs and data, and about how to read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_btx.recipe.names import DATA_STAGE, EXPORT_STAGE, EXPORTED_FOLDER, LOG_FILE
from megatron_btx.report.blocks import Block, Bullets, Cell, Paragraph, Section, Table, make_row
from megatron_btx.report.budgets import Budgets
from megatron_btx.report.datasets import Datasets
from megatron_btx.report.inputs import RunData
from megatron_btx.report.quantities import ABSENT, count_text, total
from megatron_btx.report.stages import Stage
from megatron_btx.runner.tables import count_epochs, with_prefix

_EXPORTED = f"{EXPORT_STAGE}/{EXPORTED_FOLDER}"
_SETTINGS = ("lr", "min-lr", "lr-decay-style", "global-batch-size", "seq-length", "weight-decay", "clip-grad", "seed")
"""Of a stage that trains, as the report shows them."""


def sizes_section(data: RunData) -> Section:
    """Parameters, a row for all models of one size."""
    alike: dict[tuple[int | None, int | None], list[str]] = {}
    for model in data.models.values():
        alike.setdefault((model.parameters, model.active_parameters), []).append(model.name)
    if not alike:
        return Section("Sizes", ())
    rows = []
    for (parameters, active), names in alike.items():
        rows.append(make_row(", ".join(names), count_text(parameters), count_text(active)))
    return Section("Sizes", (Table(("models", "parameters", "active per token"), tuple(rows)),))


def accounting_section(stages: tuple[Stage, ...]) -> Section:
    """What each stage took, and all together."""
    recorded = [stage for stage in stages if stage.manifest is not None]
    if not recorded:
        return Section("Accounting", ())
    depths = _count_depths(recorded)
    recorded.sort(key=lambda stage: depths[stage.name])
    rows = list(map(_stage_row, recorded))
    costs = zip(*((stage.tokens, stage.seconds, stage.flops) for stage in recorded), strict=True)
    sums = _cost_texts(*map(_sum_known, costs))
    rows.append(make_row("sum", "", *sums))
    header = ("stage", "made from", "tokens", "seconds", "tokens/s, start included", "FLOPs")
    caption = (
        f"From the manifests; of unfinished stages, tokens and FLOPs up to where they went. {ABSENT}: the stage states "
        "none. Stages may have run side by side. Seconds are those of whole programs, their start included."
    )
    return Section("Accounting", (Table(header, tuple(rows), 2, caption),))


def _count_depths(stages: Sequence[Stage]) -> dict[str, int]:
    """How many stages each one stands behind, by the manifests' parents: the order in which they can have run."""
    depths = {stage.name: 0 for stage in stages}
    for _ in stages:
        for stage in stages:
            behind = [depths[parent] + 1 for parent in stage.parents if parent in depths and parent != stage.name]
            depths[stage.name] = max(behind, default=0)
    return depths


def _stage_row(stage: Stage) -> tuple[Cell, ...]:
    name = stage.name
    if stage.unfinished:
        name += f" ({stage.unfinished})"
    costs = _cost_texts(stage.tokens, stage.seconds, stage.flops, has_speed=True)
    return make_row(name, ", ".join(stage.parents) or ABSENT, *costs)


def _sum_known(costs: Iterable[float | None]) -> float | None:
    """The sum of those that are stated; None where none is."""
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    return total(known)


def _cost_texts(
    tokens: float | None, seconds: float | None, flops: float | None, *, has_speed: bool = False
) -> tuple[str, ...]:
    speed, operations = None, ABSENT
    if has_speed and tokens and seconds:
        speed = tokens / seconds
    if flops is not None:
        operations = with_prefix(flops)
    return count_text(tokens), count_text(seconds, decimals=1), count_text(speed), operations


def export_section(stages: tuple[Stage, ...]) -> Section:
    """Where the exported model lies, and how it is loaded."""
    blocks = []
    for stage in stages:
        if stage.name == EXPORT_STAGE and not stage.unfinished:
            text = f"The finetuned mixture and its tokenizer lie as a Hugging Face model in {_EXPORTED}, in this run's "
            text += f"folder. Every tensor was read back and verified ({EXPORT_STAGE}/{LOG_FILE}). "
            text += f'To load both: AutoModelForCausalLM.from_pretrained("{_EXPORTED}") and AutoTokenizer likewise.'
            blocks.append(Paragraph(text))
    return Section("Export", tuple(blocks))


def settings_section(stages: tuple[Stage, ...]) -> Section:
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


def data_section(datasets: Datasets, stages: tuple[Stage, ...]) -> Section:
    """The data statement, and how often each stage read its texts."""
    if not datasets.rows:
        return Section("Data", ())
    rows = []
    for row in datasets.rows:
        sizes = (count_text(row.documents), count_text(row.tokens), count_text(row.size_bytes))
        rows.append(make_row(row.domain, row.split, *sizes))
    blocks: list[Block] = [Table(("domain", "split", "documents", "tokens", "bytes of text"), tuple(rows), 2)]
    known = {f"{DATA_STAGE}/{row.domain}.{row.split}": row.tokens for row in datasets.rows if row.tokens}
    for stage in stages:
        epochs = count_epochs(stage.settings, stage.tokens, known)
        read = ", ".join(f"{name.removeprefix(f'{DATA_STAGE}/')} {times:.2f}" for name, times in epochs.items())
        if read:
            blocks.append(Paragraph(f"Epochs of {stage.name}, the times that it read a text: {read}."))
    if datasets.sources:
        stated = [make_row(*pair) for pair in datasets.sources.items()]
        blocks.append(Table(("made of", "value"), tuple(stated), 2))
    return Section("Data", tuple(blocks))


def reading_section(budgets: Budgets) -> Section:
    """What to keep in mind."""
    samples = (
        "Every stage reads each domain from its first sample on. Experts that share a domain read the same samples of "
        "it, finetuning reads some of them again, and later samples may be read by none."
    )
    if budgets.are_equal():
        samples += " The dense model reads as many tokens of each domain, and fewer samples twice."
    items = (
        "One run with one random seed. At small sizes, losses on small sets move by about 0.1 nats between "
        "seeds: read the sign and the size of a difference, and repeat the run before relying on a small one.",
        samples,
        "Losses per token compare models of one tokenizer only. The mean weighs every domain alike, whatever its "
        "number of tokens.",
        "Facts are checked by sign. One whose inputs are missing is not checked; a model whose loss is not a finite "
        "number does not hold a claim made for it.",
        "All numbers are in results.json beside this page.",
    )
    return Section("How to read this", (Bullets(items),))
