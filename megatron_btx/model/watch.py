"""Watching a model's routers while it runs: which they are, what goes in, what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_btx.checkpoint.sizes import mixture_layers


def routers_of(model: list[Any]) -> dict[int, TopKRouter]:
    """The routers that this rank holds, by layer from 0."""
    routers = [module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]
    return {router.layer_number - 1: router for router in routers}


def mixtures() -> list[int]:
    """The mixture layers of the whole model, from 0, whatever this rank holds."""
    from megatron.training import get_args

    args = get_args()
    return [at for at, mixture in enumerate(mixture_layers(args.moe_layer_freq, args.num_layers)) if mixture]


def taken_experts(router: Any, gates_TE: torch.Tensor, map_TE: torch.Tensor) -> torch.Tensor:
    """Boolean [T, E]: the choices that were not dropped. A map that is padded to the capacity holds others too."""
    return gates_TE > 0 if router.config.moe_pad_expert_input_to_capacity else map_TE


@contextmanager
def watching(model: list[Any], see: Callable[[int, Any, torch.Tensor, Any], None]) -> Iterator[None]:
    """Call ``see(layer, router, inputs_SBH, outputs)`` at every forward pass of a router.

    Every token is seen by exactly one rank of those that hold its layer: under sequence parallelism a rank's router
    gets its part of the sequence. Outputs are gates [S B, E] and, boolean, which experts the token takes [S B, E].
    """

    def hook(layer: int) -> Callable[..., None]:
        def seen(router: Any, inputs: Any, outputs: Any) -> None:
            see(layer, router, inputs[0].detach(), (outputs[0], taken_experts(router, *outputs[:2])))

        return seen

    handles = [router.register_forward_hook(hook(layer)) for layer, router in routers_of(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
