"""Routing as numbers: counted while a model runs, and described per label, layer and expert.

Axes: ``L`` layers, ``E`` experts, ``S`` sequence, ``B`` batch, ``H`` hidden, ``T`` tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_btx.common.errors import InputError
from megatron_btx.common.files import read_json_object
from megatron_btx.common.shares import find_dead_experts
from megatron_btx.model.step import batches_of, forward

LISTS = ("layers", "choices", "first", "probabilities", "gates", "entropy", "dropped", "dead")
"""What routing.json holds of a label, an entry per mixture layer each; see :func:`describe`."""


@dataclass(frozen=True)
class RoutingCounts:
    """The sums of all layers, fp64. A dense layer has zeros alone."""

    choices_LE: torch.Tensor
    """How often each expert was chosen, without the choices that were dropped."""
    first_LE: torch.Tensor
    """How often each expert had a token's largest gate; a token whose choices were all dropped counts for none."""
    probabilities_LE: torch.Tensor
    """Sum of the full softmax."""
    gates_LE: torch.Tensor
    entropy_L: torch.Tensor
    """Sum of the entropies of the full softmax, in nats."""
    tokens_L: torch.Tensor
    wanted_L: torch.Tensor
    """Choices before drops."""
    buffer: torch.Tensor
    """Holds the numbers of all the others, which are views of it: one all-reduce sums them."""

    @classmethod
    def start(cls, layers: int, experts: int, device: str | torch.device = "cuda") -> RoutingCounts:
        """Counts of nothing yet."""
        buffer = torch.zeros(layers, 4 * experts + 3, dtype=torch.float64, device=device)
        choices_LE, first_LE, probabilities_LE, gates_LE, rest = buffer.split([experts] * 4 + [3], dim=1)
        entropy_L, tokens_L, wanted_L = rest.unbind(dim=1)
        return cls(choices_LE, first_LE, probabilities_LE, gates_LE, entropy_L, tokens_L, wanted_L, buffer)

    def add(self, layer: int, router: Any, x_SBH: torch.Tensor, outputs: Any) -> None:
        """Count one forward pass of a router; called by :func:`megatron_btx.model.watch.watching`.

        Args:
            x_SBH: what went into the router.
            outputs: gates and, boolean, taken experts, [S B, E] each.
        """
        experts = self.choices_LE.size(1)
        gates_TE, map_TE = outputs[0].reshape(-1, experts), outputs[1].reshape(-1, experts)
        log_TE = torch.log_softmax(router.gating(x_SBH).reshape(-1, experts).float(), dim=-1)
        first_TE = torch.nn.functional.one_hot(gates_TE.argmax(dim=-1), experts) * map_TE  # none where all was dropped
        tokens = len(log_TE)
        self.choices_LE[layer] += map_TE.sum(dim=0)
        self.first_LE[layer] += first_TE.sum(dim=0)
        self.probabilities_LE[layer] += log_TE.exp().double().sum(dim=0)
        self.gates_LE[layer] += gates_TE.double().sum(dim=0)
        self.entropy_L[layer] -= (log_TE.exp() * log_TE).double().sum()
        self.tokens_L[layer] += tokens
        self.wanted_L[layer] += tokens * router.topk


class Routed(NamedTuple):
    """Where the tokens of a text went, over all ranks."""

    loss: float
    """Nats per token."""
    tokens: int
    counts: RoutingCounts
    """Of the whole model, dense layers too."""
    stderr: float | None = None
    """Of the loss; see :class:`megatron_btx.model.step.MeanLoss`."""


def route(model: list[Any], where: str, prefix: str, tokens: int) -> Routed:
    """Where the first ``tokens`` of a dataset go."""
    from megatron.training import get_args

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.watch import watching

    args = get_args()
    batches = batches_of(start_of(prefix, tokens), where)
    counts = RoutingCounts.start(args.num_layers, args.num_experts)
    with watching(model, counts.add):
        loss = forward(model, batches)
    torch.distributed.all_reduce(counts.buffer)  # every token was counted by one rank
    return Routed(loss.nats, loss.tokens, counts, loss.stderr)


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
            whole = _join(tasks)
            result[domain] = {"loss": whole.loss, "tokens": whole.tokens, **describe_layers(whole.counts)}
        result[label] = {"loss": text.loss, "tokens": text.tokens, **describe_layers(text.counts)}
    return result


