"""Budgets: from tokens to steps, of several parts to one, and what a stage computes for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from megatron_btx.checkpoint.sizes import layer_frequency, mixture_layers
from megatron_btx.common.errors import InputError
from megatron_btx.cost import flops as numbers
from megatron_btx.cost.flops import ModelShape
from megatron_btx.recipe.flags import Flags, number
from megatron_btx.recipe.names import place_of


@dataclass(frozen=True)
class Budget:
    """The data that a model is trained on."""

    blend: Mapping[str, float]
    """Domain -> share; sums to one."""
    tokens: int


def batch_tokens(flags: Flags) -> int:
    """Tokens of one step: sequence x global batch."""
    return number(flags, "seq-length") * number(flags, "global-batch-size")


def training_steps(stage: str, tokens: int, flags: Flags) -> int:
    """Steps for a budget: tokens / (sequence x global batch), to the nearest whole one; at least one whole batch."""
    one_step = batch_tokens(flags)
    if tokens < one_step:
        raise InputError(
            f"stage {stage}: a budget of {tokens} tokens is less than one global batch "
            f"({flags['global-batch-size']} x {flags['seq-length']} = {one_step} tokens); "
            f"raise tokens of {place_of(stage)}"
        )
    return round(tokens / one_step)


def token_weighted(parts: Iterable[Budget]) -> Budget:
    """The blend and the budget of all ``parts`` one after the other: each blend weighted by its part's tokens."""
    parts = list(parts)
    total = sum(part.tokens for part in parts)
    blend: dict[str, float] = {}
    for part in parts:
        for domain, share in part.blend.items():
            blend[domain] = blend.get(domain, 0.0) + share * part.tokens / total
    return Budget(blend, total)


def padded_vocabulary(flags: Flags, tokens: int | None) -> int | None:
    """Rows of the output layer, as Megatron pads them; None where nothing says how many tokens there are.

    Args:
        tokens: of the tokenizer, where its files say it.
    """
    if "padded-vocab-size" in flags:
        return number(flags, "padded-vocab-size")
    given = flags.get("vocab-size", tokens)
    if not isinstance(given, int):
        return None
    multiple = number(flags, "make-vocab-size-divisible-by", 128) * number(flags, "tensor-model-parallel-size", 1)
    return numbers.padded_rows(given, multiple)


def training_flops(flags: Flags, tokens: int, vocabulary: int) -> float:
    """What training on ``tokens`` costs, in floating-point operations, by :mod:`megatron_btx.cost.flops`.

    Args:
        vocabulary: rows of the output layer, padding included.
    """
    return numbers.training_flops(model_shape(flags, vocabulary), tokens, number(flags, "seq-length"))


def model_shape(flags: Flags, vocabulary: int) -> ModelShape:
    """The shape of the model that ``flags`` describe, with Megatron's defaults where a flag is not given."""
    hidden, layers, heads = (number(flags, name) for name in ("hidden-size", "num-layers", "num-attention-heads"))
    gated = bool(flags.get("swiglu"))
    ffn = number(flags, "ffn-hidden-size", numbers.default_ffn(hidden, gated))
    groups = heads
    if flags.get("group-query-attention"):
        groups = number(flags, "num-query-groups", heads)
    dense = ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=groups,
        channels=number(flags, "kv-channels", hidden // heads),
        ffn=ffn,
        gated=gated,
        vocabulary=vocabulary,
    )
    if "num-experts" not in flags:
        return dense
    shared = "moe-shared-expert-intermediate-size"
    return replace(
        dense,
        mixtures=_mixture_layers(flags, layers),
        experts=number(flags, "num-experts"),
        topk=number(flags, "moe-router-topk"),
        expert_ffn=number(flags, "moe-ffn-hidden-size", ffn),
        shared_ffn=number(flags, shared) if flags.get(shared) else 0,
        shared_gate=bool(flags.get("moe-shared-expert-gate")),
        first_takes_all=bool(flags.get("btx-sample-top1")),
    )


def _mixture_layers(flags: Flags, layers: int) -> int:
    """How many layers are mixtures."""
    pattern = mixture_layers(layer_frequency(str(flags.get("moe-layer-freq", 1))), layers)
    if len(pattern) != layers:
        raise InputError(
            f"mix.moe-layer-freq: names {len(pattern)} layers, num-layers {layers}; let it name every layer"
        )
    return sum(pattern)
