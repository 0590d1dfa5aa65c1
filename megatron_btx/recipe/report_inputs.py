"""What a run left behind, read for its report: evaluations, loss curves, manifests and the data statement.

Nothing here judges or draws. A part that is missing becomes a note in :attr:`RunData.notes`, so that the report
can say what is absent; a part that is there but cannot be read is an :class:`InputError`, because a report that
silently leaves out a number is worse than none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.errors import InputError
from megatron_btx.recipe.folder import is_set_aside

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
        return math.fsum(self.losses[domain] for domain in domains) / len(domains)


@dataclass(frozen=True)
class Stage:
    """One directory of the run that holds a manifest or a loss curve."""

    name: str
    manifest: Mapping[str, Any] | None
    curve: tuple[tuple[int, float], ...]
    """(iteration, training loss in nats per token), ascending; empty for a stage that does not train."""
    tokens_per_iteration: float | None


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
    """What is absent, unfinished or could not be read in part; one sentence each."""


def read_run(run: Path) -> RunData:
    """Read the run directory ``run``. Raises InputError when it is none, or when a file in it is broken."""
    if not run.is_dir():
        raise InputError(f"{run}: no such directory; expected a run directory such as runs/quickstart, made by btx run")
    folders = sorted(folder for folder in run.iterdir() if folder.is_dir() and folder.name != REPORT_FOLDER)
    folders = [folder for folder in folders if not is_set_aside(folder.name)]
    stages = [stage for folder in folders if (stage := _read_stage(folder)) is not None]
    models = read_evaluations([path for folder in folders if (path := folder / "evaluation.json").is_file()])
    corpora, sources = _read_corpora(run / "data" / "corpora.json")
    if not stages and not models and not corpora:
        raise InputError(
            f"{run}: not a run directory: no */manifest.json, */metrics.jsonl, */evaluation.json or data/corpora.json "
            "in it; give the directory that btx run made, or run the recipe first"
        )
    domains = tuple(dict.fromkeys(domain for model in models.values() for domain in model.losses))
    notes = tuple(_notes(models, stages, bool(corpora)))
    return RunData(run.resolve().name, models, domains, tuple(stages), tuple(corpora), sources, notes)


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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; InputError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: broken JSON ({error}); run the stage that writes it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found JSON of type {type(content).__name__}, expected an object")
    return content


def _model(path: Path, name: str, entry: Any, experts: Any) -> Model:
    try:
        losses = {str(domain): float(loss) for domain, loss in entry["losses"].items()}
        tokens = {str(domain): int(count) for domain, count in entry.get("tokens", {}).items()}
        names = tuple(str(expert) for expert in experts or ())
        routing = {
            str(domain): tuple(_shares(layer, len(names)) for layer in layers)
            for domain, layers in (entry.get("routing") or {}).items()
        }
        if len({len(layers) for layers in routing.values()}) > 1:
            raise ValueError("the domains' routing differs in its number of layers")
        parameters, active = entry.get("parameters"), entry.get("active_parameters")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: model {name!r} is not in the form of an evaluation ({error!r}); evaluate the run again"
        ) from error
    return Model(name, losses, tokens, parameters, active, routing or None, names if routing else ())


def _shares(layer: list[float], experts: int) -> tuple[float, ...]:
    """Shares that sum to one; counts, or shares that sum to k under top-k, describe the same distribution."""
    if len(layer) != experts:
        raise ValueError(f"{len(layer)} shares in a layer for {experts} experts")
    total = math.fsum(layer)
    return tuple(share / total for share in layer) if total > 0 else tuple(math.nan for _ in layer)


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
    return Model(
        first.name,
        {**first.losses, **second.losses},
        {**first.tokens, **second.tokens},
        first.parameters if second.parameters is None else second.parameters,
        first.active_parameters if second.active_parameters is None else second.active_parameters,
        {**(first.routing or {}), **(second.routing or {})} or None,
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


def _read_stage(folder: Path) -> Stage | None:
    manifest_path, metrics_path = folder / "manifest.json", folder / "metrics.jsonl"
    if not manifest_path.is_file() and not metrics_path.is_file():
        return None
    manifest = read_json(manifest_path) if manifest_path.is_file() else None
    curve = read_curve(metrics_path) if metrics_path.is_file() else ()
    return Stage(folder.name, manifest, curve, _tokens_per_iteration(folder, manifest, curve))


def read_curve(path: Path) -> tuple[tuple[int, float], ...]:
    """Training loss per iteration from a metrics.jsonl, the last line for an iteration counting.

    A line torn by a kill is passed over: the resumed run wrote its iterations again, behind it.
    """
    losses: dict[int, float] = {}
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    readable = 0
    for line in lines:
        try:
            entry = json.loads(line)
            iteration, loss = int(entry["iteration"]), entry.get("lm loss")
        except (ValueError, TypeError, KeyError):
            continue
        readable += 1
        if loss is not None:
            losses[iteration] = float(loss)
    if lines and not readable:
        raise InputError(f"{path}: none of its {len(lines)} lines is a JSON object with an iteration; remove it, rerun")
    return tuple(sorted(losses.items()))


def _tokens_per_iteration(folder: Path, manifest: Mapping[str, Any] | None, curve: Any) -> float | None:
    tokens = number(manifest, "tokens")
    if tokens and curve:
        return tokens / float(curve[-1][0])
    settings: dict[str, Any] = {}
    if (folder / "config.yaml").is_file():
        try:
            settings = dict(_leaves(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))))
        except yaml.YAMLError as error:
            raise InputError(f"{folder / 'config.yaml'}: broken YAML ({error}); run the stage again") from error
    by_flag = {key.rsplit(".", 1)[-1].lstrip("-").replace("_", "-"): value for key, value in settings.items()}
    sequence, batch = by_flag.get("seq-length"), by_flag.get("global-batch-size")
    return float(sequence) * float(batch) if sequence and batch else None


def number(manifest: Mapping[str, Any] | None, key: str) -> float | None:
    """A manifest's number, or None where it states none."""
    value = (manifest or {}).get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_corpora(path: Path) -> tuple[list[CorpusRow], dict[str, str]]:
    if not path.is_file():
        return [], {}
    content = read_json(path)
    rows: list[CorpusRow] = []
    for where, entry in _mappings(content):
        if where and where[-1] in SPLITS and ("documents" in entry or "bytes" in entry):
            domain = next((part for part in reversed(where[:-1]) if part not in ("splits", "files")), "?")
            sizes = [int(size) if (size := number(entry, key)) is not None else None for key in _SIZES]
            rows.append(CorpusRow(domain, where[-1], *sizes))
    sources = {
        key: str(value) for key, value in _leaves(content) if not set(key.split(".")) & {*SPLITS, "sha256", "format"}
    }
    return rows, sources


_SIZES = ("documents", "tokens", "bytes")


def _mappings(node: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if isinstance(node, dict):
        yield where, node
        for key, value in node.items():
            yield from _mappings(value, (*where, str(key)))


def _leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        yield where, ", ".join(str(item) for item in node)
    else:
        yield where, node


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
