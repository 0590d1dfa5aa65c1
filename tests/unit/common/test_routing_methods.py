"""The table of routing methods."""

from __future__ import annotations

import pytest

from megatron_btx.common.routing_methods import METHODS


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("top-k", {"moe-router-topk": 2}),
        ("top-k-pre-softmax", {"moe-router-topk": 2, "moe-router-pre-softmax": True}),
        ("switch", {"moe-router-topk": 1, "moe-router-pre-softmax": True, "moe-expert-capacity-factor": 1.5}),
        ("soft", {"moe-router-topk": 5}),
        ("sample-top1", {"moe-router-topk": 1, "moe-router-pre-softmax": True, "btx-sample-top1": True}),
    ],
)
def test_flags(name: str, flags: dict[str, object]) -> None:
    """Of every method, with the paper's numbers."""
    assert METHODS[name].flags(experts=5) == flags
