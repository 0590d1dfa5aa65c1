"""Routing that makes no sense: refused in one line before any rank trains, where Megatron fails late or never."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.engine.checks.arguments import Refusal
from megatron_btx.engine.flags import SAMPLE_DECAY, SAMPLE_MIN_TEMPERATURE

CHOOSING_TYPES = {"sinkhorn", "quantile_balancing"}
"""Values of --moe-router-load-balancing-type that are no loss: they choose the experts themselves."""


def of_routing(args: argparse.Namespace) -> Iterator[Refusal]:
    """Routing that makes no sense, of mixtures and of dense models."""
    least, decay = args.btx_sample_min_temperature, args.btx_sample_decay
    yield (
        f"--btx-sample-min-temperature {least:g}",
        not 0 < least <= 1,
        "expected above 0 and at most 1, where annealing starts; the paper's is 0.5",
    )
    yield (
        f"--btx-sample-decay {decay:g}",
        not 0 <= decay < math.inf,
        "expected 0 or more per iteration; the paper's is 1e-4",
    )
    for flag, value, default in (
        ("--btx-sample-decay", decay, SAMPLE_DECAY),
        ("--btx-sample-min-temperature", least, SAMPLE_MIN_TEMPERATURE),
    ):
        alone = not args.btx_sample_top1 and value != default
        yield f"{flag} {value:g} without --btx-sample-top1, which it belongs to", alone, "give both, or neither"
    is_paper = args.btx_load_balancing == "paper"
    ours = [("--btx-sample-top1", args.btx_sample_top1), ("--btx-load-balancing paper", is_paper)]
    if not args.num_experts:
        for flag, given in ours:
            yield flag, given, "this model has no experts to route to; give --num-experts, or leave it out"
        return
    is_mixture = mixture_layers(args.moe_layer_freq, args.num_layers)
    yield (
        f"--moe-layer-freq {args.moe_layer_freq}",
        len(is_mixture) != args.num_layers or not any(is_mixture),
        f"expected a mixture in one layer or more of {args.num_layers} (--num-layers), and an entry for each where it "
        "is a list",
    )
    yield from _of_choice(args)
    yield from _of_balancing(args)
    for flag, given in ours:
        if given:
            yield from _of_our_routers(args, flag)
            return


def _balancing_types(args: argparse.Namespace) -> list[str]:
    kinds = args.moe_router_load_balancing_type
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _of_choice(args: argparse.Namespace) -> Iterator[Refusal]:
    """How many experts a token takes, and how many tokens an expert."""
    experts, topk, capacity = args.num_experts, args.moe_router_topk, args.moe_expert_capacity_factor
    given = f"--moe-router-topk {topk}"
    yield given, not 1 <= topk <= experts, f"a token can take 1 to {experts} experts (--num-experts {experts})"
    yield (
        f"--btx-sample-top1 with {given}",
        args.btx_sample_top1 and not (topk == 1 and args.moe_router_pre_softmax),
        "it takes one expert, whose gate is a probability; give --moe-router-topk 1 --moe-router-pre-softmax",
    )
    softmax = args.moe_router_score_function == "softmax" and not {*_balancing_types(args)} & CHOOSING_TYPES
    yield (
        "--moe-router-topk 1 with the softmax after the choice",
        topk == 1 and softmax and not args.moe_router_pre_softmax,
        "every gate is 1 and the router learns nothing from the loss; add --moe-router-pre-softmax (switch routing), "
        "or take two experts",
    )
    if capacity is None or capacity < 0:  # Megatron's other word for none
        return
    given = f"--moe-expert-capacity-factor {capacity:g}"
    yield (
        given,
        not 0 < capacity < math.inf,
        "expected above 0 (the paper's is 1.5), or none at all, which drops no token",
    )
    method = f"top-{topk}"
    if args.btx_sample_top1:
        method = "sampled top-1"
    elif topk == experts:
        method = "soft"
    switch = topk == 1 and args.moe_router_pre_softmax and not args.btx_sample_top1
    remedy = "leave it out, or take switch routing (--moe-router-topk 1 --moe-router-pre-softmax)"
    if not switch:
        yield f"{given} with {method} routing, which drops no token", True, remedy


def _of_balancing(args: argparse.Namespace) -> Iterator[Refusal]:
    """The kinds of balancing, and their coefficients."""
    kinds, coefficients = _balancing_types(args), args.moe_aux_loss_coeff
    given = f"--moe-router-load-balancing-type {' '.join(kinds)}"
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    for coefficient in coefficients:
        yield (
            f"--moe-aux-loss-coeff {coefficient:g}",
            not 0 <= coefficient < math.inf,
            "expected 0 or more; the paper's is 0.01",
        )
    yield (
        f"{given} with --moe-router-topk {args.moe_router_topk}",
        "quantile_balancing" in kinds and args.moe_router_topk == args.num_experts,
        f"soft routing takes all {args.num_experts} experts and has nothing to balance; take none",
    )
    yield (
        f"--btx-sample-top1 with {given}",
        args.btx_sample_top1 and bool({*kinds} & CHOOSING_TYPES),
        "it chooses experts itself; take none, as the paper does, or a loss",
    )
    yield (
        f"--btx-load-balancing paper with {given} and coefficient {' '.join(map(str, coefficients))}",
        args.btx_load_balancing == "paper"
        and (not {*kinds} <= {"aux_loss", "global_aux_loss"} or min(coefficients) == 0),
        "it gives aux_loss (micro-batch) or global_aux_loss (global batch) the paper's form, with a "
        "--moe-aux-loss-coeff above 0 (the paper's is 0.01)",
    )


def _of_our_routers(args: argparse.Namespace, flag: str) -> Iterator[Refusal]:
    """What Megatron's own routers have and ours do not."""
    for other, on, why in (
        ("--moe-router-fusion", args.moe_router_fusion, "the fused kernel knows Megatron's routing alone"),
        ("--moe-router-score-function", args.moe_router_score_function != "softmax", "it is defined on the softmax"),
        ("--moe-router-enable-expert-bias", args.moe_router_enable_expert_bias, "its choice is not the logits' own"),
        ("--moe-router-num-groups", args.moe_router_num_groups is not None, "it knows no groups of experts"),
        ("--moe-router-topk-scaling-factor", bool(args.moe_router_topk_scaling_factor), "its gates are not scaled"),
        ("--mtp-num-layers", bool(args.mtp_num_layers), "it routes the decoder's layers alone"),
        ("--mlp-chunks-for-training", args.mlp_chunks_for_training > 1, "a router must see its whole micro-batch"),
        (
            "--cuda-graph-impl",
            getattr(args, "cuda_graph_impl", "none") != "none",
            "a graph would freeze what it counts",
        ),
        ("--moe-enable-routing-replay", getattr(args, "moe_enable_routing_replay", False), "it draws its own route"),
    ):
        yield f"{other} together with {flag}", on, f"{why}; leave one of them out"
    if not args.btx_sample_top1:
        return
    for other, on in (
        ("--overlap-moe-expert-parallel-comm", getattr(args, "overlap_moe_expert_parallel_comm", False)),
        ("--moe-input-jitter-eps", args.moe_input_jitter_eps is not None),
        ("--hybrid-context-parallel", getattr(args, "hybrid_context_parallel", False)),
        ("--dataloader-type cyclic", args.dataloader_type == "cyclic"),
    ):
        why = "the noise of a token follows from its place in a plain sequence of batches; leave one of them out"
        yield f"{other} together with --btx-sample-top1", on, why
