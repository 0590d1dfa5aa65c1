"""The sizes of layouts, as Megatron's arguments have them."""

from __future__ import annotations

import pytest

from megatron_btx.cost.layouts import ParallelSizes


@pytest.mark.parametrize(
    ("given", "sizes", "spread"),
    [
        ({}, ParallelSizes(), False),
        (
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": None},
            ParallelSizes(2, expert_tensor=2),
            False,
        ),
        ({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, ParallelSizes(2), True),
        ({"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 3}, ParallelSizes(1, 3, 1, 2), True),
        ({"context_parallel_size": 2}, ParallelSizes(context=2), False),
    ],
)
def test_the_sizes_of_megatrons_arguments(given, sizes, spread):
    """Expert tensor parallelism is that of the rest where it is not given; checkpoints may lack any of them."""
    assert ParallelSizes.of(given) == sizes and sizes.spreads_experts == spread
