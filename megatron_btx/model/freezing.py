"""Freezing groups of parameters, and refusing the freezes that Megatron's optimizers cannot save or resume."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.ground.errors import InputError
from megatron_btx.ground.log import say
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


def check_optimizers(args: argparse.Namespace) -> Callable[[list[Any]], list[Any]]:
    """A hook for ``GPTModelConfig.pre_wrap_hooks``, after freezing: refuse what Megatron trains and cannot resume.

    It makes one optimizer of the experts, where they are spread otherwise than the rest (EP > 1, or expert TP other
    than TP), and one of the rest. Its checkpoints of the plain optimizer hold one set of them for all pipeline stages:
    where a stage has another set than the first, 0.19 fails on resuming, or resumes with other numbers and says
    nothing; and it cannot save where experts alone train (``core/optimizer/optimizer.py``, ChainedOptimizer).

    Raises:
        InputError: from the hook, on all ranks, before there is an optimizer.
    """

    def hook(model: list[Any]) -> list[Any]:
        import torch
        from megatron.core import mpu

        trained = [parameter for chunk in model for parameter in chunk.parameters() if parameter.requires_grad]
        mine = {bool(getattr(parameter, "allreduce", True)) for parameter in trained}
        stages: list[set[bool]] = [set()] * mpu.get_pipeline_model_parallel_world_size()
        torch.distributed.all_gather_object(stages, mine, group=mpu.get_pipeline_model_parallel_group())
        refuse_optimizers(stages, args.use_distributed_optimizer)
        return model

    return hook


def check_stages(args: argparse.Namespace, groups: TrainedGroups) -> None:
    """Refuse the same before there is a model, where all stages have as many layers. Raises InputError."""
    pipeline, tensor = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    chunks = pipeline * (args.virtual_pipeline_model_parallel_size or 1)
    spread = args.expert_model_parallel_size > 1 or (args.expert_tensor_parallel_size or tensor) != tensor
    uneven = args.pipeline_model_parallel_layout or args.num_layers % chunks or args.decoder_first_pipeline_num_layers
    if not args.num_experts or not spread or uneven or args.decoder_last_pipeline_num_layers:
        return
    held: list[set[str]] = [set() for _ in range(pipeline)]
    for layer, is_mixture in enumerate(mixture_layers(args.moe_layer_freq, args.num_layers)):
        own = {"experts", "router"} | ({"mlp"} if args.moe_shared_expert_intermediate_size else set())
        held[layer * chunks // args.num_layers % pipeline] |= {"attention", "norms"} | (own if is_mixture else {"mlp"})
    held[0].add("embeddings")
    held[-1].add("embeddings" if groups.is_tied else "head")
    stages = [{group != "experts" for group in stage - set(groups.frozen)} for stage in held]
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
