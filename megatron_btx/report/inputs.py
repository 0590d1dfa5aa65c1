"""What a run left behind, read for its report: evaluations, loss curves, manifests and the data statement.

Nothing here judges or draws. A part that is missing becomes a note in :attr:`RunData.notes`, so that the report
can say what is absent; a part that is there but cannot be read is an :class:`InputError`, because a report that
silently leaves out a number is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.folder import PLAN_FILE, is_set_aside, read_plan
from megatron_btx.report.numbers import mean, total
from megatron_btx.report.stages import Stage, leaves, left_out, number, parents_of, read_json, read_stage

EXPERT_PREFIX = "expert-"
REPORT_FOLDER = "report"
KNOWN_MODELS_BEFORE_EXPERTS = ("seed",)
KNOWN_MODELS_AFTER_EXPERTS = ("average", "mix", "btx", "dense")
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Model:
    """One evaluated model."""

    name: str
    losses: Mapping[str, float]
    """Validation loss per domain, nats per token; may be NaN."""
    tokens: Mapping[str, int]
    """Evaluated tokens per domain."""
    parameters: int | None = None
    active_parameters: int | None = None
    """Parameters that work on one token."""
    routing: Mapping[str, tuple[tuple[float, ...], ...]] | None = None
    """Per domain, per layer: share of the routed (token, expert) pairs per expert; each layer sums to one."""
    experts: tuple[str, ...] = ()
    """Names of the experts, in the order of the routing shares."""

    def mean_loss(self, domains: tuple[str, ...]) -> float | None:
        """Unweighted mean over ``domains``, or None when one of them was not evaluated."""
        if not domains or any(domain not in self.losses for domain in domains):
            return None
        return mean(self.losses[domain] for domain in domains)


@dataclass(frozen=True)
class CorpusRow:
    """One split of one domain's corpus, as corpora.json states it; None where it does not."""

    domain: str
    split: str
    documents: int | None
    tokens: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class RunData:
    """Everything the report is computed from."""

    name: str
    models: Mapping[str, Model]
    domains: tuple[str, ...]
    stages: tuple[Stage, ...]
    corpora: tuple[CorpusRow, ...]
    sources: Mapping[str, str]
    """What corpora.json says beside the sizes (sources, versions, seeds): dotted key -> value."""
    notes: tuple[str, ...]
    """What is absent, or broken; one sentence each."""
    marked: tuple[str, ...] = ()
    """What was left out or went a part of its way only; one sentence each."""


def read_run(run: Path) -> RunData:
    """Read the run directory ``run``. Raises InputError when it is none, or when a file in it is broken."""
    if not run.is_dir():
        raise InputError(f"{run}: no such directory; expected a run directory such as runs/quickstart, made by btx run")
    folders = sorted(folder for folder in run.iterdir() if folder.is_dir() and folder.name != REPORT_FOLDER)
    folders = [folder for folder in folders if not is_set_aside(folder.name)]
    found = [stage for folder in folders if (stage := read_stage(folder)) is not None]
    reasons = left_out(run, {stage.name: stage.manifest for stage in found})
    stages = [stage for stage in found if stage.name not in reasons]
    kept = [folder for folder in folders if folder.name not in reasons]
    evaluations = [path for folder in kept if (path := folder / "evaluation.json").is_file()]
    models = read_evaluations(evaluations)
    corpora, sources = _read_corpora(run / "data" / "corpora.json") if "data" not in reasons else ([], {})
    if not found and not models and not corpora:
        raise InputError(
            f"{run}: not a run directory: no */manifest.json, */metrics.jsonl, */evaluation.json or data/corpora.json "
            "in it; give the directory that btx run made, or run the recipe first"
        )
    domains = tuple(dict.fromkeys(domain for model in models.values() for domain in model.losses))
    strange = [path.parent.name for path in evaluations if path.parent.name not in {stage.name for stage in stages}]
    strange = strange if read_plan(run / PLAN_FILE) is not None else []
    notes = tuple(_notes(models, stages, bool(corpora)))
    marked = tuple(_marked(reasons, stages, strange))
    return RunData(run.resolve().name, models, domains, tuple(stages), tuple(corpora), sources, notes, marked)


def _marked(reasons: Mapping[str, str], stages: list[Stage], strange: list[str]) -> Iterator[str]:
    """What the report leaves out, what it shows in part, and evaluations that no stage of the run made."""
    for why in dict.fromkeys(reasons.values()):
        yield f"Left out: {', '.join(name for name in reasons if reasons[name] == why)}: {why}."
    unfinished = {stage.name: stage.unfinished for stage in stages if stage.unfinished}
    for name, where in unfinished.items():
        yield f"Stage {name} is unfinished: {where}. Its curve, tokens and FLOPs are those up to there."
    for name in unfinished:
        finished = [stage for stage in stages if stage.name not in unfinished]
        earlier = [stage.name for stage in finished if name in parents_of(stage.manifest)]
        if earlier:
            yield f"Made before {name} started again: {', '.join(earlier)}."
    for name in strange:
        yield f"{name}/evaluation.json has no manifest: nothing says of which models it is."


def read_evaluations(paths: list[Path]) -> dict[str, Model]:
    """Merge evaluation files into one model per name, in the report's order.

    Raises InputError when a file is broken, or when two files give one model different losses on one domain.
    """
    models: dict[str, Model] = {}
    for path in paths:
        content = read_json(path)
        if not isinstance(content.get("models"), dict):
            raise InputError(f"{path}: no mapping 'models'; expected an evaluation.json; evaluate the run again")
        for name, entry in content["models"].items():
            model = _model(path, str(name), entry, content.get("experts"))
            models[model.name] = _merged(path, models[model.name], model) if model.name in models else model
    return {name: models[name] for name in sorted(models, key=_model_rank)}


