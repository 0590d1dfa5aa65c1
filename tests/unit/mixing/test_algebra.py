"""What a mix is made of: stacked bit for bit, averaged exactly, routers drawn once from a seed."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from megatron_btx.mixing.operations import for_one_rounding
from tests.support import pico
from tests.support.mixing import mix, planned, rewrite
from tests.unit.mixing.checkpoints import expert_words, same_bits, tensors
from tests.unit.mixing.folders import CONFIG, HIDDEN, llama_folder, llama_tensors, safetensors_bytes

EXPERTS = "decoder.layers.mlp.experts.experts."
STACKED = {
    f"{EXPERTS}linear_fc1.weight": "decoder.layers.mlp.linear_fc1.weight",
    f"{EXPERTS}linear_fc2.weight": "decoder.layers.mlp.linear_fc2.weight",
}
AVERAGED = {
    key: key
    for key in (
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.final_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.self_attention.linear_qkv.weight",
        "decoder.layers.self_attention.linear_proj.weight",
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    )
} | {"decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight"}
ROUTER = "decoder.layers.mlp.router.weight"


def mean_in_fp64(sources: list[torch.Tensor]) -> torch.Tensor:
    """The mean, computed another way than the package does."""
    return torch.stack([source.double() for source in sources]).mean(0)


@pytest.fixture(scope="module")
def mixed(experts, tmp_path_factory) -> Path:
    return mix(experts, tmp_path_factory.mktemp("mixed") / "mix")


def test_every_key_is_there_and_no_other(mixed):
    assert set(tensors(mixed)) == {*STACKED, *AVERAGED, ROUTER}


def test_feed_forward_blocks_are_stacked_bit_for_bit(experts, mixed):
    """Each expert's slice has the bytes of its own source, and of no other."""
    result = tensors(mixed)
    for target, source in STACKED.items():
        for place, path in enumerate(experts.values()):
            assert same_bits(result[target][:, place], tensors(path)[source])
        assert not same_bits(result[target][:, 0], result[target][:, 1])
        assert not same_bits(result[target][:, 1], result[target][:, 2])


def test_the_rest_is_the_mean_of_all_experts(experts, mixed):
    """Against a mean in fp64: no expert left out, none counted twice, none scaled (peers' defects)."""
    result = tensors(mixed)
    sources = [tensors(path) for path in experts.values()]
    for target, key in AVERAGED.items():
        expected = mean_in_fp64([source[key] for source in sources])
        assert result[target].dtype == torch.float32
        torch.testing.assert_close(result[target].double(), expected, rtol=6e-8, atol=0)
        for source in sources:
            assert (result[target] - source[key]).abs().max() > 1e-4, f"{key}: is one expert's, not the mean"


def test_the_order_of_experts_permutes_slices_alone(experts, mixed, tmp_path):
    """For every order: the slices follow the names, the averages stay, and so do the routers."""
    reference, names = tensors(mixed), list(experts)
    for number, order in enumerate(itertools.permutations(range(3))):
        permuted = tensors(mix({names[i]: experts[names[i]] for i in order}, tmp_path / str(number)))
        for key in STACKED:
            assert same_bits(permuted[key], reference[key][:, list(order)])
        for key in AVERAGED:
            assert same_bits(permuted[key], reference[key])
        assert same_bits(permuted[ROUTER], reference[ROUTER])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 11])
def test_equal_experts_average_to_themselves(count, dense, tmp_path):
    """N times the same number, divided by N, is that number: for other N than powers of two as well."""
    result = tensors(mix(dict.fromkeys(map(str, range(count)), dense), tmp_path / "mix"))
    source = tensors(dense)
    for target, key in AVERAGED.items():
        assert same_bits(result[target], source[key]), key
    for target, key in STACKED.items():
        for place in range(count):
            assert same_bits(result[target][:, place], source[key])


def test_bf16_is_rounded_once(experts, dense, tmp_path):
    """The mean of bf16 experts is the exact mean rounded once, not a mean taken in bf16."""
    in_bf16 = {
        name: rewrite(path, tmp_path / name, lambda key, tensor: tensor.bfloat16(), {"bf16": True})
        for name, path in {"a": experts["math"], "b": dense}.items()
    }
    in_bf16 |= {
        name: rewrite(dense, tmp_path / name, functools.partial(_shaken_bf16, number), {"bf16": True})
        for number, name in enumerate("cd")
    }
    result = tensors(mix(in_bf16, tmp_path / "mix"))
    sources = [tensors(path) for path in in_bf16.values()]
    naive_differs = False
    for target, key in AVERAGED.items():
        parts = [source[key] for source in sources]
        # Four numbers of 8 bits sum exactly in fp32 and divide exactly by four: one rounding is all there can be.
        assert result[target].dtype == torch.bfloat16
        assert torch.equal(result[target], mean_in_fp64(parts).float().bfloat16()), key
        naive = functools.reduce(torch.add, parts) / 4
        naive_differs |= not torch.equal(result[target], naive)
    assert naive_differs, "a mean taken in bf16 would pass as well"
    for target, key in STACKED.items():
        for place, source in enumerate(sources):
            assert torch.equal(result[target][:, place], source[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_once_too(dtype):
    """By way of fp32, as torch goes, a mean just beside the middle of two numbers becomes the middle."""
    step, generator = torch.finfo(dtype).eps, torch.Generator().manual_seed(1)
    low = 1 + step * torch.randint(0, int(1 / step) - 1, (4096,), generator=generator, dtype=torch.float64)
    low *= torch.where(torch.rand(4096, generator=generator) < 0.5, -1.0, 1.0)
    for shift, up in ((2.0**-30, True), (-(2.0**-30), False)):
        middle = low + low.sign() * step * (0.5 + shift)
        expected = (low + low.sign() * step * up).to(dtype)
        assert torch.equal(for_one_rounding(middle.clone(), dtype).to(dtype), expected)
        assert not torch.equal(middle.to(dtype), expected), "nothing would have been rounded twice"
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    assert torch.equal(
        for_one_rounding(special.clone(), dtype).to(dtype).view(torch.int16), special.to(dtype).view(torch.int16)
    )


def test_a_weighted_mean_of_bf16_is_rounded_once(tmp_path):
    """Seen in the files: the mean of 1 and the next number, a little above the middle."""
    folders = {}
    for name, number in (("a", 1.0), ("b", 1 + 2.0**-7)):
        folders[name] = llama_folder(tmp_path / name)
        held = {key: torch.full_like(tensor, number).bfloat16() for key, tensor in llama_tensors().items()}
        (folders[name] / "model.safetensors").write_bytes(safetensors_bytes(held))
        (folders[name] / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "bfloat16"}))
    plan, _ = planned(folders, tmp_path / "mix", "hf", method="average", weights={"a": 1.0, "b": 1.00000001})
    (norm,) = (piece for piece in plan.pieces if piece.name == "final_norm.weight")
    assert torch.equal(norm.operation.rows(plan, norm, 0, HIDDEN), torch.full((HIDDEN,), 1 + 2.0**-7).bfloat16())


