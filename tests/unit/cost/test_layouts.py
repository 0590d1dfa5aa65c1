"""The arithmetic of layouts: every rule accepts what fits and names both numbers of what does not."""

from __future__ import annotations

import re

import pytest

from megatron_btx.cost import layouts as layout
from megatron_btx.cost.layouts import ParallelSizes


def test_what_fits_is_no_misfit():
    sizes = ParallelSizes(tensor=2, pipeline=2, context=1, expert=2, expert_tensor=1)
    assert layout.check_processes(sizes, 8) is None
    assert layout.check_experts(sizes, 8, 4) is None
    assert layout.check_layers(sizes, 4) is None
    assert layout.check_heads(sizes, 4) is None
    assert layout.check_batch(sizes, 8, 2, 8) is None
    assert sizes.data_parallel(8) == 2


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


@pytest.mark.parametrize(
    ("misfit", "found", "expected"),
    [
        (layout.check_processes(ParallelSizes(tensor=2, pipeline=3), 8), "8 processes for TP 2 x PP 3 x CP 1", "mult"),
        (layout.check_experts(ParallelSizes(expert=2), 8, 0), "expert-model-parallel-size 2 for a dense", "1"),
        (layout.check_experts(ParallelSizes(expert=3), 8, 6), "8 processes for EP 3 x expert TP 1 x PP 1", "multiple"),
        (layout.check_experts(ParallelSizes(expert=4), 8, 6), "6 experts over EP 4", "EP divides"),
        (layout.check_layers(ParallelSizes(pipeline=4), 6), "6 layers over PP 4", "PP divides"),
        (layout.check_heads(ParallelSizes(tensor=4), 6), "6 attention heads over TP 4", "TP divides"),
        (layout.check_batch(ParallelSizes(tensor=2), 8, 2, 12), "global-batch-size 12 with .*2 on DP 4", "of 8"),
    ],
)
def test_what_does_not_fit_names_both_numbers(misfit, found, expected):
    assert misfit is not None and re.search(found, misfit.found) and expected in misfit.expected
