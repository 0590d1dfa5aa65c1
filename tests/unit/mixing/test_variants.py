"""The variants of a mix: split, blend, upcycle, given weights, some layers only, routers, differing vocabularies."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from megatron_btx.mixing.cli import main
from megatron_btx.mixing.describe import starting_route
from megatron_btx.mixing.operations import router_rows
from megatron_btx.mixing.request import RouterInit
from tests.support import pico
from tests.support.mixing import mix, rewrite
from tests.support.runner import read_losses
from tests.unit.mixing.checkpoints import byte_entry, expert_words, refused, same_bits, tensors

FFN = 48
DENSE_FC1, DENSE_FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
ROUTER = "decoder.layers.mlp.router.weight"
COMMON = "common_state/shard_0_1"


def shared(path: Path) -> dict[str, torch.Tensor]:
    """All tensors but experts and routers."""
    return {key: t for key, t in tensors(path).items() if ".experts." not in key and ".router." not in key}


def feed_forward(fc1_GH: torch.Tensor, fc2_HF: torch.Tensor, x_TH: torch.Tensor) -> torch.Tensor:
    """SwiGLU, in fp64."""
    gate_TF, up_TF = (x_TH @ fc1_GH.double().T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_TF) * up_TF) @ fc2_HF.double().T


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    return torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(experts, tmp_path_factory) -> Path:
    """The ordinary mix, for what the variants have in common with it."""
    return mix(experts, tmp_path_factory.mktemp("plain") / "mix")


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_split_cuts_gate_up_and_down_together(chunks, experts, plain, inputs, tmp_path):
    """Expert n * C + c has chunk c of source n, bit for bit; the chunks' outputs add up to the whole block's."""
    out = mix(experts, tmp_path / "mix", "--method", "split", "--chunks", str(chunks), "--verify")
    result, width = tensors(out), FFN // chunks
    assert result[FC1].shape == (pico.LAYERS, 3 * chunks, 2 * width, 32)
    assert result[FC2].shape == (pico.LAYERS, 3 * chunks, 32, width)
    for n, path in enumerate(experts.values()):
        source = tensors(path)
        gate_LFH, up_LFH = source[DENSE_FC1].chunk(2, dim=1)
        for c in range(chunks):
            part = slice(c * width, (c + 1) * width)
            expected = torch.cat([gate_LFH[:, part], up_LFH[:, part]], dim=1)
            assert same_bits(result[FC1][:, n * chunks + c], expected)
            assert same_bits(result[FC2][:, n * chunks + c], source[DENSE_FC2][:, :, part])
        for layer in range(pico.LAYERS):
            whole = feed_forward(source[DENSE_FC1][layer], source[DENSE_FC2][layer], inputs)
            mine = range(n * chunks, (n + 1) * chunks)
            parts = [feed_forward(result[FC1][layer, e], result[FC2][layer, e], inputs) for e in mine]
            torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    assert all(same_bits(tensor, shared(plain)[key]) for key, tensor in shared(out).items())
    stored = byte_entry(out, COMMON)[0]["args"]
    assert stored.num_experts == 3 * chunks and stored.moe_ffn_hidden_size == width
    assert stored.btx_experts == [f"{name}.{c}" for name in experts for c in range(chunks)]


def test_blend_puts_a_chunk_of_every_source_in_every_expert(experts, plain, inputs, tmp_path):
    """Expert n is chunk n of all sources in order, bit for bit; all experts together are all sources together."""
    out = mix(experts, tmp_path / "mix", "--method", "blend", "--verify")
    result, width = tensors(out), FFN // 3
    sources = [tensors(path) for path in experts.values()]
    for n in range(3):
        part = slice(n * width, (n + 1) * width)
        gates = [source[DENSE_FC1].chunk(2, dim=1)[0][:, part] for source in sources]
        ups = [source[DENSE_FC1].chunk(2, dim=1)[1][:, part] for source in sources]
        assert same_bits(result[FC1][:, n], torch.cat([*gates, *ups], dim=1))
        assert same_bits(result[FC2][:, n], torch.cat([s[DENSE_FC2][:, :, part] for s in sources], dim=2))
    for layer in range(pico.LAYERS):
        blended = sum(feed_forward(result[FC1][layer, n], result[FC2][layer, n], inputs) for n in range(3))
        all_sources = sum(feed_forward(s[DENSE_FC1][layer], s[DENSE_FC2][layer], inputs) for s in sources)
        torch.testing.assert_close(blended, all_sources, rtol=1e-12, atol=1e-12)
    assert all(same_bits(tensor, shared(plain)[key]) for key, tensor in shared(out).items())
    assert byte_entry(out, COMMON)[0]["args"].moe_ffn_hidden_size == FFN


def test_upcycle_copies_one_model(experts, tmp_path):
    """N equal experts, and all else the source's own, bit for bit: nothing is averaged."""
    out = mix({"seed": experts["wiki"]}, tmp_path / "mix", "--method", "upcycle", "--copies", "5", "--verify")
    result, source = tensors(out), tensors(experts["wiki"])
    for n in range(5):
        assert same_bits(result[FC1][:, n], source[DENSE_FC1]) and same_bits(result[FC2][:, n], source[DENSE_FC2])
    for key, tensor in shared(out).items():
        assert same_bits(tensor, source[key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")])
    assert byte_entry(out, COMMON)[0]["args"].btx_experts == [f"seed.{n}" for n in range(5)]


def test_given_weights(experts, plain, tmp_path):
    """Normalised over all experts; the experts themselves are moved as ever, one of weight 0 too."""
    weights = {"math": 3.0, "code": 1.0, "wiki": 0.0}
    out = mix(experts, tmp_path / "mix", *(f"--weight={name}={w}" for name, w in weights.items()), "--verify")
    result, sources = tensors(out), {name: tensors(path) for name, path in experts.items()}
    assert same_bits(result[FC1], tensors(plain)[FC1]) and same_bits(result[FC2], tensors(plain)[FC2])
    for key, tensor in shared(out).items():
        origin = key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        expected = 0.75 * sources["math"][origin].double() + 0.25 * sources["code"][origin].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=6e-8, atol=1e-12)
    one = shared(mix(experts, tmp_path / "one", "--weight=math=0", "--weight=wiki=0"))
    assert all(same_bits(one[key], sources["code"][key]) for key in one if "pre_mlp" not in key)


@pytest.mark.parametrize("frequency", ["[0,1,1,0]", "2", "([0]+[1])*2"])
def test_some_layers_only(frequency, experts, tmp_path):
    """Numbered layers, as Megatron stores partial mixtures; the dense layers' feed-forward blocks are averaged."""
    out = mix(experts, tmp_path / "mix", "--moe-layer-freq", frequency, "--verify")
    result, sources = tensors(out), [tensors(path) for path in experts.values()]
    pattern = {"[0,1,1,0]": [0, 1, 1, 0], "2": [1, 0, 1, 0], "([0]+[1])*2": [0, 1, 0, 1]}[frequency]
    for layer, mixture in enumerate(pattern):
        prefix = f"decoder.layers.{layer}.mlp."
        for dense, expert in ((DENSE_FC1, "linear_fc1.weight"), (DENSE_FC2, "linear_fc2.weight")):
            if mixture:
                for n, source in enumerate(sources):
                    assert same_bits(result[f"{prefix}experts.experts.{expert}"][n], source[dense][layer])
            else:
                mean = torch.stack([source[dense][layer].double() for source in sources]).mean(0)
                torch.testing.assert_close(result[f"{prefix}{expert}"].double(), mean, rtol=6e-8, atol=0)
        assert (f"{prefix}router.weight" in result) == bool(mixture)
    stored = byte_entry(out, COMMON)[0]["args"].moe_layer_freq
    assert stored == (2 if frequency == "2" else pattern)


def test_some_layers_only_in_megatron(dense, zygote, corpus, tmp_path):
    """Equal experts in some layers are the dense model, in real Megatron, on one rank and on two."""
    equal = mix({"a": dense, "b": dense, "c": dense, "d": dense}, tmp_path / "mix", "--moe-layer-freq", "[0,1,1,0]")
    losses = {}
    cases = {
        "dense": (1, ["--pretrained-checkpoint", str(dense)]),
        "mix": (1, [*pico.MOE, "--moe-layer-freq", "[0,1,1,0]", "--pretrained-checkpoint", str(equal)]),
        "ep2": (2, [*pico.MOE, "--moe-layer-freq", "[0,1,1,0]", "--pretrained-checkpoint", str(equal)]),
    }
    for name, (ranks, words) in cases.items():
        metrics = tmp_path / f"{name}.jsonl"
        words = [*pico.train(corpus, 1, metrics), *words]
        words += ["--expert-model-parallel-size", "2"] if ranks == 2 else []
        zygote.run(ranks, words, tmp_path / f"log-{name}")
        losses[name] = read_losses(metrics)[1]
    assert losses["mix"] == pytest.approx(losses["dense"], abs=1e-6)
    assert losses["ep2"] == pytest.approx(losses["dense"], abs=1e-6)
    # As $(cat ...) gives it to a program: quotes would stay.
    assert "--moe-layer-freq [0,1,1,0]\n" in (equal / "megatron_args.txt").read_text()


# --- routers --------------------------------------------------------------------------------------------------


def test_routers_of_zeros_and_from_a_file(experts, tmp_path, capsys):
    """Rows for every layer, or for all; the report says where routing starts."""
    zeros = tensors(mix(experts, tmp_path / "zeros", "--router-init", "zeros"))[ROUTER]
    assert zeros.shape == (pico.LAYERS, 3, 32) and not zeros.any()
    assert "some experts get no token" in capsys.readouterr().out
    rows_LEH = np.random.default_rng(0).normal(size=(pico.LAYERS, 3, 32)).astype(np.float32)
    np.save(tmp_path / "all.npy", rows_LEH)
    np.save(tmp_path / "one.npy", rows_LEH[0])
    for name, expected in (("all", rows_LEH), ("one", np.stack([rows_LEH[0]] * pico.LAYERS))):
        out = mix(experts, tmp_path / name, "--router-init", str(tmp_path / f"{name}.npy"))
        assert np.array_equal(tensors(out)[ROUTER].numpy(), expected)


@pytest.mark.parametrize(("std", "warned"), [("0.02", False), ("1", True)])
def test_the_report_on_routers(std, warned, experts, capsys):
    """Standard deviation 1, as some tools draw it, makes routing of wide models one-hot: seen and said."""
    route = starting_route(router_rows(RouterInit(std=float(std)), 2, 4, 4096), 2)
    assert (route.entropy < 0.1) == warned
    assert main([*expert_words(experts), "--dry-run", "--router-std", std]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"routers \(normal, std {std}, seed 1234\): .*entropy, the first gate is \d\.\d\d", said)


def test_the_estimate_of_routing_is_right():
    """Against what is known: equal logits have all entropy and even gates; opposite rows share the tokens."""
    even = starting_route(torch.full((2, 4, 64), 0.0), 4)
    assert even.entropy == pytest.approx(1) and even.first_gate == pytest.approx(0.25)
    assert (even.least_load, even.largest_load) == (1, 1)
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    half = starting_route(torch.stack([row, -row])[None] * 100, 1)
    assert half.entropy < 0.01 and half.first_gate > 0.99
    assert half.least_load == pytest.approx(1, abs=0.1) and half.largest_load == pytest.approx(1, abs=0.1)


# --- differing sources ----------------------------------------------------------------------------------------


def test_taken_fields(dense, tmp_path):
    """A rotary base of one expert, a norm epsilon of the other; weights as ever."""
    arguments = {"rotary_base": 500000, "layernorm_epsilon": 1e-6}
    other = rewrite(dense, tmp_path / "other", arguments=arguments)
    pair = {"left": dense, "right": other}
    out = mix(pair, tmp_path / "mix", "--take", "rope_theta=right", "--take", "norm-epsilon=left")
    stored = byte_entry(out, COMMON)[0]["args"]
    assert stored.rotary_base == 500000 and stored.layernorm_epsilon == 1e-5
    assert all(same_bits(t, tensors(dense)[key]) for key, t in shared(out).items() if "pre_mlp" not in key)


def test_a_taken_dtype(dense, tmp_path):
    """An fp32 and a bf16 expert: all in the one's dtype, averages rounded once."""
    half = rewrite(dense, tmp_path / "half", lambda key, t: t.bfloat16(), {"bf16": True})
    pair = {"full": dense, "half": half}
    wide = tensors(mix(pair, tmp_path / "wide", "--take", "dtype=full"))
    narrow = tensors(mix(pair, tmp_path / "narrow", "--take", "dtype=half"))
    source = tensors(dense)[DENSE_FC1]
    assert wide[FC1].dtype == torch.float32 and same_bits(wide[FC1][:, 0], source)
    assert same_bits(wide[FC1][:, 1], source.bfloat16().float())
    assert narrow[FC1].dtype == torch.bfloat16 and torch.equal(narrow[FC1][:, 0], source.bfloat16())
    head = tensors(dense)["output_layer.weight"]
    expected = ((head.double() + head.bfloat16().double()) / 2).bfloat16()
    assert torch.equal(narrow["output_layer.weight"], expected)


EMBEDDINGS = ("embedding.word_embeddings.weight", "output_layer.weight")


def longer(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Sixty-four more rows for whatever has a row for each token."""
    return torch.cat([tensor + 1, tensor[:64] + 5]) if key in EMBEDDINGS else tensor


def test_padding_may_differ(dense, tmp_path):
    """One vocabulary, padded to 128 and to 192 rows: tokens are averaged over both, padding over those that have it."""
    other = rewrite(dense, tmp_path / "other", longer, {"padded_vocab_size": 192})
    out = mix({"a": dense, "b": other}, tmp_path / "mix", "--verify")
    source = tensors(dense)
    for key in EMBEDDINGS:
        result = tensors(out)[key]
        assert result.shape == (192, 32)
        both = (source[key].double() * 2 + 1) / 2
        torch.testing.assert_close(result[:128].double(), both, rtol=1e-6, atol=1e-6)
        assert same_bits(result[128:], source[key][:64] + 5)
    assert byte_entry(out, COMMON)[0]["args"].padded_vocab_size == 192


def test_a_union_of_vocabularies(dense, tmp_path, capsys):
    """Each row is the mean over the experts whose token it is: never scaled by those who lack it."""
    (tmp_path / "sources").mkdir()
    other = rewrite(dense, tmp_path / "sources" / "other", longer, {"padded_vocab_size": 192, "vocab_size": 160})
    words = expert_words({"a": dense, "b": other})
    message = refused(words, tmp_path / "out", capsys)
    assert "a has 96 tokens" in message and "b has 160" in message and "--vocab union" in message
    assert "cannot be read" in refused([*words, "--vocab", "union"], tmp_path / "out", capsys)
    out = mix({"a": dense, "b": other}, tmp_path / "mix", "--vocab", "union", "--allow-other-tokenizer", "--verify")
    for key in EMBEDDINGS:
        source, extended = tensors(dense)[key], tensors(other)[key]
        result = tensors(out)[key]
        both = (source[:96].double() + extended[:96].double()) / 2
        torch.testing.assert_close(result[:96].double(), both, rtol=1e-6, atol=1e-6)
        # Rows 96 to 128 are padding in the one and tokens in the other.
        assert same_bits(result[96:], extended[96:])
    stored = byte_entry(out, COMMON)[0]["args"]
    assert (stored.vocab_size, stored.padded_vocab_size) == (160, 192)


def test_a_taken_value_under_its_older_name(dense, tmp_path):
    """Megatron called the norm epsilon otherwise once: taken all the same, never replaced by a default."""
    older = rewrite(dense, tmp_path / "older", arguments={"norm_epsilon": 1e-6, "layernorm_epsilon": None})
    arguments = TorchDistReader(resolve_iteration(older)).arguments()
    del arguments["layernorm_epsilon"]
    checkpoint = next((tmp_path / "older").glob("iter_*"))
    torch.save({"args": argparse.Namespace(**arguments)}, checkpoint / "common.pt")
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    del index.state_dict_metadata[COMMON]
    index.storage_data = {key: info for key, info in index.storage_data.items() if key.fqn != COMMON}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    out = mix({"new": dense, "old": older}, tmp_path / "mix", "--take", "layernorm_epsilon=old")
    assert byte_entry(out, COMMON)[0]["args"].layernorm_epsilon == 1e-6
    assert "--norm-epsilon 1e-06" in (out / "megatron_args.txt").read_text()


def test_routing_settings_of_a_dense_runs_script_do_not_count(dense, tmp_path):
    """They stand in its stored arguments, and would change the mixture."""
    arguments = {"moe_expert_capacity_factor": 1.0, "moe_router_topk_scaling_factor": 2.5, "moe_router_num_groups": 2}
    odd = rewrite(dense, tmp_path / "odd", arguments=arguments)
    flags = (mix({"a": odd, "b": odd}, tmp_path / "mix") / "megatron_args.txt").read_text()
    assert "capacity" not in flags and "scaling-factor" not in flags and "num-groups" not in flags


# --- what the plan says ---------------------------------------------------------------------------------------


def test_explain_names_the_sources(experts, capsys):
    """For each slice of a tensor the rule, the expert and its tensor."""
    words = [*expert_words(experts), "--explain"]
    assert main([*words, FC1]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("  [2, 1] rows 48:96"))
    assert "layers.2.experts.1.up.weight" in line and "moved bit for bit" in line
    assert f"code: {DENSE_FC1}[2] (layers.2.ffn.up.weight)" in line
    assert main([*words, "decoder.layers.self_attention.linear_qkv.weight"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: decoder.layers.self_attention.linear_qkv.weight[3]" in said for name in experts)
    assert main([*words, ROUTER]) == 0
    assert "normal, std 0.02, seed 1234" in capsys.readouterr().out
