"""Where the tokens of a text went: sums per layer and expert, counted while a model runs.

Axes: ``L`` layers, ``E`` experts, ``S`` sequence, ``B`` batch, ``H`` hidden, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class LayerCounts(NamedTuple):
    """The sums of one layer, as plain numbers. A dense layer has zeros alone."""

    choices: list[float]
    """How often each expert was chosen, without the choices that were dropped."""
    first: list[float]
    """How often each expert had a token's largest gate; a token whose choices were all dropped counts for none."""
    probabilities: list[float]
    """Sum of the full softmax, per expert."""
    gates: list[float]
    """Sum of the gates, per expert."""
    entropy: float
    """Sum of the entropies of the full softmax, in nats."""
    tokens: float
    wanted: float
    """Choices before drops."""


@dataclass(frozen=True)
class RoutingCounts:
    """The sums of all layers, fp64, as tensors that count. They have the meaning of :class:`LayerCounts`."""

    choices_LE: torch.Tensor
    first_LE: torch.Tensor
    probabilities_LE: torch.Tensor
    gates_LE: torch.Tensor
    entropy_L: torch.Tensor
    tokens_L: torch.Tensor
    wanted_L: torch.Tensor
    buffer: torch.Tensor
    """Holds the numbers of all the others, which are views of it: one all-reduce sums them."""

    @classmethod
    def start(cls, layers: int, experts: int, device: str = "cuda") -> RoutingCounts:
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

    def sum_over_ranks(self) -> None:
        """Make the counts those of all ranks; every token was counted by one of them."""
        torch.distributed.all_reduce(self.buffer)

    def by_layer(self) -> list[LayerCounts]:
        """The same as plain numbers."""
        lists = (self.choices_LE, self.first_LE, self.probabilities_LE, self.gates_LE)
        sums = (*lists, self.entropy_L, self.tokens_L, self.wanted_L)
        layers = zip(*(tensor.tolist() for tensor in sums), strict=True)
        return list(map(LayerCounts._make, layers))


def add_up(parts: Sequence[LayerCounts]) -> LayerCounts:
    """The counts of one layer over several texts together."""
    *lists, entropies, tokens, wanted = zip(*parts, strict=True)
    added = ([sum(cells) for cells in zip(*columns, strict=True)] for columns in lists)
    return LayerCounts._make([*added, sum(entropies), sum(tokens), sum(wanted)])
