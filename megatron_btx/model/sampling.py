"""Noise for sampled routing that belongs to the token, not to the rank that happens to hold it.

A generator's numbers depend on how many were drawn before: on the layout, on recomputation, on the order of a pipeline.
Here the noise is a function of (seed, sample, position, layer, expert), so that every layout, a resumed run and a
recomputed layer see the same.
"""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Annealing:
    """The temperature of sampled routing: ``max(least, exp(-rate * iteration))`` (the paper's section 4.4)."""

    rate: float = 1e-4
    """Per iteration."""
    least: float = 0.5

    def temperature(self, iteration: int) -> float:
        """The temperature of the step that follows ``iteration`` finished ones: 1 at the start."""
        return max(self.least, math.exp(-self.rate * iteration))


@dataclasses.dataclass
class Step:
    """Where training stands: what a router cannot see from its input. Written by the forward step, read by routers."""

    iteration: int = -1
    """Finished steps."""
    first_sample: int = 0
    """Number, since the start of training, of the first sequence of the micro-batch that is going forward."""
    _seen: dict[int, int] = dataclasses.field(default_factory=dict)

    def begin_microbatch(
        self, iteration: int, consumed: int, microbatches: int, micro_batch: int, ranks: int, rank: int, chunk: int
    ) -> None:
        """Say which sequences the next forward pass of model chunk ``chunk`` gets.

        Megatron's sequential sampler (``training/datasets/data_samplers.py``) gives data-parallel rank r of R the
        sequences ``consumed + (m R + r) B`` and the B - 1 after it, in its m-th micro-batch of the step.
        """
        if iteration != self.iteration:
            self.iteration, self._seen = iteration, {}
        # A step that Megatron runs again, to tell a broken machine from a broken loss, starts over at its first one.
        number = self._seen.get(chunk, 0) % microbatches
        self._seen[chunk] = number + 1
        self.first_sample = consumed + (number * ranks + rank) * micro_batch


def gumbel_noise(
    seed: int, samples_B: torch.Tensor, positions_S: torch.Tensor, layer: int, experts: int
) -> torch.Tensor:
    """Standard Gumbel noise of the tokens at some positions of some samples.

    Args:
        samples_B, positions_S: int64, on the device wanted.

    Returns:
        [S, B, E] fp32; the same numbers for the same arguments, on every device up to the logarithm's rounding.
    """
    expert_E = torch.arange(experts, device=samples_B.device)
    hashed_B = _mix(_mix(_mix(torch.full_like(samples_B, seed)) ^ samples_B) ^ layer)
    hashed_SB = _mix(hashed_B[None, :] ^ positions_S[:, None])
    hashed_SBE = _mix(hashed_SB[:, :, None] ^ expert_E)
    return _gumbel(hashed_SBE)


def _gumbel(hashed: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of 64-bit hashes: between -2.8 and 16.7, never infinite."""
    # 23 bits, and the half keeps 0 and 1 out: with 24 the largest would round to 1, once in 16 million draws.
    uniform = ((hashed >> 41 & 0x7FFFFF).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) after its increment, on int64 with wrap-around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
