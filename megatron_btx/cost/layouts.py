"""The sizes of a layout: over how many processes tensor, pipeline, context and expert parallelism spread a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
