"""Budgets: from tokens to steps, of several parts to one, and what a stage computes for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron_btx.checkpoint.frequency import layer_frequency
from megatron_btx.checkpoint.sizes import mixture_layers
from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.recipe.flags import Flags, number

if TYPE_CHECKING:
    from megatron_btx.pipeline.recipe.schema import Training


def batch_tokens(flags: Flags) -> int:
    """Tokens of one step: sequence x global batch."""
    return number(flags, "seq-length") * number(flags, "global-batch-size")


def training_steps(stage: str, tokens: int, flags: Flags) -> int:
    """Steps for a budget: tokens / (sequence x global batch), to the nearest whole one; at least one whole batch."""
    one_step = batch_tokens(flags)
    if tokens < one_step:
        raise InputError(
            f"stage {stage}: a budget of {tokens} tokens is less than one global batch "
            f"({flags['global-batch-size']} x {flags['seq-length']} = {one_step} tokens); raise its tokens"
        )
    return round(tokens / one_step)


def token_weighted(parts: Iterable[Training]) -> tuple[dict[str, float], int]:
    """The blend and the budget of all ``parts`` one after the other: each blend weighted by its part's tokens."""
    parts = list(parts)
    total = sum(part.tokens for part in parts)
    blend: dict[str, float] = {}
    for part in parts:
        for domain, share in part.blend.items():
            blend[domain] = blend.get(domain, 0.0) + share * part.tokens / total
    return blend, total


def padded_vocabulary(flags: Flags, corpora: Flags) -> int | None:
    """Rows of the output layer, as Megatron pads them; None where only a tokenizer's file says how many tokens it has.

    Args:
        corpora: flags of the corpora that the run makes, whose tokenizer has their vocab-size.
    """
    if "padded-vocab-size" in flags:
        return number(flags, "padded-vocab-size")
    given = corpora.get("vocab-size") or flags.get("vocab-size")
    if not isinstance(given, int):
        return None
    multiple = number(flags, "make-vocab-size-divisible-by", 128) * number(flags, "tensor-model-parallel-size", 1)
    return -(-given // multiple) * multiple


def training_flops(flags: Flags, tokens: int, vocabulary: int) -> float:
    """6 x active parameters x tokens, a parameter counting when a token is multiplied with it.

    Those are the attention projections, dense feed-forward blocks, the experts that a token takes and the shared ones,
    the router and the output layer; not the embedding, norms or biases. Attention scores are left out: an estimate for
    comparisons.

    Args:
        vocabulary: rows of the output layer, padding included.
    """
    hidden, layers, heads = (number(flags, name) for name in ("hidden-size", "num-layers", "num-attention-heads"))
    channels = number(flags, "kv-channels", hidden // heads)
    groups = number(flags, "num-query-groups", heads) if flags.get("group-query-attention") else heads
    attention = layers * hidden * channels * 2 * (heads + groups)
    gated = bool(flags.get("swiglu"))
    matrices = 3 if gated else 2
    width = number(flags, "ffn-hidden-size", hidden * 8 // 3 // 64 * 64 if gated else 4 * hidden)
    mixtures = _mixture_layers(flags, layers)
    feed_forward = (layers - mixtures) * matrices * hidden * width
    if mixtures:
        feed_forward += matrices * hidden * _expert_units(flags, mixtures, width) + _routing(flags, mixtures, hidden)
    return 6.0 * tokens * (attention + feed_forward + hidden * vocabulary)


def _mixture_layers(flags: Flags, layers: int) -> int:
    """How many layers are mixtures."""
    if "num-experts" not in flags:
        return 0
    frequency = layer_frequency(str(flags.get("moe-layer-freq", 1)))
    pattern = mixture_layers(frequency if isinstance(frequency, int) else list(frequency), layers)
    if len(pattern) != layers:
        raise InputError(f"--moe-layer-freq names {len(pattern)} layers, num-layers {layers}; let it name every layer")
    return sum(pattern)


def _expert_units(flags: Flags, mixtures: int, width: int) -> int:
    """Feed-forward units that a token passes in all mixture layers: those of its experts and of the shared ones."""
    experts, topk = number(flags, "num-experts"), number(flags, "moe-router-topk")
    # Under sampled top-1 routing the first mixture layer takes all experts.
    taken = mixtures * topk + (experts - topk if flags.get("btx-sample-top1") else 0)
    name = "moe-shared-expert-intermediate-size"
    shared = number(flags, name) if flags.get(name) else 0
    return taken * number(flags, "moe-ffn-hidden-size", width) + mixtures * shared


def _routing(flags: Flags, mixtures: int, hidden: int) -> int:
    """Parameters of the routers, and of the shared experts' gates."""
    gates = 1 if flags.get("moe-shared-expert-gate") else 0
    return mixtures * hidden * (number(flags, "num-experts") + gates)
