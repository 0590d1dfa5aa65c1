"""Fitting routers to domains: streamed statistics, ridge regression and centroids, and the choice by held-out text.

Ridge: ``W = (C + lambda m I)^-1 M`` with C the mean over domains of their second moments, M the domains' means of the
inputs and m the mean of C's diagonal: regression on one-hot labels (arXiv 2603.29765) in which every domain weighs the
same. Centroids: the domains' means less their common mean, each of length 1 per root mean square of the input.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_btx.model.step import forward
from megatron_btx.model.watch import mixtures, routers_of, watching

RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for lambda, as shares of the mean square of the inputs' components."""
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Candidates for the factor on the rows: regression gives values about 0 and 1, a softmax wants logits."""

Texts = list[list[dict[str, Any]]]
"""Batches of every domain, in the order of the experts."""


def own_rows(model: list[Any]) -> torch.Tensor:
    """The rows of all routers of all ranks, fp32 [L, E, H]; zeros for dense layers."""
    from megatron.core import mpu
    from megatron.training import get_args

    args = get_args()
    rows_LEH = torch.zeros(args.num_layers, args.num_experts, args.hidden_size, device="cuda")
    for layer, router in routers_of(model).items():
        rows_LEH[layer] = router.weight.detach().float()
    torch.distributed.all_reduce(rows_LEH, group=mpu.get_pipeline_model_parallel_group())
    return rows_LEH


def install_rows(model: list[Any], rows_LEH: torch.Tensor) -> None:
    """Give this rank's routers their rows."""
    for layer, router in routers_of(model).items():
        router.weight.data.copy_(rows_LEH[layer])


