"""The sampler's noise: of the right distribution, of the token alone."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_btx.model.sampling import Annealing, Step, _gumbel, gumbel_noise

EULER = 0.5772156649


def test_noise_is_standard_gumbel():
    """Mean, variance and quantiles of 400,000 numbers, to four standard errors."""
    noise = gumbel_noise(1, torch.arange(500), torch.arange(100), 3, 8).double().flatten()
    error = math.pi / math.sqrt(6 * len(noise))
    assert noise.mean().item() == pytest.approx(EULER, abs=4 * error)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=4 * math.sqrt(4.4 / len(noise)) * math.pi**2 / 6)
    for quantile in (0.01, 0.25, 0.5, 0.9, 0.999):
        below = (noise < -math.log(-math.log(quantile))).double().mean().item()
        assert below == pytest.approx(quantile, abs=4 * math.sqrt(quantile * (1 - quantile) / len(noise)))


def test_the_largest_is_distributed_as_the_softmax():
    """Pearson's chi-squared of the sampled experts; 5 degrees of freedom, limit of probability 1e-5."""
    logits_E = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    draws = (gumbel_noise(9, torch.arange(400), torch.arange(256), 1, 6) + logits_E).argmax(dim=-1).flatten()
    expected = torch.softmax(logits_E.double(), 0) * len(draws)
    statistic = ((torch.bincount(draws, minlength=6) - expected).square() / expected).sum().item()
    assert statistic < 30.9


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_are_independent(axis):
    """Correlation of neighbouring positions, samples and experts: zero to four standard errors."""
    noise = gumbel_noise(1, torch.arange(300), torch.arange(200), 3, 8).double()
    left, right = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
    correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(left.numel())


def test_noise_is_finite_for_every_hash():
    """The extremes of 64 bits, which no sample is likely to hold: one infinity makes a whole run nan."""
    noise = _gumbel(torch.tensor([-1, 0, 2**63 - 1, -(2**63)]))
    assert noise.isfinite().all() and -2.82 < noise.min() < noise.max() < 16.7
    # A token that did draw an infinite number while the noise had 24 bits.
    assert gumbel_noise(1234, torch.tensor([316]), torch.tensor([1487]), 2, 4).isfinite().all()


def test_noise_belongs_to_the_token():
    """A part of the positions or samples has the whole's numbers; seed, layer, position and sample all count."""
    samples, positions = torch.arange(40, 44), torch.arange(16)
    whole = gumbel_noise(1, samples, positions, 2, 4)
    assert torch.equal(gumbel_noise(1, samples[2:], positions[8:], 2, 4), whole[8:, 2:])
    for other in (
        gumbel_noise(2, samples, positions, 2, 4),
        gumbel_noise(1, samples + 4, positions, 2, 4),
        gumbel_noise(1, samples, positions + 16, 2, 4),
        gumbel_noise(1, samples, positions, 3, 4),
    ):
        assert not torch.isin(other, whole).any()


def test_temperature():
    """The paper's annealing: from 1, exponentially, to a floor."""
    assert Annealing().temperature(0) == 1
    assert Annealing().temperature(1000) == pytest.approx(math.exp(-0.1))
    assert Annealing().temperature(10**6) == 0.5
    assert Annealing(0.0).temperature(10**6) == 1


def test_samples_of_microbatches():
    """Numbers as Megatron's sampler deals sequences out; a step that is run again starts over, chunks count apart."""
    step = Step()

    def begin(iteration: int, rank: int = 1, chunk: int = 0) -> int:
        step.begin_microbatch(iteration, 100 * iteration, 2, 3, 4, rank, chunk)
        return step.first_sample

    assert [begin(5), begin(5)] == [503, 515]
    assert begin(5, chunk=1) == 503
    assert begin(5) == 503  # again
    assert begin(6, rank=0) == 600