def _model(path: Path, name: str, entry: Any, experts: Any) -> Model:
    try:
        losses = {str(domain): float(loss) for domain, loss in entry["losses"].items()}
        tokens = {str(domain): int(count) for domain, count in entry.get("tokens", {}).items()}
        if any(abs(count) >= 2**63 for count in tokens.values()):
            raise ValueError("a number of tokens that cannot be")
        names = tuple(str(expert) for expert in experts or ())
        routing = {
            str(domain): tuple(_shares(layer, len(names)) for layer in layers)
            for domain, layers in (entry.get("routing") or {}).items()
        }
        if len({len(layers) for layers in routing.values()}) > 1:
            raise ValueError("the domains' routing differs in its number of layers")
        parameters, active = (_count(entry, key) for key in ("parameters", "active_parameters"))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: model {name!r} is not in the form of an evaluation ({error!r}); evaluate the run again"
        ) from error
    return Model(name, losses, tokens, parameters, active, routing or None, names if routing else ())


def _count(entry: Mapping[str, Any], key: str) -> int | None:
    stated = number(entry, key)
    return None if stated is None else int(stated)


def _shares(layer: list[float], experts: int) -> tuple[float, ...]:
    """Shares that sum to one; counts, or shares that sum to k under top-k, describe the same distribution."""
    if len(layer) != experts:
        raise ValueError(f"{len(layer)} shares in a layer for {experts} experts")
    whole = total(layer)
    return tuple(share / whole for share in layer) if whole > 0 else tuple(math.nan for _ in layer)


def _merged(path: Path, first: Model, second: Model) -> Model:
    for domain, loss in second.losses.items():
        known = first.losses.get(domain, loss)
        if known != loss and not (math.isnan(known) and math.isnan(loss)):
            raise InputError(
                f"{path}: model {first.name!r} has loss {loss} on {domain!r}, another evaluation.json of the run "
                f"says {known}; remove the one that is out of date"
            )
    if first.routing and second.routing and first.experts != second.experts:
        raise InputError(f"{path}: model {first.name!r}: experts {second.experts}, elsewhere {first.experts}")
    routing = {**(first.routing or {}), **(second.routing or {})}
    if len({len(layers) for layers in routing.values()}) > 1:
        raise InputError(f"{path}: model {first.name!r}: another number of layers than elsewhere; evaluate it again")
    return Model(
        first.name,
        {**first.losses, **second.losses},
        {**first.tokens, **second.tokens},
        first.parameters if second.parameters is None else second.parameters,
        first.active_parameters if second.active_parameters is None else second.active_parameters,
        routing or None,
        first.experts or second.experts,
    )


def _model_rank(name: str) -> tuple[int, int]:
    if name in KNOWN_MODELS_BEFORE_EXPERTS:
        return 0, KNOWN_MODELS_BEFORE_EXPERTS.index(name)
    if name.startswith(EXPERT_PREFIX):
        return 1, 0
    if name in KNOWN_MODELS_AFTER_EXPERTS:
        return 2, KNOWN_MODELS_AFTER_EXPERTS.index(name)
    return 3, 0


def _read_corpora(path: Path) -> tuple[list[CorpusRow], dict[str, str]]:
    if not path.is_file():
        return [], {}
    content = read_json(path)
    rows: list[CorpusRow] = []
    for where, entry in _mappings(content):
        if where and where[-1] in SPLITS and ("documents" in entry or "bytes" in entry):
            domain = next((part for part in reversed(where[:-1]) if part not in ("splits", "files")), "?")
            sizes = [_size(entry, key) for key in _SIZES]
            rows.append(CorpusRow(domain, where[-1], *sizes))
    sources = {
        key: str(value) for key, value in leaves(content) if not set(key.split(".")) & {*SPLITS, "sha256", "format"}
    }
    return rows, sources


_SIZES = ("documents", "tokens", "bytes")


def _size(entry: Mapping[str, Any], key: str) -> int | None:
    size = number(entry, key)
    return int(size) if size is not None and math.isfinite(size) else None


def _mappings(node: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if isinstance(node, dict):
        yield where, node
        for key, value in node.items():
            yield from _mappings(value, (*where, str(key)))


def _notes(models: Mapping[str, Model], stages: list[Stage], has_corpora: bool) -> Iterator[str]:
    for name in (*KNOWN_MODELS_BEFORE_EXPERTS, *KNOWN_MODELS_AFTER_EXPERTS):
        if name not in models:
            yield f"No evaluation of a model named {name}."
    if not any(name.startswith(EXPERT_PREFIX) for name in models):
        yield f"No evaluation of single experts (models named {EXPERT_PREFIX}<domain>)."
    for model in models.values():
        for domain, loss in model.losses.items():
            if not math.isfinite(loss):
                yield f"The loss of {model.name} on {domain} is not a finite number: {loss}."
    if not any(model.routing for model in models.values()):
        yield "No routing was recorded."
    for stage in stages:
        if stage.manifest is None:
            yield f"Stage {stage.name} has a loss curve and no manifest: it is unfinished, or was stopped."
        if broken := sum(not math.isfinite(loss) for _, loss in stage.curve):
            yield f"Stage {stage.name}: the training loss is not a finite number at {broken} iterations."
    if not any(stage.curve for stage in stages):
        yield "No loss curves: no stage of this run trained."
    if not has_corpora:
        yield "No data statement (data/corpora.json): the corpora were given, not made by this run."
