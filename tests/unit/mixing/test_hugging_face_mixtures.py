"""Hugging Face models mixed, directly and through Megatron, against mixtures put together by hand in transformers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_btx.mixing import convert_hf
from tests.support.hugging_face import (
    DENSE,
    MODELS,
    assert_equal_logits,
    config_of,
    generated,
    loaded,
    logits,
    loss_in_megatron,
    loss_in_transformers,
    make_model,
    reference_mixture,
    router_rows,
    same_tensors,
    save,
    tensors,
)
from tests.support.mixing import mix, rewrite
from tests.unit.mixing.checkpoints import expert_words, refused

COUNT = 3
QWEN = tuple(name for name in DENSE if name.startswith("qwen"))
MIXTRAL = tuple(name for name in DENSE if name not in QWEN)
HF = "--output-format=hf"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Three models of one architecture, mixed."""

    models: list[Any]
    folders: dict[str, Path]
    rows: torch.Tensor
    """The routers: [L, E, H]."""
    router: str
    """The flag that gives them."""
    direct: Path
    """Hugging Face to Hugging Face."""
    megatron: Path


Mixtures = Callable[[str], Mixed]


def write_router(file: Path, layers: int, hidden: int = 32) -> tuple[torch.Tensor, str]:
    """Rows for the mixture's routers, and the flag that gives them."""
    rows_LEH = router_rows(layers, COUNT, hidden)
    np.save(file, rows_LEH.numpy())
    return rows_LEH, f"--router-init={file}"