def _join(texts: Sequence[Routed]) -> Routed:
    tokens = sum(text.tokens for text in texts)
    loss = sum(text.loss * text.tokens for text in texts) / tokens
    layers, experts = texts[0].counts.choices_LE.shape
    counts = RoutingCounts.start(layers, experts, texts[0].counts.buffer.device)
    for text in texts:
        counts.buffer.add_(text.counts.buffer)
    return Routed(loss, tokens, counts)


def describe_layers(counts: RoutingCounts) -> dict[str, list[Any]]:
    """The shares and means of :func:`describe` from sums; layers without tokens are dense and left out."""
    kept_L = counts.tokens_L.nonzero().flatten()
    tokens_L, choices_LE = counts.tokens_L[kept_L], counts.choices_LE[kept_L]
    shares_LE = divide_up(choices_LE)
    found = {
        "layers": kept_L,
        "choices": shares_LE,
        "first": divide_up(counts.first_LE[kept_L]),
        "probabilities": counts.probabilities_LE[kept_L] / tokens_L[:, None],
        "gates": counts.gates_LE[kept_L] / tokens_L[:, None],
        "entropy": counts.entropy_L[kept_L] / tokens_L,
        "dropped": 1.0 - choices_LE.sum(dim=1) / counts.wanted_L[kept_L],
    }
    numbers = {name: tensor.tolist() for name, tensor in found.items()}
    return {**numbers, "dead": list(map(find_dead_experts, numbers["choices"]))}


def divide_up(counts_LE: torch.Tensor) -> torch.Tensor:
    """Each count as a share of its layer's; zeros where nothing was counted."""
    return counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)


def make_table(models: Mapping[str, Any], experts: Sequence[str]) -> str:
    """For every model and label: the expert that most first choices go to, its share, entropy and dead experts."""
    lines = [
        f"{'model':<16} {'label':<20} {'most to':<14} {'share':>7} {'entropy of even':>16} {'dead':>5} {'dropped':>8}"
    ]
    for name, labels in models.items():
        for label, routed in labels.items():
            layers = len(routed["layers"])
            shares = [sum(of_expert) / layers for of_expert in zip(*routed["first"], strict=True)]
            most = shares.index(max(shares))
            entropy = sum(routed["entropy"]) / layers / math.log(max(len(experts), 2))
            dead, dropped = sum(map(len, routed["dead"])), sum(routed["dropped"]) / layers
            cells = f"{experts[most]:<14} {shares[most]:>7.1%} {entropy:>16.2f} {dead:>5} {dropped:>8.1%}"
            lines.append(f"{name:<16} {label:<20} {cells}")
    return "\n".join(lines)


def read_earlier(files: Sequence[Path], names: Sequence[str], experts: list[str]) -> dict[str, Any]:
    """The models of earlier analyses, by name, to be drawn beside those of a new one.

    Args:
        names: those of the new analysis, which no earlier model may have.

    Raises:
        InputError: a file is no routing.json, of other experts, or has a name that is taken.
    """
    models: dict[str, Any] = {}
    for file in files:
        where, again = f"--btx-route-beside {file}", "analyse that model again"
        content = read_json_object(file, again)
        try:
            for labels in content["models"].values():
                for routed in labels.values():
                    operator.itemgetter(*LISTS)(routed)
            found, same = ", ".join(content["experts"]), content["experts"] == experts
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: is no routing.json of this tool ({error}); {again}") from error
        if not same:
            raise InputError(f"{where}: its experts are {found}, expected {', '.join(experts)}")
        for name, labels in content["models"].items():
            if name in models or name in names:
                raise InputError(f"{where}: its model {name} is there already; name one of them otherwise")
            models[name] = labels
    return models
