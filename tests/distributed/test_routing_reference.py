"""Outputs, gates, losses and gradients of every routing method against a plain-torch reference."""

from __future__ import annotations

import pytest

CHECKS = ("top_k", "pre_softmax", "switch", "soft", "sample", "sample_in_evaluation", "soft_first_layer", "accumulated")


@pytest.mark.parametrize("check", CHECKS)
def test_is_the_reference(check, zygote, tmp_path):
    """See tests/support/routing_reference.py, which draws shapes, coefficients and methods."""
    run = zygote.run(1, [], tmp_path / "log", entry="tests.support.routing_reference", environment={"CHECK": check})
    assert "checked" in run.text()
