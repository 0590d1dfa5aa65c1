"""Routing as numbers: per label, layer and expert, from what all ranks counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_btx.common.errors import InputError
from megatron_btx.common.shares import find_dead_experts, routing_distance
from megatron_btx.evaluation.routing_counts import LayerCounts, RoutingCounts, add_up

LISTS = ("layers", "choices", "first", "probabilities", "gates", "entropy", "dropped", "dead")
"""What routing.json holds of a label, an entry per mixture layer each; see :func:`describe`."""


class Routed(NamedTuple):
    """Where the tokens of a text went, over all ranks."""

    loss: float
    """Nats per token."""
    tokens: int
    layers: list[LayerCounts]
    """Of the whole model, dense layers too."""


def route_label(model: list[Any], where: str, prefix: str) -> Routed:
    """Where the tokens of a dataset's start go."""
    from megatron.training import get_args

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.step import batches_of, forward
    from megatron_btx.model.watch import watching

    args = get_args()
    batches = batches_of(start_of(prefix, args.btx_route_tokens), where)
    counts = RoutingCounts.start(args.num_layers, args.num_experts)
    with watching(model, counts.add):
        loss, tokens = forward(model, batches)
    counts.sum_over_ranks()
    return Routed(loss, tokens, counts.by_layer())


def describe(routed: Mapping[str, Routed]) -> dict[str, dict[str, Any]]:
    """The numbers of every label; of domains that are given by two tasks or more, also of all of them together.

    Returns:
        loss and tokens, and for every mixture layer (a list each): ``layers`` its number from 0, ``choices`` [E] shares
        of all choices, ``first`` [E] shares of first choices, ``probabilities`` [E] mean of the full softmax, ``gates``
        [E] mean gate, ``entropy`` in nats, ``dropped`` share of choices, ``dead`` numbers of dead experts.
    """
    result: dict[str, dict[str, Any]] = {}
    for label, text in routed.items():
        domain, _, task = label.partition("/")
        tasks = [other for name, other in routed.items() if name.startswith(f"{domain}/")]
        if task and len(tasks) > 1 and domain not in routed and domain not in result:
            result[domain] = _describe_text(_join(tasks))
        result[label] = _describe_text(text)
    return result


def _join(texts: Sequence[Routed]) -> Routed:
    """Several texts as one."""
    tokens = sum(text.tokens for text in texts)
    loss = sum(text.loss * text.tokens for text in texts) / tokens
    layers = zip(*(text.layers for text in texts), strict=True)
    return Routed(loss, tokens, list(map(add_up, layers)))


def _describe_text(text: Routed) -> dict[str, Any]:
    return {"loss": text.loss, "tokens": text.tokens, **describe_layers(text.layers)}


def describe_layers(layers: Sequence[LayerCounts]) -> dict[str, list[Any]]:
    """The shares and means of :func:`describe` from sums; layers without tokens are dense and left out."""
    result: dict[str, list[Any]] = {name: [] for name in LISTS}
    for number, counts in enumerate(layers):
        if not counts.tokens:
            continue
        choices = _shares_of(counts.choices)
        result["layers"].append(number)
        result["choices"].append(choices)
        result["first"].append(_shares_of(counts.first))
        result["probabilities"].append(_divide(counts.probabilities, counts.tokens))
        result["gates"].append(_divide(counts.gates, counts.tokens))
        result["entropy"].append(counts.entropy / counts.tokens)
        result["dropped"].append(1.0 - sum(counts.choices) / counts.wanted)
        result["dead"].append(find_dead_experts(choices))
    return result


def _shares_of(counts: list[float]) -> list[float]:
    """Each count as a part of their sum; zeros where nothing was counted."""
    total = sum(counts)
    if not total:
        return [0.0] * len(counts)
    return _divide(counts, total)


def _divide(values: list[float], divisor: float) -> list[float]:
    return [value / divisor for value in values]


def overlap(one_LE: list[list[float]], other_LE: list[list[float]]) -> float:
    """Mean over layers of 1 less the total variation distance of two labels' shares: 1 is the same routing."""
    return 1.0 - routing_distance(one_LE, other_LE)


def overlaps(labels: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The overlap of every two labels of a model."""
    choices = {name: label["choices"] for name, label in labels.items()}
    return {one: {other: overlap(choices[one], choices[other]) for other in choices} for one in choices}


def make_table(models: Mapping[str, Any], experts: Sequence[str]) -> str:
    """For every model and label: the expert that most first choices go to, its share, entropy and dead experts."""
    lines = [
        f"{'model':<16} {'label':<20} {'most to':<14} {'share':>7} {'entropy of even':>16} {'dead':>5} {'dropped':>8}"
    ]
    for name, labels in models.items():
        for label, routed in labels.items():
            lines.append(f"{name:<16} {label:<20} {_table_cells(routed, experts)}")
    return "\n".join(lines)


def _table_cells(routed: Mapping[str, Any], experts: Sequence[str]) -> str:
    layers = len(routed["layers"])
    shares = [sum(of_expert) / layers for of_expert in zip(*routed["first"], strict=True)]
    most = shares.index(max(shares))
    entropy = sum(routed["entropy"]) / layers / math.log(max(len(experts), 2))
    dead = sum(map(len, routed["dead"]))
    dropped = sum(routed["dropped"]) / layers
    return f"{experts[most]:<14} {shares[most]:>7.1%} {entropy:>16.2f} {dead:>5} {dropped:>8.1%}"


# --- earlier analyses ----------------------------------------------------------------------------------------


def read_earlier(files: Sequence[Path], names: Sequence[str], experts: list[str]) -> dict[str, Any]:
    """The models of earlier analyses, by name, to be drawn beside those of a new one.

    Args:
        names: those of the new analysis, which no earlier model may have.

    Raises:
        InputError: a file is no routing.json, of other experts, or has a name that is taken.
    """
    models: dict[str, Any] = {}
    for file in files:
        where = f"--btx-route-beside {file}"
        found, of_experts = _read_analysis(file, where)
        if of_experts != experts:
            raise InputError(f"{where}: its experts are {', '.join(of_experts)}, expected {', '.join(experts)}")
        for name, routed in found.items():
            if name in models or name in names:
                raise InputError(f"{where}: its model {name} is there already; name one of them otherwise")
            models[name] = routed
    return models


def _read_analysis(file: Path, where: str) -> tuple[dict[str, Any], list[str]]:
    """The models of one file, and the names of their experts."""
    try:
        content = json.loads(file.read_text())
        models, experts = content["models"], content["experts"]
        for labels in models.values():
            for routed in labels.values():
                _check_numbers(routed, len(experts))
    except FileNotFoundError:
        raise InputError(f"{where}: there is no such file") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: is no routing.json of this tool ({error}); analyse that model again") from error
    return models, experts


def _check_numbers(routed: Mapping[str, Any], experts: int) -> None:
    """Check the numbers of one label against what :func:`describe` writes.

    Raises:
        ValueError, KeyError or TypeError: one of them is not as it should be.
    """
    layers = list(zip(*(routed[name] for name in LISTS), strict=True))
    if not layers:
        raise ValueError("it has no layers")
    for _, choices_E, first_E, probabilities_E, gates_E, *_ in layers:
        if {len(choices_E), len(first_E), len(probabilities_E), len(gates_E)} != {experts}:
            raise ValueError("its shares are not one per expert")
    float(routed["loss"]) + sum(routed["entropy"]) + sum(routed["dropped"])