def export(checkpoint: Path, target: Path) -> Path:
    """A Megatron checkpoint as a model folder."""
    assert convert_hf.main(["export", "--checkpoint", str(checkpoint), "--output", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Mixtures:
    folder = tmp_path_factory.mktemp("mixtures")

    @functools.cache
    def mixed(name: str) -> Mixed:
        models = [make_model(MODELS[name], seed) for seed in range(1, COUNT + 1)]
        folders = {f"e{n}": save(model, folder / f"{name}-{n}") for n, model in enumerate(models)}
        rows_LEH, router = write_router(folder / f"{name}.npy", MODELS[name]["num_hidden_layers"])
        direct = mix(folders, folder / f"{name}-direct", HF, router, "--verify")
        megatron = mix(folders, folder / f"{name}-megatron", router, "--verify")
        return Mixed(models, folders, rows_LEH, router, direct, megatron)

    return mixed


@pytest.mark.parametrize("name", DENSE)
def test_all_ways_give_the_same_bytes(name, mixtures, tmp_path):
    """Directly; mixed in Megatron's form and exported; experts imported first and mixed into a model folder."""
    mixed = mixtures(name)
    back = export(mixed.megatron, tmp_path / "back")
    imported = {}
    for expert, folder in mixed.folders.items():
        imported[expert] = tmp_path / expert
        assert convert_hf.main(["import", "--hf-model", str(folder), "--output", str(imported[expert])]) == 0
    for other in (back, mix(imported, tmp_path / "from-megatron", HF, mixed.router)):
        assert same_tensors(mixed.direct, other)
        assert config_of(other) == config_of(mixed.direct)


@pytest.mark.parametrize("name", DENSE)
def test_the_mixture_is_the_one_made_by_hand(name, mixtures, older):
    """Logits and text, in both versions of transformers."""
    mixed = mixtures(name)
    reference = reference_mixture(mixed.models, MODELS[name], mixed.rows)
    found = loaded(mixed.direct)
    expected = logits(reference)
    assert_equal_logits(logits(found), expected)
    assert generated(found) == generated(reference)
    in_older, tokens = older.load(mixed.direct)
    assert_equal_logits(in_older, expected)
    assert tokens == generated(reference)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_megatron_computes_the_loss_of_transformers(name, mixtures, zygote, corpus, tmp_path):
    """The mixture in Megatron's form, run by the real Megatron with the flags beside it."""
    found = loss_in_megatron(zygote, mixtures(name).megatron, corpus, tmp_path)
    assert found == pytest.approx(loss_in_transformers(loaded(mixtures(name).direct), corpus), abs=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_feed_forward_blocks_are_the_sources_own(name, mixtures):
    """Every expert's three matrices, by the names of its form, bit for bit and in order."""
    mixed = mixtures(name)
    result = tensors(mixed.direct)
    forms = {
        "mixtral": ("block_sparse_moe.experts.{}.", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        "qwen": ("mlp.experts.{}.", {part: part for part in ("gate_proj", "up_proj", "down_proj")}),
    }
    block, parts = forms["qwen" if name in QWEN else "mixtral"]
    for expert, folder in enumerate(mixed.folders.values()):
        source = tensors(folder)
        for layer in range(3):
            for part, called in parts.items():
                prefix = f"model.layers.{layer}."
                found = result[f"{prefix}{block.format(expert)}{called}.weight"]
                assert torch.equal(found, source[f"{prefix}mlp.{part}.weight"])


@pytest.mark.parametrize("name", DENSE)
def test_equal_experts_are_the_dense_model(name, mixtures, tmp_path):
    """Whatever the router chooses, for any number of experts per token."""
    mixed = mixtures(name)
    same = dict.fromkeys(mixed.folders, mixed.folders["e0"])
    for topk in (2, 3):
        out = mix(same, tmp_path / str(topk), HF, mixed.router, f"--moe-router-topk={topk}")
        assert config_of(out)["num_experts_per_tok"] == topk
        assert_equal_logits(logits(out), logits(mixed.models[0]))


@contextmanager
def forced(mixture: Any, expert: int) -> Iterator[None]:
    """Every token goes to one expert with weight one, whatever the routers say."""

    def force(module: Any, given: Any, made: Any) -> Any:
        router_logits, scores_TK, indices_TK = made
        first = torch.zeros_like(scores_TK).index_fill_(1, torch.tensor([0]), 1.0)
        others = torch.tensor([expert, (expert + 1) % COUNT]).expand_as(indices_TK)
        return router_logits, first, others

    hooks = [m.register_forward_hook(force) for n, m in mixture.named_modules() if n.endswith("mlp.gate")]
    assert len(hooks) == 3
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", DENSE)
def test_a_router_forced_to_one_expert(name, mixtures):
    """The logits of a dense model with the average's shared weights and that expert's feed-forward blocks."""
    mixed = mixtures(name)
    mixture = loaded(mixed.direct)
    states = [model.state_dict() for model in mixed.models]
    seen = []
    for expert in range(COUNT):
        dense = make_model(MODELS[name])
        for key, tensor in dense.state_dict().items():
            mean = sum(state[key].double() for state in states) / COUNT
            tensor.copy_(states[expert][key] if ".mlp." in key else mean.float())
        with forced(mixture, expert):
            found = logits(mixture)
        assert_equal_logits(found, logits(dense))
        seen.append(found)
    assert not torch.allclose(seen[0], seen[1], atol=0.1), "the experts must differ for this to show anything"


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("topk", [1, 2])
def test_partial_mixtures_in_qwens_forms(name, topk, mixtures, older, tmp_path):
    """Layer 1 alone is a mixture; with one expert per token its gate is the full softmax."""
    mixed = mixtures(name)
    rows_LEH, router = write_router(tmp_path / "rows.npy", layers=1)
    words = (router, "--moe-layer-freq=[0,1,0]", f"--moe-router-topk={topk}")
    direct = mix(mixed.folders, tmp_path / "direct", HF, *words)
    back = export(mix(mixed.folders, tmp_path / "megatron", *words), tmp_path / "back")
    assert same_tensors(direct, back) and config_of(direct) == config_of(back)
    more = {"mlp_only_layers": [0, 2], "num_experts_per_tok": topk, "norm_topk_prob": topk > 1}
    reference = reference_mixture(mixed.models, MODELS[name] | more, rows_LEH)
    assert_equal_logits(logits(direct), logits(reference))
    assert_equal_logits(older.load(direct)[0], logits(reference))


@pytest.mark.parametrize("name", MIXTRAL)
def test_what_mixtrals_form_cannot_say(name, mixtures, tmp_path, capsys):
    """Dense layers among mixtures, and gates that are no softmax over the chosen."""
    mixed = mixtures(name)
    words = [*expert_words(mixed.folders), HF]
    message = refused([*words, "--moe-layer-freq=[0,1,0]"], tmp_path / "out", capsys)
    assert "moe_layer_freq is [0, 1, 0]" in message and "Mixtral" in message
    message = refused([*words, "--moe-router-topk=1"], tmp_path / "out", capsys)
    assert "moe_router_pre_softmax" in message and "Mixtral" in message


@pytest.mark.parametrize("name", DENSE)
def test_the_average_is_a_dense_model(name, mixtures, older, tmp_path):
    mixed = mixtures(name)
    out = mix(mixed.folders, tmp_path / "out", HF, "--method=average", "--weight=e0=2")
    assert config_of(out)["model_type"] == MODELS[name]["model_type"]
    dense = make_model(MODELS[name])
    states = [model.state_dict() for model in mixed.models]
    for key, tensor in dense.state_dict().items():
        tensor.copy_(sum(w * state[key].double() for w, state in zip((0.5, 0.25, 0.25), states, strict=True)))
    assert_equal_logits(logits(out), logits(dense))
    assert_equal_logits(older.load(out)[0], logits(dense))


# --- what no Hugging Face form says ---------------------------------------------------------------------------

EXPORT_REFUSALS = {
    "capacity factor": ("llama", {"moe_expert_capacity_factor": 1.5}, ["moe_expert_capacity_factor is 1.5"]),
    "soft first layer": ("llama", {"btx_sample_top1": True}, ["btx_sample_top1 is True"]),
    "partial Mixtral": ("llama", {"moe_layer_freq": [0, 1, 0]}, ["moe_layer_freq is [0, 1, 0]", "Mixtral"]),
    "full softmax in Mixtral": ("llama", {"moe_router_pre_softmax": True}, ["moe_router_pre_softmax", "Mixtral"]),
    "sigmoid router": ("llama", {"moe_router_score_function": "sigmoid"}, ["moe_router_score_function is 'sigmoid'"]),
    "LayerNorm": ("qwen2", {"normalization": "LayerNorm"}, ["layer_norm_bias is missing"]),
    "learned positions": (
        "qwen2",
        {"position_embedding_type": "learned_absolute"},
        ["position_embeddings.weight is missing"],
    ),
    "half the head rotated": ("qwen2", {"rotary_percent": 0.5}, ["rotary_percent is 0.5"]),
    "layers without rope": ("qwen3", {"no_rope_freq": 3}, ["no_rope_freq"]),
    "two-sided window": ("qwen3", {"window_size": (4, 4)}, ["window_size is (4, 4)"]),
    "clamped activation": ("qwen3", {"activation_func_clamp_value": 7.0}, ["activation_func_clamp_value is 7.0"]),
    "QK norm and biases": ("qwen3", {"add_qkv_bias": True}, ["linear_qkv.bias is missing"]),
}


@pytest.mark.parametrize("case", list(EXPORT_REFUSALS))
def test_exports_that_are_refused(case, mixtures, tmp_path, capsys):
    """One line that names the argument and its value, exit code 2, and nothing left behind."""
    name, arguments, named = EXPORT_REFUSALS[case]
    source = mixtures(name).megatron
    if case == "partial Mixtral":
        source = mix(mixtures(name).folders, tmp_path / "partial", "--moe-layer-freq=[0,1,0]")
    else:
        source = rewrite(source, tmp_path / "source", arguments=arguments)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert convert_hf.main(["export", "--checkpoint", str(source), "--output", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(text in lines[0] for text in named), lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_that_is_only_rewritten_is_exported(mixtures, tmp_path):
    """The refusals above are of the arguments: without one of them nothing is refused."""
    for name in ("llama", "qwen2", "qwen3"):
        out = export(rewrite(mixtures(name).megatron, tmp_path / f"{name}-source"), tmp_path / name)
        assert same_tensors(out, mixtures(name).direct)
