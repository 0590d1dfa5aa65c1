"""The arithmetic of a layout: how processes divide into tensor, pipeline, context, expert and data parallelism.

A rule is a function that returns a :class:`Misfit`, or None where the numbers fit. Who asks decides how to say it:
the planner before a run begins, and the programs when they start.

Source: megatron/core/parallel_state.py, initialize_model_parallel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Misfit:
    """Numbers that do not fit together."""

    found: str
    expected: str
    remedy: str = "change its layout"


@dataclass(frozen=True)
class ParallelSizes:
    """Over how many processes each dimension of a model is spread."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> ParallelSizes:
        """The sizes of Megatron's arguments, given or stored, by their names."""
        tensor = arguments.get("tensor_model_parallel_size", 1)
        return ParallelSizes(
            tensor,
            arguments.get("pipeline_model_parallel_size", 1),
            arguments.get("context_parallel_size", 1),
            arguments.get("expert_model_parallel_size", 1),
            arguments.get("expert_tensor_parallel_size") or tensor,
        )

    @property
    def spreads_experts(self) -> bool:
        """Whether experts are spread over other ranks than the rest, so that their gradients are reduced over others.

        Source: ``core/tensor_parallel/layers.py``, where ``allreduce`` is set.
        """
        return self.expert > 1 or self.expert_tensor != self.tensor

    @property
    def model_ranks(self) -> int:
        """Processes that hold one dense model together."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_ranks(self) -> int:
        """Processes that hold all experts of one model together."""
        return self.expert_tensor * self.expert * self.pipeline

    def data_parallel(self, processes: int) -> int:
        """How many models work on different data."""
        return processes // self.model_ranks


def check_processes(sizes: ParallelSizes, processes: int) -> Misfit | None:
    """Whether the processes hold whole models."""
    if processes % sizes.model_ranks == 0:
        return None
    found = f"{processes} processes for TP {sizes.tensor} x PP {sizes.pipeline} x CP {sizes.context}"
    return Misfit(found, "a multiple of their product")


def check_experts(sizes: ParallelSizes, processes: int, experts: int) -> Misfit | None:
    """Whether the processes hold all experts, equally many each.

    Args:
        experts: 0 for a dense model.
    """
    if experts == 0:
        if sizes.expert > 1:
            return Misfit(f"expert-model-parallel-size {sizes.expert} for a dense model", "1")
        return None
    if processes % sizes.expert_ranks:
        found = f"{processes} processes for EP {sizes.expert} x expert TP {sizes.expert_tensor} x PP {sizes.pipeline}"
        return Misfit(found, "a multiple of their product")
    if experts % sizes.expert:
        return Misfit(f"{experts} experts over EP {sizes.expert}", "a number of experts that EP divides")
    return None


def check_layers(sizes: ParallelSizes, layers: int) -> Misfit | None:
    """Whether every stage of a pipeline has equally many layers. Where a flag divides them otherwise, do not ask."""
    if layers % sizes.pipeline == 0:
        return None
    return Misfit(f"{layers} layers over PP {sizes.pipeline}", "a number of layers that PP divides")


def check_heads(sizes: ParallelSizes, heads: int) -> Misfit | None:
    """Whether every rank of tensor parallelism has equally many attention heads."""
    if heads % sizes.tensor == 0:
        return None
    return Misfit(f"{heads} attention heads over TP {sizes.tensor}", "a number of heads that TP divides")


def check_batch(sizes: ParallelSizes, processes: int, micro_batch: int, global_batch: int) -> Misfit | None:
    """Whether a global batch divides into micro-batches, equally many on every data-parallel rank."""
    ranks = sizes.data_parallel(processes)
    if global_batch % (micro_batch * ranks) == 0:
        return None
    return Misfit(
        f"global-batch-size {global_batch} with micro-batch-size {micro_batch} on DP {ranks}",
        f"a multiple of {micro_batch * ranks}",
        "lower micro-batch-size or its processes, or raise global-batch-size",
    )
