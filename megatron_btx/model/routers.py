"""Routing that Megatron cannot say: sampled top-1, and the paper's load-balancing loss.

Both are Megatron's ``TopKRouter`` with a part replaced, built through ``MoESubmodules.router``; dispatchers, dropping,
z-loss, logging of losses and checkpoint keys stay Megatron's. Everything else of the paper (top-k before or after the
softmax, switch, soft) is Megatron's own flags.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.common.version_guard import expect, expect_parameters, mismatch
from megatron_btx.model.sampling import Annealing, Step, gumbel_noise


@dataclasses.dataclass(frozen=True)
class RouterSettings:
    """What our routers do beyond Megatron's configuration."""

    sampling: Annealing | None = None
    """Sampled top-1, with this temperature; None for Megatron's top-k."""
    paper_balancing: bool = False
    """The paper's balancing loss where Megatron's ``aux_loss`` or ``global_aux_loss`` is asked for."""
    seed: int = 1234
    """Of the sampler's noise."""


def settings_from(args: argparse.Namespace) -> RouterSettings | None:
    """The routers that the arguments ask for; None where Megatron's own do."""
    if not args.num_experts or not (args.btx_sample_top1 or args.btx_load_balancing == "paper"):
        return None
    sampling = Annealing(args.btx_sample_decay, args.btx_sample_min_temperature) if args.btx_sample_top1 else None
    return RouterSettings(sampling, args.btx_load_balancing == "paper", args.seed)


