"""How large a model is and what training it costs: one formula each, without torch.

Axes as everywhere: ``L`` layers, ``E`` experts, ``H`` hidden, ``F`` feed-forward, ``V`` vocabulary, ``K`` top-k.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """What decides how many weights a GPT model has, and with how many of them a token is multiplied."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Key and value heads; as many as ``heads`` without grouped-query attention."""
    channels: int
    """Of one head."""
    ffn: int
    """Feed-forward units of a dense layer."""
    gated: bool
    """Whether a feed-forward block has three matrices (SwiGLU) or two."""
    vocabulary: int
    """Rows of the output layer, padding included."""
    mixtures: int = 0
    """How many of the layers are mixtures of experts."""
    experts: int = 0
    topk: int = 0
    """Experts that a token takes in a mixture layer."""
    expert_ffn: int = 0
    """Feed-forward units of one expert."""
    shared_ffn: int = 0
    """Feed-forward units of the shared experts of a mixture layer."""
    shared_gate: bool = False
    """Whether the shared experts have a gate."""
    first_takes_all: bool = False
    """Whether the first mixture layer takes all experts, as sampled top-1 routing does."""


def default_ffn(hidden: int, gated: bool) -> int:
    """Megatron's width of a feed-forward block where --ffn-hidden-size is not given."""
    if gated:
        return hidden * 8 // 3 // 64 * 64
    return 4 * hidden


def padded_rows(tokens: int, divisor: int) -> int:
    """Rows of the output layer: as many as tokens, rounded up to a multiple of ``divisor``, as Megatron pads them."""
    return -(-tokens // divisor) * divisor


def multiplied_weights(shape: ModelShape) -> int:
    """Weights with which one token is multiplied: not the embedding, which is looked up, and no norm or bias."""
    experts = shape.mixtures * shape.topk
    if shape.first_takes_all and shape.mixtures:
        experts += shape.experts - shape.topk
    return _weights_of_layers(shape, experts) + shape.hidden * shape.vocabulary


def all_weights(shape: ModelShape) -> int:
    """Weights of all matrices, embedding and output layer apart; no norm or bias."""
    return _weights_of_layers(shape, shape.mixtures * shape.experts) + 2 * shape.hidden * shape.vocabulary


def _weights_of_layers(shape: ModelShape, experts: int) -> int:
    """Weights of attention's projections, feed-forward blocks and routers, with so many experts over all layers."""
    attention = shape.layers * shape.hidden * shape.channels * 2 * (shape.heads + shape.groups)
    block = shape.hidden * (3 if shape.gated else 2)
    dense = (shape.layers - shape.mixtures) * block * shape.ffn
    routed = block * shape.expert_ffn * experts
    shared = shape.mixtures * block * shape.shared_ffn
    routers = shape.mixtures * shape.hidden * (shape.experts + int(shape.shared_gate))
    return attention + dense + routed + shared + routers


def training_flops(shape: ModelShape, tokens: int, sequence: int) -> float:
    """Floating-point operations of forward and backward for ``tokens`` tokens; recomputation would not count.

    Per token ``6 x`` the weights that are multiplied, and ``6 L S`` times the width of attention for its scores and
    their sums: causal, so that half of them count. The same as Megatron's own (``training/training.py``,
    num_floating_point_operations), which leaves the routers out.

    Args:
        sequence: tokens of one sequence.
    """
    scores = 6.0 * shape.layers * sequence * shape.heads * shape.channels
    return tokens * (6.0 * multiplied_weights(shape) + scores)
