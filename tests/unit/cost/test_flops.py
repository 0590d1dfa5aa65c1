"""The one formula for FLOPs, against Megatron's own and against multiplications that PyTorch counted."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from megatron_btx.cost.flops import (
    ModelShape,
    all_weights,
    default_ffn,
    multiplied_weights,
    padded_rows,
    training_flops,
)

DENSE = ModelShape(layers=3, hidden=64, heads=4, groups=2, channels=16, ffn=176, gated=True, vocabulary=256)
MIXTURE = dataclasses.replace(DENSE, mixtures=2, experts=4, topk=2, expert_ffn=96, shared_ffn=32)
SEQUENCE, SEQUENCES = 32, 5


def test_widths_and_rows_and_all_weights() -> None:
    """A dense model's are those that a token meets, and the embedding; a mixture's have its other experts, too."""
    assert (default_ffn(64, True), default_ffn(512, True), default_ffn(512, False)) == (128, 1344, 2048)
    assert (padded_rows(1, 128), padded_rows(128, 128), padded_rows(129, 128)) == (128, 128, 256)
    assert all_weights(DENSE) == multiplied_weights(DENSE) + 64 * 256
    others = MIXTURE.mixtures * (MIXTURE.experts - MIXTURE.topk) * 3 * 64 * MIXTURE.expert_ffn
    assert all_weights(MIXTURE) == multiplied_weights(MIXTURE) + 64 * 256 + others


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_the_same_as_megatrons(shape: ModelShape) -> None:
    """All but the routers, which Megatron leaves out."""
    from megatron.training.training import num_floating_point_operations

    args = SimpleNamespace(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        group_query_attention=True,
        num_query_groups=shape.groups,
        kv_channels=shape.channels,
        ffn_hidden_size=shape.ffn,
        swiglu=shape.gated,
        padded_vocab_size=shape.vocabulary,
        seq_length=SEQUENCE,
        num_experts=shape.experts or None,
        moe_layer_freq=[0, 1, 1],
        moe_router_topk=shape.topk,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_shared_expert_intermediate_size=shape.shared_ffn or None,
        moe_latent_size=None,
        mtp_num_layers=None,
        multi_latent_attention=False,
        experimental_attention_variant=None,
        linear_attention_freq=None,
        attention_output_gate=False,
        hybrid_layer_pattern=None,
        is_hybrid_model=False,
        hybrid_override_pattern=None,
    )
    tokens = SEQUENCE * SEQUENCES
    routers = 6 * tokens * shape.mixtures * shape.hidden * shape.experts
    theirs = num_floating_point_operations(args, SEQUENCES)
    assert training_flops(shape, tokens, SEQUENCE) - routers == theirs


@pytest.mark.parametrize("experts", [0, 4])
def test_the_same_as_was_counted(experts: int) -> None:
    """A forward pass of transformers' models; it multiplies the masked half of the scores, too."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape = dataclasses.replace(DENSE, ffn=176)
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.channels,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocabulary,
        "attn_implementation": "eager",
    }
    if experts:
        shape = dataclasses.replace(shape, mixtures=shape.layers, experts=experts, topk=2, expert_ffn=shape.ffn)
        # Grouped products are counted as none.
        config = MixtralConfig(**sizes, num_local_experts=experts, experts_implementation="eager")
        model = MixtralForCausalLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    words = torch.arange(SEQUENCE * SEQUENCES).reshape(SEQUENCES, SEQUENCE) % shape.vocabulary
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(words)
    tokens = SEQUENCE * SEQUENCES
    masked_half = 2 * tokens * shape.layers * SEQUENCE * shape.heads * shape.channels
    assert counter.get_total_flops() - masked_half == training_flops(shape, tokens, SEQUENCE) / 3
    weights = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    assert weights == all_weights(shape)


def test_sampled_routing_takes_all_experts_once() -> None:
    """In the first mixture layer."""
    sampled = dataclasses.replace(MIXTURE, topk=1, first_takes_all=True)
    one = dataclasses.replace(sampled, first_takes_all=False)
    assert multiplied_weights(sampled) - multiplied_weights(one) == 3 * 3 * 64 * 96
