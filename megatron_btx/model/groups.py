"""Groups of parameters, by what they do: the words of ``--btx-freeze`` and ``--btx-lr-multiplier``.

A group is told by the parameter's name alone, in Megatron's local layers and in Transformer Engine's, which keep a norm
inside the linear layer after it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.ground.errors import BTXError, InputError

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


def groups_of_model(args: argparse.Namespace) -> list[str]:
    """The groups that the model of Megatron's arguments has, whatever part of it this rank holds."""
    is_moe = _is_mixture(args)
    present = {
        "experts": any(is_moe),
        "router": any(is_moe),
        "mlp": not all(is_moe) or bool(args.moe_shared_expert_intermediate_size),
        "head": bool(args.untie_embeddings_and_output_weights),
    }
    return [group for group in GROUPS if present.get(group, True)]


def _is_mixture(args: argparse.Namespace) -> tuple[bool, ...]:
    return mixture_layers(args.moe_layer_freq, args.num_layers) if args.num_experts else (False,) * args.num_layers


def frozen_groups(words: Iterable[str], args: argparse.Namespace) -> list[str]:
    """The groups that ``--btx-freeze`` names.

    Raises:
        InputError: an unknown group, one this model does not have, or everything frozen.
    """
    present = groups_of_model(args)
    frozen: set[str] = set()
    for word in words:
        for kept in word.removeprefix(ALL_BUT).split(","):
            _check_group(kept, f"--btx-freeze {word}", present)
        named = set(word.removeprefix(ALL_BUT).split(","))
        frozen |= set(present) - named if word.startswith(ALL_BUT) else named
    if frozen and frozen == set(present):
        raise InputError(
            f"--btx-freeze {' '.join(words)}: freezes everything this model has ({', '.join(present)}); leave one out, "
            f"as {ALL_BUT}router does"
        )
    return [group for group in GROUPS if group in frozen]


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


def lr_multipliers(words: Iterable[str], args: argparse.Namespace) -> dict[str, float]:
    """What ``--btx-lr-multiplier GROUP=X ...`` says.

    Raises:
        InputError: the form, the group, a factor that is not above zero, or a group that is frozen or decoupled.
    """
    present, frozen = groups_of_model(args), frozen_groups(args.btx_freeze, args)
    factors: dict[str, float] = {}
    for word in words:
        group, separator, text = word.partition("=")
        where = f"--btx-lr-multiplier {word}"
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not separator or not 0 < factor < math.inf:
            raise InputError(f"{where}: expected GROUP=X with X above zero, as router=10 (to train not at all: freeze)")
        _check_group(group, where, present)
        if group in factors:
            raise InputError(f"{where}: the group has {factors[group]:g} already; give every group once")
        if group in frozen:
            raise InputError(f"{where}: the group is frozen by --btx-freeze and has no learning rate; drop one of them")
        if args.decoupled_lr is not None and group in ("embeddings", "head"):
            raise InputError(f"{where}: --decoupled-lr sets this group's learning rate; give one of the two")
        factors[group] = factor
    return factors


def _check_group(group: str, where: str, present: list[str]) -> None:
    if group not in present:
        why = "this model has none" if group in GROUPS else "there is no such group"
        raise InputError(f"{where}: {group!r}: {why}; this model has {', '.join(present)}")


def freeze(frozen: list[str], args: argparse.Namespace) -> Callable[[list[Any]], list[Any]]:
    """A hook for ``GPTModelConfig.pre_wrap_hooks``: freezes groups before gradients and optimizer state are laid out.

    A frozen parameter gets no gradient buffer, no optimizer state and no weight decay. Megatron updates the biases of
    ``--moe-router-enable-expert-bias`` outside the optimizer; they stand still where the router does.
    """
    tied = not args.untie_embeddings_and_output_weights

    def hook(model: list[Any]) -> list[Any]:
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if group_of(name, tied) in frozen:
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
        if args.rank == 0:
            print(what_freezing_saves(model, frozen, args), flush=True)
        return model

    return hook


def what_freezing_saves(model: list[Any], frozen: list[str], args: argparse.Namespace) -> str:
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
