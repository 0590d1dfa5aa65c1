"""Groups of parameters, by what they do: the words of ``--btx-freeze`` and ``--btx-lr-multiplier``, and freezing.

A group is told by the parameter's name alone, in Megatron's local layers and in Transformer Engine's, which keep a norm
inside the linear layer after it. Freezes that Megatron's optimizers cannot save or resume are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.common.cli_args import split_pair
from megatron_btx.common.errors import BTXError, InputError
from megatron_btx.common.log import say
from megatron_btx.cost.layouts import ParallelSizes

if TYPE_CHECKING:
    import torch

GROUPS: dict[str, str] = {
    "experts": "the feed-forward blocks of the experts",
    "router": "the routers, with their biases",
    "attention": "the projections of attention",
    "mlp": "feed-forward blocks that are no experts: dense layers, shared experts",
    "norms": "every norm",
    "embeddings": "token and learned position embeddings; the output head too where it is tied to them",
    "head": "the output layer, where it is not tied to the embeddings",
}
ALL_BUT = "all-but:"


def group_of(name: str, tied: bool) -> str:
    """The group of the parameter called ``name`` in ``GPTModel.named_parameters()``; prefixes of wrappers may precede.

    Args:
        tied: whether the output layer shares the embedding's matrix.

    Raises:
        BTXError: the name belongs to none, as those of multi-token prediction.
    """
    parts = name.split(".")
    if any("norm" in part for part in parts):  # linear_qkv.layer_norm_weight, q_layernorm.weight, final_layernorm.bias
        return "norms"
    for part, group in (
        ("router", "router"),
        ("shared_experts", "mlp"),
        ("experts", "experts"),
        ("self_attention", "attention"),
        ("mlp", "mlp"),
        ("embedding", "embeddings"),
        ("output_layer", "embeddings" if tied else "head"),
    ):
        if part in parts and "mtp" not in parts:
            return group
    raise BTXError(f"parameter {name}: belongs to none of the groups {', '.join(GROUPS)}; freeze none of this model")


@dataclass(frozen=True)
class TrainedGroups:
    """What of a model trains, and at what rates: ``--btx-freeze`` and ``--btx-lr-multiplier`` by what they mean."""

    frozen: tuple[str, ...]
    """Groups that do not train, in the order of :data:`GROUPS`."""
    multipliers: Mapping[str, float]
    """Group -> factor on its peak and least learning rate; 1 for those that are not named."""
    is_tied: bool
    """Whether the output layer shares the embedding's matrix."""


def resolve_groups(arguments: Mapping[str, Any]) -> TrainedGroups:
    """What the given or stored arguments of a run train; those that know no flags of ours train everything.

    Args:
        arguments: Megatron's, by name, with ``btx_freeze`` and ``btx_lr_multiplier`` where there are any.

    Raises:
        InputError: an unknown group, one this model does not have or one given twice; everything frozen; a factor that
            is not above zero, or for a group that has no rate or another.
    """
    present = list_groups(arguments)
    frozen = _read_frozen(arguments.get("btx_freeze") or [], present)
    multipliers: dict[str, float] = {}
    for word in arguments.get("btx_lr_multiplier") or ():
        where = f"--btx-lr-multiplier {word}"
        group, factor = _read_multiplier(word)
        _check_group(group, where, present)
        if group in multipliers:
            raise InputError(f"{where}: the group has {multipliers[group]:g} already; give every group once")
        if group in frozen:
            raise InputError(f"{where}: the group is frozen by --btx-freeze and has no learning rate; drop one of them")
        if arguments.get("decoupled_lr") is not None and group in ("embeddings", "head"):
            raise InputError(f"{where}: --decoupled-lr sets this group's learning rate; give one of the two")
        multipliers[group] = factor
    return TrainedGroups(frozen, multipliers, not arguments["untie_embeddings_and_output_weights"])


def list_groups(arguments: Mapping[str, Any]) -> list[str]:
    """The groups that the model of Megatron's arguments has, whatever part of it this rank holds."""
    layers = arguments["num_layers"]
    are_mixtures: tuple[bool, ...] = (False,) * layers
    if arguments.get("num_experts"):
        are_mixtures = mixture_layers(arguments["moe_layer_freq"], layers)
    absent = set()
    if not any(are_mixtures):
        absent |= {"experts", "router"}
    if all(are_mixtures) and not arguments.get("moe_shared_expert_intermediate_size"):
        absent.add("mlp")
    if not arguments["untie_embeddings_and_output_weights"]:
        absent.add("head")
    return [group for group in GROUPS if group not in absent]


def _read_frozen(words: list[str], present: list[str]) -> tuple[str, ...]:
    frozen: set[str] = set()
    for word in words:
        named = word.removeprefix(ALL_BUT).split(",")
        for group in named:
            _check_group(group, f"--btx-freeze {word}", present)
        if word.startswith(ALL_BUT):
            frozen |= set(present) - set(named)
        else:
            frozen |= set(named)
    if frozen and frozen == set(present):
        raise InputError(
            f"--btx-freeze {' '.join(words)}: freezes everything this model has ({', '.join(present)}); leave one out, "
            f"as {ALL_BUT}router does"
        )
    return tuple(group for group in GROUPS if group in frozen)


