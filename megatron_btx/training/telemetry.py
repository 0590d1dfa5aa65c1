"""Routing you can watch while a mixture trains: load, entropy, dropped tokens and dead experts, per layer.

Megatron logs its balancing losses through one tracker (``core/transformer/moe/moe_logging.py``). Here that tracker is
extended: routers add to sums on the device at every micro-batch, and at each logged step one all-reduce makes them the
shares of the whole interval, which go where Megatron's scalars go (TensorBoard, W&B, ``--btx-metrics``).
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_btx.common.shares import DEAD_SHARE
from megatron_btx.engine import patch
from megatron_btx.engine.patch import Call
from megatron_btx.model.watch import taken_experts
from megatron_btx.training.hooks import log_scalars


def install(args: argparse.Namespace) -> Callable[[list[Any]], list[Any]]:
    """Extend Megatron's tracker of mixtures, and return the hook that makes a model's routers report to it.

    Returns:
        a hook for ``GPTModelConfig.pre_wrap_hooks``.

    Raises:
        MegatronVersionError: the installed Megatron has no such tracker.
    """
    from megatron.core.transformer.moe import moe_logging

    patch.expect(moe_logging, "MoEMetricsTracker")
    sums = RoutingSums(args.num_layers, args.num_experts)

    def report(make_line: Call, *rest: object, iteration: int, **named: object) -> str:
        line: str = make_line(*rest, iteration=iteration, **named)
        if iteration % args.log_interval:
            return line
        logged, text = describe(sums.take(), sums.experts)
        log_scalars(logged, iteration)
        return line + text

    patch.around(moe_logging.MoEMetricsTracker, "report", report)

    def observed(
        router: TopKRouter, routing: Call, logits: torch.Tensor, *rest: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gates_TE, map_TE = routing(logits, *rest, **named)
        if router.training and torch.is_grad_enabled():  # once per token even where it is recomputed
            taken_TE = taken_experts(router, gates_TE, map_TE)
            sums.add(router.layer_number - 1, logits.detach().reshape(-1, sums.experts), taken_TE, router.topk)
        return gates_TE, map_TE

    def hook(model: list[Any]) -> list[Any]:
        for chunk in model:
            for module in chunk.modules():
                if isinstance(module, TopKRouter) and not module.is_mtp_layer:
                    # Wrapped on the module itself, because a forward hook does not see the logits.
                    patch.around(module, "routing", functools.partial(observed, module))
        return model

    return hook


class RoutingSums:
    """Sums over tokens of what the routers did since the last report: one row per layer, on the device.

    A row holds the choices per expert, the entropy in nats, the tokens, and the choices before any were dropped.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts
        self._rows: torch.Tensor | None = None
        self._tokens, self._wanted = [0] * layers, [0] * layers

    def add(self, layer: int, logits_TE: torch.Tensor, map_TE: torch.Tensor, topk: int) -> None:
        """Add one router's micro-batch.

        Args:
            layer: from 0.
            map_TE: boolean, after the capacity has dropped what it drops.
            topk: choices per token before dropping.
        """
        # Few operations, because a small model's step is short; what is no tensor is counted apart.
        with torch.no_grad():
            if self._rows is None:
                self._rows = torch.zeros(self.layers, self.experts + 3, dtype=torch.float64, device=logits_TE.device)
            row = self._rows[layer]
            row[: self.experts] += map_TE.sum(dim=0)
            row[self.experts] += torch.special.entr(torch.softmax(logits_TE.float(), dim=-1)).sum()
        tokens = logits_TE.shape[0]
        self._tokens[layer] += tokens
        self._wanted[layer] += topk * tokens

    def take(self) -> torch.Tensor:
        """The sums over all ranks, [L, E + 3] on the CPU; starts anew.

        Every token is held by exactly one rank of those that hold its layer: data, context and sequence parallelism
        split tokens, pipelines split layers.
        """
        rows, self._rows = self._rows, None
        if rows is None:
            rows = torch.zeros(self.layers, self.experts + 3, dtype=torch.float64, device="cuda")
        rows[:, -2:] = torch.tensor([self._tokens, self._wanted], dtype=torch.float64).T
        self._tokens, self._wanted = [0] * self.layers, [0] * self.layers
        torch.distributed.all_reduce(rows)
        return rows.cpu()


def describe(rows: torch.Tensor, experts: int) -> tuple[dict[str, float], str]:
    """What is logged of the sums, names and values, and the same as one part of Megatron's progress line.

    Loads are shares of a layer's choices and sum to one.

    Args:
        rows: [L, E + 3], see :class:`RoutingSums`; a layer without tokens is a dense one and is left out.
    """
    logged: dict[str, float] = {}
    loads, entropies, dropped = [], [], []
    for layer, row in enumerate(rows.tolist()):
        counts_E, (entropy, tokens, wanted) = row[:experts], row[experts:]
        if not tokens:
            continue
        taken = sum(counts_E)
        for expert, count in enumerate(counts_E):
            loads.append(count / taken if taken else 0.0)
            logged[f"moe/load_layer_{layer}_expert_{expert}"] = loads[-1]
        entropies.append(entropy / tokens)
        dropped.append(1.0 - taken / wanted)
        logged[f"moe/router_entropy_layer_{layer}"] = entropies[-1]
        logged[f"moe/dropped_layer_{layer}"] = dropped[-1]
    if not loads:
        return {}, ""
    dead = sum(load < DEAD_SHARE / experts for load in loads)
    logged["moe/dead_experts"] = float(dead)
    text = f" load: {min(loads):.1%} to {max(loads):.1%}, dead experts: {dead} |"
    text += f" router entropy: {sum(entropies) / len(entropies) / math.log(max(experts, 2)):.2f} of even |"
    return logged, text + (f" dropped: {sum(dropped) / len(dropped):.1%} |" if max(dropped) > 0 else "")
