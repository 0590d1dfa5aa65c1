"""Ridge regression and centroids against numpy; the split of documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_btx.evaluation.init_router import split_documents
from megatron_btx.evaluation.router_fit import centroid_rows, ridge_rows

HIDDEN, EXPERTS = 7, 3
COUNTS = (40, 25, 90)


@pytest.fixture(scope="module")
def inputs() -> list[np.ndarray]:
    """Tokens of three domains with different means, [T, H] each, of different numbers."""
    random = np.random.default_rng(0)
    return [random.normal(size=(count, HIDDEN)) + random.normal(size=HIDDEN) for count in COUNTS]


def moments(inputs: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    second = sum(x.T @ x / len(x) for x in inputs) / EXPERTS
    return torch.from_numpy(second), torch.from_numpy(np.stack([x.mean(axis=0) for x in inputs]))


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 1.0])
def test_ridge_is_least_squares(ridge, inputs):
    """The same as least squares with every domain weighing the same and the penalty as further rows of the system."""
    second, means = moments(inputs)
    penalty = np.sqrt(ridge * np.diag(second.numpy()).mean()) * np.eye(HIDDEN)
    weighted = np.concatenate([x / np.sqrt(len(x) * EXPERTS) for x in inputs] + [penalty])
    labels = np.zeros((len(weighted), EXPERTS))
    at = 0
    for domain, x in enumerate(inputs):
        labels[at : at + len(x), domain] = 1 / np.sqrt(len(x) * EXPERTS)
        at += len(x)
    expected = np.linalg.lstsq(weighted, labels, rcond=None)[0].T
    np.testing.assert_allclose(ridge_rows(second, means, ridge).numpy(), expected, atol=1e-10)


def test_centroids_point_at_their_domain(inputs):
    """Rows are along mean less common mean; the mean input of a domain prefers its own row."""
    second, means = moments(inputs)
    rows = centroid_rows(second, means).numpy()
    common = means.numpy().mean(axis=0)
    for domain, mean in enumerate(means.numpy()):
        direction = (mean - common) / np.linalg.norm(mean - common)
        np.testing.assert_allclose(rows[domain] / np.linalg.norm(rows[domain]), direction, atol=1e-12)
        assert (rows @ (mean - common)).argmax() == domain
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1 / np.sqrt(np.diag(second.numpy()).mean()))


@pytest.mark.parametrize("count", [5, 7, 300])
def test_held_out_documents_are_not_fitted_on(count):
    """Every fifth; together all, each once."""
    fit, held_out = split_documents(count)
    assert sorted(fit + held_out) == list(range(count))
    assert len(held_out) == count // 5