def _shaken_bf16(seed: int, key: str, tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (tensor + 0.01 * torch.randn(tensor.shape, generator=generator)).bfloat16()


def router(path: Path) -> torch.Tensor:
    return tensors(path)[ROUTER]


def test_routers_are_normal_and_follow_their_seed(dense, tmp_path):
    """Normal(0, 0.02), one router per layer, no two rows alike; the same seed gives the same bits."""
    many = dict.fromkeys(map(str, range(16)), dense)
    drawn = {
        name: router(mix(many, tmp_path / name, *words))
        for name, words in {
            "first": ["--router-seed", "5"],
            "again": ["--router-seed", "5"],
            "other": ["--router-seed", "6"],
            "default": [],
            "1234": ["--router-seed", "1234"],
        }.items()
    }
    weight = drawn["first"]
    assert weight.shape == (pico.LAYERS, 16, 32)
    # 2,048 draws: three standard errors of the mean and of the standard deviation.
    assert weight.mean().item() == pytest.approx(0, abs=3 * 0.02 / 2048**0.5)
    assert weight.std().item() == pytest.approx(0.02, rel=3 / (2 * 2048) ** 0.5)
    # Normal, not uniform: kurtosis 3, standard error sqrt(24 / n).
    assert ((weight / weight.std()) ** 4).mean().item() == pytest.approx(3, abs=3 * (24 / 2048) ** 0.5)
    assert torch.unique(weight.reshape(-1, 32), dim=0).shape[0] == pico.LAYERS * 16
    assert same_bits(weight, drawn["again"])
    assert (weight - drawn["other"]).abs().max() > 0.01
    assert same_bits(drawn["default"], drawn["1234"])


def test_routers_are_drawn_in_fp32(dense, tmp_path):
    """In a bf16 mix they are the fp32 draw rounded, not a draw in bf16."""
    half = rewrite(dense, tmp_path / "half", lambda key, tensor: tensor.bfloat16(), {"bf16": True})
    in_fp32 = router(mix({"a": dense, "b": dense}, tmp_path / "fp32"))
    in_bf16 = router(mix({"a": half, "b": half}, tmp_path / "bf16"))
    assert in_bf16.dtype == torch.bfloat16
    assert torch.equal(in_bf16, in_fp32.bfloat16())


def test_the_iteration_folder_is_the_root(experts, dense, tmp_path):
    """A root stands for its latest iteration; the folder itself gives the same mix."""
    by_root = tensors(mix({"a": dense, "b": experts["wiki"]}, tmp_path / "root"))
    by_folder = tensors(mix({"a": dense / "iter_0000010", "b": experts["wiki"]}, tmp_path / "folder"))
    assert all(same_bits(by_root[key], by_folder[key]) for key in by_root)


def test_a_folder_whose_name_ends_in_a_slash_or_holds_an_equals_sign(dense, experts, tmp_path):
    """NAME=PATH is split at the first equals sign alone."""
    odd = tmp_path / "lr=1e-2"
    odd.symlink_to(dense, target_is_directory=True)
    by_link = tensors(mix({"a": f"{odd}/", "b": experts["wiki"]}, tmp_path / "link"))
    plain = tensors(mix({"a": dense, "b": experts["wiki"]}, tmp_path / "plain"))
    assert all(same_bits(by_link[key], plain[key]) for key in plain)


def test_the_plain_average_is_a_dense_model(experts, tmp_path):
    """--method average: the experts' own keys, every tensor their mean, no router and no expert axis."""
    result = tensors(mix(experts, tmp_path / "average", "--method", "average"))
    sources = [tensors(path) for path in experts.values()]
    assert set(result) == set(sources[0])
    for key, tensor in result.items():
        expected = mean_in_fp64([source[key] for source in sources])
        torch.testing.assert_close(tensor.double(), expected, rtol=6e-8, atol=0)


def test_dry_run_writes_nothing(experts, tmp_path, capsys):
    """The plan names every tensor and expert; the folder stays empty, with --output and without."""
    from megatron_btx.mixing.cli import main

    words = [*expert_words(experts), "--dry-run"]
    assert main(words) == 0
    without = capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == without
    assert list(tmp_path.iterdir()) == []
    for text in (*STACKED, *AVERAGED, ROUTER, *experts, "seed 1234", "MiB to write"):
        assert text in without
