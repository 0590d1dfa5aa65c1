"""Losses per domain, parameters and routing of one loaded model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.model.step import MeanLoss, batches_of, forward
from megatron_btx.runner.run_dir import make_loss
from megatron_btx.runner.schemas import Score

if TYPE_CHECKING:
    from megatron_btx.mixing.sources import Source


def evaluate_model(model: list[Any], name: str, data: dict[str, str], path: str) -> tuple[list[Score], dict[str, Any]]:
    """The losses of one loaded model, and what it is: parameters and, of a mixture, routing."""
    from megatron.training import get_args

    from megatron_btx.evaluation.routing import divide_up, route
    from megatron_btx.mixing.loader import open_source

    source = open_source("the model", path)
    args = get_args()
    total, active = count_parameters(source, args.moe_router_topk, args.btx_sample_top1)
    about: dict[str, Any] = {
        "checkpoint": str(Path(path).resolve()),
        "parameters": total,
        "active_parameters": active,
        "routing": {} if source.sizes.experts else None,
    }
    scores = []
    for domain, prefix in data.items():
        if args.num_experts:
            routed = route(model, f"{domain}: {prefix}", prefix, args.btx_eval_tokens)
            scores.append(make_loss(name, domain, routed.loss, routed.tokens, routed.stderr))
            about["routing"][domain] = [divide_up(layer.choices) for layer in routed.layers]
        else:
            loss = measure_loss(model, domain, prefix, args.btx_eval_tokens)
            scores.append(make_loss(name, domain, loss.nats, loss.tokens, loss.stderr))
    return scores, about


def count_parameters(source: Source, topk: int, sampled: bool) -> tuple[int, int]:
    """All parameters of a model, and those active for one token.

    Args:
        topk: experts per token and mixture layer.
        sampled: sampled top-1 routing, whose first mixture layer takes all experts.
    """
    sizes = {name: math.prod(held.shape) for name, held in source.pieces.items()}
    total = sum(sizes.values())
    in_experts = sum(n for name, n in sizes.items() if ".experts." in name)
    if not in_experts:
        return total, total
    experts, layers = source.sizes.experts, sum(source.sizes.mixture_layers)
    taken = layers * topk + (experts - topk if sampled else 0)
    return total, total - in_experts + in_experts * taken // (experts * layers)


def measure_loss(model: list[Any], domain: str, prefix: str, tokens: int) -> MeanLoss:
    """The mean loss over the first ``tokens`` of a dataset."""
    from megatron_btx.data.texts import start_of

    return forward(model, batches_of(start_of(prefix, tokens), f"{domain}: {prefix}"))