def moments(model: list[Any], texts: Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of the router inputs, every domain weighing the same, and the domains' means.

    Returns:
        fp64 [L, H, H] and [L, E, H], equal on all ranks.
    """
    from megatron.training import get_args

    args = get_args()
    shape = (args.num_layers, args.num_experts, args.hidden_size)
    second_LHH = torch.zeros(shape[0], shape[2], shape[2], dtype=torch.float64, device="cuda")
    mean_LEH = torch.zeros(shape, dtype=torch.float64, device="cuda")
    for domain, batches in enumerate(texts):
        weight = 1.0 / _tokens(batches)

        def add(
            layer: int, _router: Any, x_SBH: torch.Tensor, _out: Any, weight: float = weight, d: int = domain
        ) -> None:
            x_TH = x_SBH.flatten(0, 1).double()
            second_LHH[layer].addmm_(x_TH.T, x_TH, alpha=weight / args.num_experts)
            mean_LEH[layer, d] += x_TH.sum(dim=0) * weight

        with watching(model, add):
            forward(model, batches)
    torch.distributed.all_reduce(second_LHH)
    torch.distributed.all_reduce(mean_LEH)
    return second_LHH, mean_LEH


def _tokens(batches: list[dict[str, Any]]) -> int:
    """Tokens of all data-parallel ranks' batches together."""
    from megatron.core import mpu

    return sum(batch["tokens"].numel() for batch in batches) * int(mpu.get_data_parallel_world_size())


def ridge_rows(second_HH: torch.Tensor, mean_EH: torch.Tensor, ridge: float) -> torch.Tensor:
    """One layer's rows [E, H] by ridge regression of the one-hot domain on the input; fp64.

    Args:
        second_HH: mean over domains of the inputs' second moments; mean_EH: the domains' means.
        ridge: lambda as a share of the mean of second_HH's diagonal.
    """
    hidden = second_HH.shape[0]
    damped_HH = second_HH + ridge * second_HH.diagonal().mean() * torch.eye(hidden).to(second_HH)
    # Both sides of the normal equations are means over domains; a domain's label is one in its own row alone.
    return torch.linalg.solve(damped_HH, mean_EH.T / mean_EH.shape[0]).T


def centroid_rows(second_HH: torch.Tensor, mean_EH: torch.Tensor) -> torch.Tensor:
    """One layer's rows [E, H]: unit vectors towards the domains' means from their common mean, per input of RMS 1."""
    centred_EH = mean_EH - mean_EH.mean(dim=0)
    lengths_E = centred_EH.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return centred_EH / lengths_E / second_HH.diagonal().mean().sqrt()


def refit(model: list[Any], fit: Texts, held_out: Texts, method: str) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Rows for all routers from the inputs they get now, and what was chosen per layer.

    Returns:
        fp32 [L, E, H]; for every mixture layer its lambda (None for centroids), scale and held-out cross-entropy.
    """
    second_LHH, mean_LEH = moments(model, fit)
    layers = mixtures()
    ridges: tuple[float | None, ...] = RIDGES if method == "ridge" else (None,)
    candidates = {}  # of every mixture layer for every ridge, fp32 [C, E, H]
    for layer in layers:
        if method == "ridge":
            rows = [ridge_rows(second_LHH[layer], mean_LEH[layer], ridge) for ridge in RIDGES]
        else:
            rows = [centroid_rows(second_LHH[layer], mean_LEH[layer])]
        candidates[layer] = torch.stack(rows).float()
    # Cross-entropy against the domain, every domain weighing the same: [L, candidates, scales].
    entropy_LCS = torch.zeros(len(mean_LEH), len(ridges), len(SCALES), dtype=torch.float64, device="cuda")
    scales_S = torch.tensor(SCALES, device="cuda")
    for domain, batches in enumerate(held_out):
        weight = 1.0 / _tokens(batches) / len(held_out)

        def add(
            layer: int, _router: Any, x_SBH: torch.Tensor, _out: Any, weight: float = weight, d: int = domain
        ) -> None:
            logits_CTE = torch.einsum("th,ceh->cte", x_SBH.flatten(0, 1).float(), candidates[layer])
            for at, scale in enumerate(scales_S):
                surprise_CT = -torch.log_softmax(logits_CTE * scale, dim=-1)[..., d]
                entropy_LCS[layer, :, at] += surprise_CT.double().sum(dim=1) * weight

        with watching(model, add):
            forward(model, batches)
    torch.distributed.all_reduce(entropy_LCS)
    rows_LEH = torch.zeros(mean_LEH.shape, device="cuda")
    choices = []
    for layer in layers:
        best = int(entropy_LCS[layer].argmin())
        ridge, scale = ridges[best // len(SCALES)], SCALES[best % len(SCALES)]
        rows_LEH[layer] = candidates[layer][best // len(SCALES)] * scale
        entropy = float(entropy_LCS[layer].min())
        choices.append({"layer": layer, "lambda": ridge, "scale": scale, "cross_entropy": entropy})
    return rows_LEH, choices


def measure(model: list[Any], texts: Texts) -> dict[str, Any]:
    """Loss per domain, and per layer how well and how evenly the routers tell the domains apart."""
    from megatron.training import get_args

    args = get_args()
    experts = args.num_experts
    # In one tensor, so that one all-reduce sums them: share of tokens whose largest logit is their domain's; entropy;
    # choices per expert.
    buffer = torch.zeros(args.num_layers, 2 + experts, dtype=torch.float64, device="cuda")
    accuracy_L, entropy_L, load_LE = buffer[:, 0], buffer[:, 1], buffer[:, 2:]
    losses = []
    for domain, batches in enumerate(texts):
        weight = 1.0 / _tokens(batches) / len(texts)

        def add(
            layer: int, router: Any, x_SBH: torch.Tensor, out: Any, weight: float = weight, d: int = domain
        ) -> None:
            log_TE = torch.log_softmax(x_SBH.flatten(0, 1).float() @ router.weight.detach().float().T, dim=-1)
            accuracy_L[layer] += (log_TE.argmax(dim=-1) == d).sum() * weight
            entropy_L[layer] -= (log_TE.exp() * log_TE).double().sum() * weight
            load_LE[layer] += out[1].reshape(-1, experts).sum(dim=0) * weight

        with watching(model, add):
            losses.append(forward(model, batches).nats)
    torch.distributed.all_reduce(buffer)
    layers = []
    for layer in mixtures():
        load = load_LE[layer].tolist()
        total = sum(load) or 1
        layers.append(
            {
                "layer": layer,
                "accuracy": accuracy_L[layer].item(),
                "entropy": entropy_L[layer].item(),
                "load": [choices / total for choices in load],
            }
        )
    return {"losses": losses, "layers": layers}
