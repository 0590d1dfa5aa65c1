"""Frozen groups and learning rates per group: bit-identical, no optimizer state, exact resume, exact recomputation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_btx.checkpoint.iterations import resolve_iteration
from megatron_btx.checkpoint.torch_dist import TorchDistReader
from tests.support import pico
from tests.support.mixing import mix
from tests.support.runner import Zygote, read_metrics

GROUP_OF_KEY = {
    "embedding.word_embeddings.weight": "embeddings",
    "output_layer.weight": "head",
    "decoder.final_layernorm.weight": "norms",
    "decoder.layers.input_layernorm.weight": "norms",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": "norms",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "norms",
    "decoder.layers.self_attention.linear_qkv.weight": "attention",
    "decoder.layers.self_attention.linear_proj.weight": "attention",
    "decoder.layers.mlp.router.weight": "router",
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": "experts",
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": "experts",
}
FREEZES = ["experts", "router", "attention", "embeddings", "norms", "head", "all-but:router", "all-but:head"]
GROUPS = set(GROUP_OF_KEY.values())
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
LAYOUTS = {
    "1": (1, ""),
    "dp2": (2, "--use-distributed-optimizer"),
    "ep2": (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
}


def frozen_by(word: str) -> set[str]:
    return GROUPS - set(word.removeprefix("all-but:").split(",")) if word.startswith("all-but:") else {word}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(resolve_iteration(path))
    return {key: reader.read(key, (0,) * len(held.shape), held.shape) for key, held in reader.tensors.items()}


@pytest.fixture(scope="module")
def mixture(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of two ages."""
    experts = {"a": dense / "iter_0000005", "b": dense, "c": dense, "d": dense / "iter_0000005"}
    return mix(experts, tmp_path_factory.mktemp("freeze") / "mix")


@pytest.fixture(scope="module")
def run(mixture: Path, zygote: Zygote, corpus: Path):
    """Train steps and save at the last and the second: metrics."""

    def train(folder: Path, world_size: int, more: list[str], steps: int = 4, name: str = "run"):
        arguments = pico.train(corpus, steps, folder / f"{name}.jsonl", moe=True)
        arguments += ["--pretrained-checkpoint", str(mixture), "--save-interval", "2", "--save", str(folder / name)]
        zygote.run(world_size, [*arguments, "--load", str(folder / name), *more], folder / f"{name}.log")
        return read_metrics(folder / f"{name}.jsonl")

    return train


@pytest.mark.parametrize(
    ("word", "layout"),
    [
        *((word, "1") for word in FREEZES),
        *((word, layout) for word in ("experts", "all-but:router") for layout in LAYOUTS if layout != "1"),
        ("all-but:head", "dp2"),
        ("all-but:norms", "pp2"),
        ("all-but:router,experts", "ep2"),
    ],
)
def test_frozen_stand_still_and_cost_nothing(word, layout, run, mixture, tmp_path):
    """Bit-identical after four steps and a resume, without optimizer state; the tail is the uninterrupted run's.

    Losses and gradient norms with full recomputation are those without.
    """
    world_size, flags = LAYOUTS[layout]
    more = ["--btx-freeze", word, *flags.split()]
    whole = run(tmp_path, world_size, more)
    before, after = tensors(mixture), tensors(tmp_path / "run")
    frozen = frozen_by(word)
    # The mix stores the norm before the experts under two keys, one for each kind of layers.
    before = {key: value for key, value in before.items() if key in after}
    assert {GROUP_OF_KEY[key] for key in before} == GROUPS
    for key in before:
        group = GROUP_OF_KEY[key]
        assert torch.equal(before[key], after[key]) == (group in frozen), key
        if "--use-distributed-optimizer" not in flags:  # whose state is one flat buffer
            assert (f"optimizer.state.exp_avg.{key}" in after) == (group not in frozen), key
    if "--use-distributed-optimizer" not in flags:
        # What freezing saves: Adam keeps two fp32 numbers for every parameter that is trained, and none for the others.
        state = sum(t.numel() * t.element_size() for key, t in after.items() if key.startswith("optimizer.state.exp_"))
        sizes = {True: 0, False: 0}
        for key, value in before.items():
            sizes[GROUP_OF_KEY[key] in frozen] += value.numel()
        assert state == 8 * sizes[False]
        if layout == "1":  # where one rank holds everything
            said = f"{sizes[True]:,} of {sum(sizes.values()):,} parameters of rank 0"
            assert said in (tmp_path / "run.log.0").read_text()
    if layout == "1":
        recomputed = run(tmp_path, 1, [*more, *RECOMPUTE], name="recomputed")
        for step, values in whole.items():
            assert values["grad-norm"] > 0
            for name in ("lm loss", "grad-norm"):
                assert recomputed[step][name] == pytest.approx(values[name], abs=1e-6)
    # Killed after step 2: the tracker is what a run resumes from.
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    tail = run(tmp_path, world_size, more)
    for step in (3, 4):
        assert tail[step]["lm loss"] == whole[step]["lm loss"]
    again = tensors(tmp_path / "run")
    assert all(torch.equal(after[key], again[key]) for key in before)


@pytest.mark.parametrize("layout", ["1", "dp2"])
def test_learning_rates(layout, run, mixture, tmp_path):
    """Adam's first step moves a parameter by its learning rate: three times as far for the router, others as before."""
    world_size, flags = LAYOUTS[layout]
    plain = [*flags.split(), "--weight-decay", "0", "--lr", "1e-3"]
    run(tmp_path, world_size, plain, 2, "plain")
    run(tmp_path, world_size, [*plain, "--btx-lr-multiplier", "router=3", "experts=0.5"], 2, "multiplied")
    start = tensors(mixture)
    moved = {}
    for name in ("plain", "multiplied"):
        end = tensors(tmp_path / name)
        moved[name] = {key: (end[key] - start[key]).abs().mean().item() for key in GROUP_OF_KEY if key in start}
    for key, group in GROUP_OF_KEY.items():
        if key in start:
            factor = {"router": 3.0, "experts": 0.5}.get(group, 1.0)
            # The second of the two steps sees other gradients.
            assert moved["multiplied"][key] / moved["plain"][key] == pytest.approx(factor, rel=0.1), key


@pytest.mark.parametrize("freeze", [[], ["--btx-freeze", "router"]])
def test_expert_bias_honours_the_freeze(freeze, zygote, corpus, tmp_path):
    """Megatron moves this bias by counts, not by gradients."""
    arguments = pico.train(corpus, 2, moe=True) + ["--save", str(tmp_path / "run"), "--save-interval", "2", *freeze]
    arguments += "--moe-router-score-function sigmoid --moe-router-enable-expert-bias".split()
    arguments += "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0".split()
    zygote.run(1, arguments, tmp_path / "log")
    biases = [value for key, value in tensors(tmp_path / "run").items() if "expert_bias" in key]
    assert biases
    assert all(bool(bias.any()) != bool(freeze) for bias in biases)
