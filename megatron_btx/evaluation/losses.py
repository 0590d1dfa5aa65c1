"""Losses per domain, parameters and routing of one loaded model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.model.step import batches_of, forward

if TYPE_CHECKING:
    from megatron_btx.mixing.sources import Source


def evaluate_model(model: list[Any], data: dict[str, str], path: str) -> dict[str, Any]:
    """Losses, token counts, parameter counts and routing of one loaded model."""
    from megatron.training import get_args

    from megatron_btx.mixing.loader import open_source

    source = open_source("the model", path)
    args = get_args()
    total, active = count_parameters(source, args.moe_router_topk, args.btx_sample_top1)
    result: dict[str, Any] = {
        "checkpoint": str(Path(path).resolve()),
        "parameters": total,
        "active_parameters": active,
        "losses": {},
        "tokens": {},
        "routing": {} if source.sizes.experts else None,
    }
    for domain, prefix in data.items():
        loss, tokens, shares_LE = evaluate_domain(model, domain, prefix)
        result["losses"][domain], result["tokens"][domain] = loss, tokens
        if shares_LE is not None:
            result["routing"][domain] = shares_LE
    return result


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


def evaluate_domain(
    model: list[Any], domain: str, prefix: str, tokens: int | None = None
) -> tuple[float, int, list[list[float]] | None]:
    """Mean loss in nats per token over the first tokens of a dataset.

    Args:
        tokens: how many at most; by default --btx-eval-tokens.

    Returns:
        loss; tokens; for mixtures the share of tokens per layer and expert, all choices counted, else None.
    """
    import torch
    from megatron.training import get_args

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.watch import watching

    args = get_args()
    batches = batches_of(start_of(prefix, args.btx_eval_tokens if tokens is None else tokens), f"{domain}: {prefix}")
    counts_LE = torch.zeros(args.num_layers, args.num_experts or 1, dtype=torch.float64, device="cuda")

    def count(layer: int, _router: Any, _inputs: Any, outputs: Any) -> None:
        counts_LE[layer] += outputs[1].reshape(-1, counts_LE.size(1)).sum(dim=0).double()

    with watching(model, count):
        loss, counted = forward(model, batches)
    torch.distributed.all_reduce(counts_LE)
    shares_LE = None
    if args.num_experts:
        shares_LE = (counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    return loss, counted, shares_LE