def _read_multiplier(word: str) -> tuple[str, float]:
    expected = "GROUP=X with X above zero, as router=10 (to train not at all: freeze)"
    group, text = split_pair(word, "--btx-lr-multiplier", expected)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return group, float(text)
    raise InputError(f"--btx-lr-multiplier {word}: expected {expected}")


def _check_group(group: str, where: str, present: list[str]) -> None:
    if group in present:
        return
    why = "there is no such group"
    if group in GROUPS:
        why = "this model has none"
    raise InputError(f"{where}: {group!r}: {why}; this model has {', '.join(present)}")


def freeze(groups: TrainedGroups, args: argparse.Namespace) -> Callable[[list[Any]], list[Any]]:
    """A hook for ``GPTModelConfig.pre_wrap_hooks``: freezes groups before gradients and optimizer state are laid out.

    A frozen parameter gets no gradient buffer, no optimizer state and no weight decay. Megatron updates the biases of
    ``--moe-router-enable-expert-bias`` outside the optimizer; they stand still where the router does.
    """
    frozen = groups.frozen

    def hook(model: list[Any]) -> list[Any]:
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if group_of(name, groups.is_tied) in frozen:
                    parameter.requires_grad_(False)
            if "router" in frozen:
                for module in chunk.modules():
                    if hasattr(module, "frozen_expert_bias"):
                        module.frozen_expert_bias = True
            # Recomputation is a reentrant autograd function: with no input that requires a gradient it is cut off, and
            # with it every parameter inside. The first layer's input requires one only if the embeddings do.
            embedding = getattr(chunk, "embedding", None)
            if args.recompute_granularity and "embeddings" in frozen and embedding is not None:
                embedding.register_forward_hook(_require_gradient)
        counts = [(p.numel(), p.requires_grad) for chunk in model for p in chunk.parameters()]
        whole = sum(count for count, _ in counts)
        held = sum(count for count, trains in counts if not trains)
        say(f" frozen: {', '.join(frozen)} | {held:,} of {whole:,} parameters of rank 0")
        return model

    return hook


def _require_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    import torch

    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


def check_optimizers(args: argparse.Namespace, groups: TrainedGroups, config: Any) -> None:
    """Refuse what Megatron trains and cannot resume, before there is a model.

    It makes one optimizer of the experts, where they are spread otherwise than the rest (EP > 1, or expert TP other
    than TP), and one of the rest. Its checkpoints of the plain optimizer hold one set of them for all pipeline stages:
    where a stage has another set than the first, 0.19 fails on resuming, or resumes with other numbers and says
    nothing; and it cannot save where experts alone train (``core/optimizer/optimizer.py``, ChainedOptimizer).

    Args:
        config: Megatron's, of the layers.

    Raises:
        InputError: names what trains where, and the remedy.
    """
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    sizes = ParallelSizes.of(vars(args))
    pipeline, spread = sizes.pipeline, sizes.spreads_experts
    chunks, layout = args.virtual_pipeline_model_parallel_size, config.pipeline_model_parallel_layout
    mixture = {"experts", "router"} | ({"mlp"} if args.moe_shared_expert_intermediate_size else set())
    layers = iter(mixture_layers(args.moe_layer_freq, args.num_layers))
    held: list[set[str]] = [set() for _ in range(pipeline)]
    held[0] |= {"embeddings"}
    held[-1] |= {"norms", "embeddings" if groups.is_tied else "head"}
    for chunk, stage in itertools.product(range(chunks or 1), range(pipeline)):
        if layout is not None:
            count = layout.layout[stage][chunk].count(LayerType.decoder)
        else:
            count = get_num_layers_to_build(config, chunk if chunks else None, stage)
        for is_mixture in itertools.islice(layers, count):
            held[stage] |= {"attention", "norms"} | (mixture if args.num_experts and is_mixture else {"mlp"})
    # Of every pipeline stage: whether it trains some of the rest (True), and experts that are spread otherwise (False).
    stages = [{group != "experts" or not spread for group in own - set(groups.frozen)} for own in held]
    if not any(True in stage for stage in stages):
        raise InputError(
            "nothing but the experts trains (--btx-freeze), and Megatron cannot save their optimizer alone where they "
            "are spread over ranks; use --expert-model-parallel-size 1 and the expert tensor parallelism that the rest "
            "has, or train the router too"
        )
    if args.use_distributed_optimizer or all(stage == stages[0] for stage in stages):
        return
    words = {(): "nothing", (True,): "no experts", (False,): "experts alone", (False, True): "experts and more"}
    listed = ", ".join(f"{number} trains {words[tuple(sorted(stage))]}" for number, stage in enumerate(stages))
    raise InputError(
        f"of the pipeline's stages {listed}: without the distributed optimizer Megatron cannot resume that; add "
        "--use-distributed-optimizer, or let all stages train the same (--btx-freeze, --moe-layer-freq, "
        "--pipeline-model-parallel-size)"
    )
