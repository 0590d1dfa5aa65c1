"""The torch-native layers against Megatron's own and torch's: same numbers, and refusals that name the flag."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_btx.common.errors import InputError
from megatron_btx.model.torch_parts import TorchAttention, TorchNorm

SEQUENCE, BATCH = 17, 2


def config(**changes: object) -> TransformerConfig:
    # Sequence parallel, so that dropout (of probability zero) needs no forked random state.
    parallel = changes.pop("sequence_parallel", True)
    settings = {"attention_dropout": 0.0, "num_query_groups": 4, "kv_channels": 8, **changes}
    made = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, **settings)
    made.sequence_parallel = parallel
    return made


def attend(
    kind: type, settings: TransformerConfig, layer: int = 1, scale: float | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result of an attention core and the gradients of query, key and value."""
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    core = kind(settings, layer, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=groups)
    generator = torch.Generator().manual_seed(0)

    def made(heads: int) -> torch.Tensor:
        shape = (SEQUENCE, BATCH, heads, settings.kv_channels)
        return torch.randn(shape, generator=generator).requires_grad_()

    parts = [made(settings.num_attention_heads), made(settings.num_query_groups), made(settings.num_query_groups)]
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    result = core(*parts, mask)
    (result * torch.randn(result.shape, generator=generator)).sum().backward()
    return result.detach(), [part.grad for part in parts]


@pytest.fixture
def plain_buffer(monkeypatch):
    """Megatron's stock attention takes its score matrix from a buffer on the GPU."""
    buffer = SimpleNamespace(get_tensor=lambda shape, dtype, name: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(parallel_state, "get_global_memory_buffer", lambda: buffer)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("head_size", [8, 16])
def test_attention_is_megatrons(groups, head_size, plain_buffer):
    """Values and gradients, for every number of query groups and for head sizes that are not hidden / heads."""
    settings = config(num_query_groups=groups, kv_channels=head_size)
    (ours, our_gradients), (stock, stock_gradients) = (
        attend(k, settings) for k in (TorchAttention, DotProductAttention)
    )
    assert ours.shape == (SEQUENCE, BATCH, 4 * head_size)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(our_gradients, stock_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_attention_with_scaled_layers_is_megatrons(plain_buffer):
    """--apply-query-key-layer-scaling divides by the layer's number and multiplies it back: no other function."""
    settings = config(apply_query_key_layer_scaling=True)
    ours, stock = (attend(kind, settings, layer=2)[0] for kind in (TorchAttention, DotProductAttention))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_attention_with_a_scale_of_its_own_is_megatrons(plain_buffer):
    ours, stock = (attend(kind, config(), scale=0.9)[0] for kind in (TorchAttention, DotProductAttention))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert (ours - attend(TorchAttention, config())[0]).abs().max() > 0.1


def test_attention_is_causal():
    """No position sees a later one."""
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    core = TorchAttention(config(), 1, AttnMaskType.causal, "self", pg_collection=groups)
    query, key, value = (
        torch.randn(SEQUENCE, BATCH, 4, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)
    )
    before = core(query, key, value, None)
    for part in (query, key, value):
        part[10:] += 1
    after = core(query, key, value, None)
    assert torch.equal(before[:10], after[:10]) and not torch.equal(before[10:], after[10:])


def test_what_attention_refuses():
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    with pytest.raises(InputError, match="attention type cross"):
        TorchAttention(config(), 1, AttnMaskType.causal, "cross", pg_collection=groups)
    core = TorchAttention(config(), 1, AttnMaskType.causal, "self", pg_collection=groups)
    part = torch.zeros(SEQUENCE, BATCH, 4, 8)
    for unsupported in ({"packed_seq_params": object()}, {"attention_bias": part}):
        with pytest.raises(InputError, match="--transformer-impl transformer_engine"):
            core(part, part, part, None, **unsupported)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("name", "stock"), [("RMSNorm", torch.nn.RMSNorm), ("LayerNorm", torch.nn.LayerNorm)])
def test_norms_are_torchs_and_marked(name, stock, parallel):
    """The same numbers, epsilon and dtype; every parameter says whether it is sequence parallel."""
    settings = config(normalization=name, sequence_parallel=parallel, params_dtype=torch.float64)
    norm, reference = TorchNorm(settings, 32, eps=0.25), stock(32, eps=0.25, dtype=torch.float64)
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), reference(x)) and not torch.equal(norm(x), stock(32, dtype=torch.float64)(x))
    assert [p for p, _ in norm.named_parameters()] == [p for p, _ in reference.named_parameters()]
    assert all(parameter.sequence_parallel is parallel for parameter in norm.parameters())