class BTXRouter(TopKRouter):  # type: ignore[misc]
    """Megatron's top-k router with sampled top-1 (the paper's section 4.4) or the paper's balancing loss (equation 3).

    **Sampled top-1.** In training a token takes the expert that is largest in
    ``softmax((logits + Gumbel noise) / temperature)``, with that value as gate, not renormalised: a probability, so
    that the router gets a gradient. In evaluation it takes the largest logit with gate 1. Noise: see
    :mod:`megatron_btx.model.sampling`.

    **The paper's loss.** ``alpha N sum_i u_i p_i`` with u the mean gate and p the mean probability per expert, gradient
    through both; ``alpha`` is ``--moe-aux-loss-coeff``. The means are taken over the tokens of a micro-batch on all
    tensor- and context-parallel ranks (``aux_loss``), or also over the data-parallel ranks and the earlier
    micro-batches of the step, the latter without gradient (``global_aux_loss``); alpha weighs the same then, however
    many micro-batches a step has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        settings: RouterSettings,
        step: Step,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer)
        self.settings = settings
        self.step = step
        self._microbatches_to_recompute: collections.deque[int] = collections.deque()
        self._microbatches_of = -1
        # Sums of u and p over earlier micro-batches, [2, E], and their tokens; no part of the model's state.
        self._earlier_2E: torch.Tensor | None = None
        self._earlier_tokens = 0

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        """Gates and choices.

        Args:
            logits: [S, B, E], this rank's part of the sequence.

        Returns:
            gates_TE and the boolean routing map [T, E], T = S x B.
        """
        if self.settings.sampling is None:
            return super().routing(logits, padding_mask)
        sequence, batch, experts = logits.shape
        logits_TE = self.apply_z_loss(logits.view(-1, experts), padding_mask=padding_mask)
        scores_TE = torch.softmax(logits_TE.float(), dim=-1)
        if self.training:
            samples_B = torch.arange(batch, device=logits.device) + self._first_sample()
            positions_S = _positions(sequence, self.config, self.tp_group, self.cp_group, logits.device)
            noise_SBE = gumbel_noise(self.settings.seed, samples_B, positions_S, int(self.layer_number or 0), experts)
            noisy_TE = logits_TE.float() + noise_SBE.view_as(logits_TE)
            sampled_TE = torch.softmax(noisy_TE / self.settings.sampling.temperature(self.step.iteration), dim=-1)
            map_TE = _one_hot_of_largest(noisy_TE)
            gates_TE = sampled_TE * map_TE
        else:
            map_TE = _one_hot_of_largest(logits_TE)
            gates_TE = map_TE.float()
        gates_TE = gates_TE.type_as(logits_TE)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            gates_TE = self._apply_aux_loss(gates_TE, scores_TE, map_TE)
            gates_TE = self._apply_seq_aux_loss(gates_TE, scores_TE, map_TE, sequence, batch)
            gates_TE = self._apply_global_aux_loss(gates_TE, scores_TE, map_TE)
        return gates_TE, map_TE

    def _first_sample(self) -> int:
        """The first sample of the micro-batch at hand, which in recomputation is not the one last begun.

        A recomputed layer runs twice: without gradients in the forward pass, with them in the backward pass, when the
        pipeline has begun later micro-batches. Backward passes of one layer come in the order of its forward passes.
        """
        if self._microbatches_of != self.step.iteration:
            self._microbatches_to_recompute.clear()
            self._microbatches_of = self.step.iteration
        if not torch.is_grad_enabled():
            self._microbatches_to_recompute.append(self.step.first_sample)
        elif self._microbatches_to_recompute:
            return self._microbatches_to_recompute.popleft()
        return self.step.first_sample

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not self.settings.paper_balancing or coefficient == 0:
            return super()._apply_aux_loss(probs, scores_for_aux_loss, routing_map, with_padding_mask)
        sums_2E = self._sums(probs, scores_for_aux_loss, routing_map, self.tp_cp_group)
        tokens = scores_for_aux_loss.shape[0] * self.tp_cp_group.size()
        loss = paper_balancing_loss(sums_2E / tokens, coefficient)
        return self._attach(probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group, 1)

    def _apply_global_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if not self.settings.paper_balancing or coefficient == 0:
            return super()._apply_global_aux_loss(probs, scores_for_aux_loss, routing_map, with_padding_mask)
        group = self.tp_dp_cp_group
        sums_2E = self._sums(probs, scores_for_aux_loss, routing_map, group)
        tokens = scores_for_aux_loss.shape[0] * group.size()
        earlier_2E = self._earlier_2E if self._earlier_2E is not None else torch.zeros_like(sums_2E)
        means_2E = (earlier_2E + sums_2E) / (self._earlier_tokens + tokens)
        self._earlier_2E = earlier_2E.detach() + sums_2E.detach()
        self._earlier_tokens += tokens
        loss = paper_balancing_loss(means_2E, coefficient)
        # Every rank holds the gradient of the one loss through its own tokens of this micro-batch. Megatron sums
        # gradients over tensor-parallel ranks and averages them over data-parallel ones and micro-batches, where here
        # they would have to be summed too: the share of the tokens that this micro-batch has is taken back.
        factor = group.size() // self.tp_cp_group.size() * self._earlier_tokens / tokens
        return self._attach(probs, coefficient, loss, "global_load_balancing_loss", group, factor)

    def reset_global_aux_loss_tracker(self) -> None:
        """Forget the earlier micro-batches; Megatron calls it at the end of a step."""
        super().reset_global_aux_loss_tracker()
        self._earlier_2E, self._earlier_tokens = None, 0

    def _sums(self, probs: torch.Tensor, scores_TE: torch.Tensor, map_TE: torch.Tensor, group: Any) -> torch.Tensor:
        """Sums over a group's tokens of gates and of probabilities, [2, E]; the gradient reaches this rank's tokens."""
        if self.settings.sampling is not None:
            gates_TE = probs.float()
        else:
            # From the scores, because the capacity has set the gates of dropped tokens to zero: u is the router's wish.
            gates_TE = scores_TE * map_TE
            if not self.config.moe_router_pre_softmax and self.topk > 1:
                gates_TE = gates_TE / gates_TE.sum(dim=-1, keepdim=True)
        local_2E = torch.stack([gates_TE.sum(dim=0), scores_TE.sum(dim=0)])
        return reduce_from_tensor_model_parallel_region(local_2E, group)

    def _attach(
        self, probs: torch.Tensor, coefficient: float, loss: torch.Tensor, name: str, group: Any, gradient_factor: float
    ) -> torch.Tensor:
        """Hand the loss to Megatron, which sums over ``group`` what it logs: the value is divided, the gradient not."""
        scaled = loss * gradient_factor
        scaled = scaled + (loss / group.size() - scaled).detach()
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            scaled,
            name,
            group,
            needs_dp_avg=name == "load_balancing_loss",
            valid_token_count=probs.shape[0],
        )


def paper_balancing_loss(means_2E: torch.Tensor, coefficient: float) -> torch.Tensor:
    """``alpha N sum_i u_i p_i`` (the paper's equation 3).

    Args:
        means_2E: [2, E], mean gate u and mean probability p of every expert.
    """
    mean_gate_E, mean_probability_E = means_2E
    return coefficient * means_2E.shape[1] * (mean_gate_E * mean_probability_E).sum()


def _one_hot_of_largest(values_TE: torch.Tensor) -> torch.Tensor:
    """Boolean [T, E], true at each token's largest value, the first of equal ones."""
    return torch.zeros_like(values_TE, dtype=torch.bool).scatter_(1, values_TE.argmax(dim=1, keepdim=True), True)


def _positions(local: int, config: TransformerConfig, tp_group: Any, cp_group: Any, device: Any) -> torch.Tensor:
    """Positions within their sequence of the ``local`` tokens that this rank's router sees."""
    tensor = tp_group.size() if config.sequence_parallel else 1
    context = cp_group.size()
    positions = torch.arange(local * tensor * context, device=device)
    if context > 1:  # rank c holds chunks c and 2 C - 1 - c (core/utils.py, get_batch_on_this_cp_rank)
        chunks, rank = positions.view(2 * context, -1), cp_group.rank()
        positions = torch.cat([chunks[rank], chunks[2 * context - 1 - rank]])
    first = tp_group.rank() * local if tensor > 1 else 0
    return positions[first : first + local]


class SoftMoELayer(MoELayer):  # type: ignore[misc]
    """A mixture layer in which every token takes all experts: the first one under sampled top-1 routing.

    Dispatchers count on ``moe_router_topk`` choices per token, so the layer has a configuration of its own.
    """

    def __init__(self, config: TransformerConfig, *rest: Any, **named: Any) -> None:
        config = copy.copy(config)
        config.moe_router_topk = config.num_moe_experts
        super().__init__(config, *rest, **named)


def with_routers(
    block: TransformerBlockSubmodules,
    config: TransformerConfig,
    settings: RouterSettings,
    step: Step,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The block's layers with our routers; ours, Megatron's local ones or Transformer Engine's alike.

    Args:
        block: the layers of one pipeline stage.

    Raises:
        MegatronVersionError: a mixture layer's specification is of another form.
    """
    _check_form()
    is_moe = mixture_layers(config.moe_layer_freq, config.num_layers)
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers: list[ModuleSpec] = []
    for number, layer in enumerate(block.layer_specs, start=offset):
        if not is_moe[number]:
            layers.append(layer)
            continue
        mlp = layer.submodules.mlp
        if not isinstance(mlp, functools.partial) or mlp.func is not MoELayer or "submodules" not in mlp.keywords:
            raise mismatch("a mixture layer's mlp is no partial of MoELayer")
        soft = settings.sampling is not None and not any(is_moe[:number])
        chosen = dataclasses.replace(settings, sampling=None) if soft else settings
        submodules = dataclasses.replace(
            mlp.keywords["submodules"], router=functools.partial(BTXRouter, settings=chosen, step=step)
        )
        kind: Callable[..., Any] = SoftMoELayer if soft else MoELayer
        mlp = functools.partial(kind, **{**mlp.keywords, "submodules": submodules})
        layers.append(dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, mlp=mlp)))
    return dataclasses.replace(block, layer_specs=layers)


def _check_form() -> None:
    """Refuse a Megatron whose router has other parts than those replaced here."""
    expect(TopKRouter, "routing", "_apply_global_aux_loss", "_apply_seq_aux_loss", "apply_z_loss")
    parameters = ("self", "probs", "scores_for_aux_loss", "routing_map", "with_padding_mask")
    expect_parameters(TopKRouter, "_apply_aux_loss", parameters)
