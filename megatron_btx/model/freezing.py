"""Freezing groups of parameters, and refusing the freezes that Megatron's optimizers cannot save or resume."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.common.errors import InputError
from megatron_btx.common.log import say
from megatron_btx.model.groups import TrainedGroups, group_of

if TYPE_CHECKING:
    import torch


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
        say(describe_savings(model, frozen, args))
        return model

    return hook


def describe_savings(model: list[Any], frozen: Sequence[str], args: argparse.Namespace) -> str:
    """One line: the frozen parameters of this rank, and the bytes of gradients and Adam's state they do without."""
    from megatron.core import mpu

    whole = held = gradient_bytes = state_bytes = 0
    for parameter in (p for chunk in model for p in chunk.parameters()):
        count, is_half = parameter.numel(), parameter.element_size() < 4
        whole += count
        if parameter.requires_grad:
            continue
        held += count
        gradient_bytes += count * (4 if args.accumulate_allreduce_grads_in_fp32 else parameter.element_size())
        each = args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
        each += args.main_params_dtype.itemsize if is_half else 0
        ranks = 1
        if args.use_distributed_optimizer and not getattr(parameter, "allreduce", True):
            ranks = mpu.get_expert_data_parallel_world_size()
        elif args.use_distributed_optimizer:
            ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
        state_bytes += count * each // ranks
    line = f" frozen: {', '.join(frozen)} | {held:,} of {whole:,} parameters of rank 0 | saved there: "
    line += f"{gradient_bytes / 2**20:.2f} MiB of gradients"
    return line + (f", {state_bytes / 2**20:.2f} MiB of optimizer state" if args.optimizer == "adam" else "")


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
        InputError: see :func:`refuse_optimizers`.
    """
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    pipeline, tensor = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    chunks, layout = args.virtual_pipeline_model_parallel_size, config.pipeline_model_parallel_layout
    spread = args.expert_model_parallel_size > 1 or (args.expert_tensor_parallel_size or tensor) != tensor
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
    stages = [{group != "experts" or not spread for group in own - set(groups.frozen)} for own in held]
    refuse_optimizers(stages, args.use_distributed_optimizer)


def refuse_optimizers(stages: list[set[bool]], distributed: bool) -> None:
    """See :func:`check_optimizers`.

    Args:
        stages: of every pipeline stage, whether it trains parameters of the rest (True in it), of experts that are
            spread otherwise (False in it).
        distributed: the distributed optimizer, whose states are stored by parameter.

    Raises:
        InputError: names what trains where, and the remedy.
    """
    if not any(True in stage for stage in stages):
        raise InputError(
            "nothing but the experts trains (--btx-freeze), and Megatron cannot save their optimizer alone where they "
            "are spread over ranks; use --expert-model-parallel-size 1 and the expert tensor parallelism that the rest "
            "has, or train the router too"
        )
    if distributed or all(stage == stages[0] for stage in stages):
        return
    words = {(): "nothing", (True,): "no experts", (False,): "experts alone", (False, True): "experts and more"}
    listed = ", ".join(f"{number} trains {words[tuple(sorted(stage))]}" for number, stage in enumerate(stages))
    raise InputError(
        f"of the pipeline's stages {listed}: without the distributed optimizer Megatron cannot resume that; add "
        "--use-distributed-optimizer, or let all stages train the same (--btx-freeze, --moe-layer-freq, "
        "--pipeline-model-parallel-size)"
    )
