"""Routing that makes no sense: refused in one line before any rank trains, where Megatron fails late or never.

The checks read the parsed arguments alone, no checkpoint and no data, so that a recipe's stages can be checked before
the first of them runs.
"""

from __future__ import annotations

import argparse
import math

from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.common.errors import InputError
from megatron_btx.engine.flags import SAMPLE_DECAY, SAMPLE_MIN_TEMPERATURE

CHOOSING_TYPES = {"sinkhorn", "quantile_balancing"}
"""Values of --moe-router-load-balancing-type that are no loss: they choose the experts themselves."""


def check_routing(args: argparse.Namespace) -> None:
    """Refuse routing that makes no sense, before any rank starts to train.

    Raises:
        InputError: one line that names the flag, what was found and the remedy.
    """
    _check_sampling(args)
    if args.num_experts:
        _check_mixture(args)
        return
    for flag, given in (("--btx-sample-top1", args.btx_sample_top1), ("--btx-load-balancing paper", _is_paper(args))):
        if given:
            raise InputError(f"{flag}: this model has no experts to route to; give --num-experts, or leave it out")


def _check_sampling(args: argparse.Namespace) -> None:
    if not 0 < args.btx_sample_min_temperature <= 1:
        raise InputError(
            f"--btx-sample-min-temperature {args.btx_sample_min_temperature:g}: expected above 0 and at most 1, where "
            "annealing starts; the paper's is 0.5"
        )
    if not 0 <= args.btx_sample_decay < math.inf:
        raise InputError(
            f"--btx-sample-decay {args.btx_sample_decay:g}: expected 0 or more per iteration; the paper's is 1e-4"
        )
    if args.btx_sample_top1:
        return
    for flag, value, default in (
        ("--btx-sample-decay", args.btx_sample_decay, SAMPLE_DECAY),
        ("--btx-sample-min-temperature", args.btx_sample_min_temperature, SAMPLE_MIN_TEMPERATURE),
    ):
        if value != default:
            raise InputError(f"{flag} {value:g} without --btx-sample-top1, which it belongs to; give both, or neither")


def _is_paper(args: argparse.Namespace) -> bool:
    return bool(args.btx_load_balancing == "paper")


def _check_mixture(args: argparse.Namespace) -> None:
    is_mixture = mixture_layers(args.moe_layer_freq, args.num_layers)
    if len(is_mixture) != args.num_layers or not any(is_mixture):
        raise InputError(
            f"--moe-layer-freq {args.moe_layer_freq}: expected a mixture in one layer or more of {args.num_layers} "
            "(--num-layers), and an entry for each where it is a list"
        )
    _check_choice(args)
    _check_balancing(args)
    if args.btx_sample_top1 or _is_paper(args):
        _check_our_routers(args, "--btx-sample-top1" if args.btx_sample_top1 else "--btx-load-balancing paper")


def _balancing_types(args: argparse.Namespace) -> list[str]:
    kinds = args.moe_router_load_balancing_type
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _check_choice(args: argparse.Namespace) -> None:
    """How many experts a token takes, and how many tokens an expert."""
    experts, topk, capacity = args.num_experts, args.moe_router_topk, args.moe_expert_capacity_factor
    if not 1 <= topk <= experts:
        raise InputError(f"--moe-router-topk {topk}: a token can take 1 to {experts} experts (--num-experts {experts})")
    if args.btx_sample_top1 and not (topk == 1 and args.moe_router_pre_softmax):
        raise InputError(
            f"--btx-sample-top1 with --moe-router-topk {topk}: it takes one expert, whose gate is a probability; give "
            "--moe-router-topk 1 --moe-router-pre-softmax"
        )
    softmax = args.moe_router_score_function == "softmax" and not {*_balancing_types(args)} & CHOOSING_TYPES
    if topk == 1 and softmax and not args.moe_router_pre_softmax:
        raise InputError(
            "--moe-router-topk 1 with the softmax after the choice: every gate is 1 and the router learns nothing from "
            "the loss; add --moe-router-pre-softmax (switch routing), or take two experts"
        )
    if capacity is None or capacity < 0:  # Megatron's other word for none
        return
    if not 0 < capacity < math.inf:
        raise InputError(
            f"--moe-expert-capacity-factor {capacity:g}: expected above 0 (the paper's is 1.5), or none at all, which "
            "drops no token"
        )
    if not (topk == 1 and args.moe_router_pre_softmax and not args.btx_sample_top1):
        method = f"top-{topk}"
        if args.btx_sample_top1:
            method = "sampled top-1"
        elif topk == experts:
            method = "soft"
        raise InputError(
            f"--moe-expert-capacity-factor {capacity:g} with {method} routing, which drops no token; leave it out, or "
            "take switch routing (--moe-router-topk 1 --moe-router-pre-softmax)"
        )


def _check_balancing(args: argparse.Namespace) -> None:
    """The kinds of balancing, and their coefficients."""
    kinds, coefficients = _balancing_types(args), args.moe_aux_loss_coeff
    given = f"--moe-router-load-balancing-type {' '.join(kinds)}"
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    for coefficient in coefficients:
        if not 0 <= coefficient < math.inf:
            raise InputError(f"--moe-aux-loss-coeff {coefficient:g}: expected 0 or more; the paper's is 0.01")
    if "quantile_balancing" in kinds and args.moe_router_topk == args.num_experts:
        raise InputError(
            f"{given} with --moe-router-topk {args.moe_router_topk}: soft routing takes all {args.num_experts} experts "
            "and has nothing to balance; take none"
        )
    if args.btx_sample_top1 and {*kinds} & CHOOSING_TYPES:
        raise InputError(
            f"--btx-sample-top1 with {given}: it chooses experts itself; take none, as the paper does, or a loss"
        )
    if _is_paper(args) and (not {*kinds} <= {"aux_loss", "global_aux_loss"} or min(coefficients) == 0):
        raise InputError(
            f"--btx-load-balancing paper with {given} and coefficient {' '.join(map(str, coefficients))}: it gives "
            "aux_loss (micro-batch) or global_aux_loss (global batch) the paper's form, with a --moe-aux-loss-coeff "
            "above 0 (the paper's is 0.01)"
        )


def _check_our_routers(args: argparse.Namespace, flag: str) -> None:
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
        if on:
            raise InputError(f"{other} together with {flag}: {why}; leave one of them out")
    if not args.btx_sample_top1:
        return
    for other, on in (
        ("--overlap-moe-expert-parallel-comm", getattr(args, "overlap_moe_expert_parallel_comm", False)),
        ("--moe-input-jitter-eps", args.moe_input_jitter_eps is not None),
        ("--hybrid-context-parallel", getattr(args, "hybrid_context_parallel", False)),
        ("--dataloader-type cyclic", args.dataloader_type == "cyclic"),
    ):
        if on:
            raise InputError(
                f"{other} together with --btx-sample-top1: the noise of a token follows from its place in a plain "
                "sequence of batches; leave one of them out"
            )
