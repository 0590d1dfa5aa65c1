"""Function identities of a mixture, with the real Megatron in fp32: what must hold whatever was learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from megatron_btx.runner.run_dir import read_evaluation
from tests.support import pico
from tests.support.mixing import mix, rewrite
from tests.support.runner import Zygote, read_losses

TOLERANCE = 1e-6
"""Sums of the same fp32 numbers in another order."""


def evaluate(zygote: Zygote, folder: Path, models: dict[str, Path], corpus: Path, flags: list[str], **named) -> dict:
    """Losses by model name."""
    output = folder / "evaluation.json"
    arguments = [*pico.MODEL, "--micro-batch-size", "2", *flags, "--btx-eval-output", str(output)]
    arguments += ["--btx-eval-tokens", "1024", "--btx-eval-data", f"text={corpus}"]
    arguments += ["--btx-eval-model", *(f"{name}={path}" for name, path in models.items())]
    entry = named.pop("entry", "megatron_btx.evaluation.program")
    world_size = named.pop("world_size", 1)
    zygote.wait(zygote.start(world_size, arguments, folder / "log" / "evaluate", entry=entry, **named))
    return {name: model.model_dump() for name, model in read_evaluation(output).models.items()}


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_equal_experts_are_the_dense_model(topk, zygote, dense, corpus, tmp_path):
    """Four equal experts whose gates sum to one: the first training loss is the dense model's, for any router."""
    mixture = mix(dict.fromkeys("abcd", dense), tmp_path / "mix", "--moe-router-topk", str(topk))
    # k = 1 has to use the full softmax, whose gate is below one: only its shape is checked, by loading it.
    flags = ["--moe-router-topk", str(topk), *(["--moe-router-pre-softmax"] if topk == 1 else [])]
    for name, start, more in (("dense", dense, []), ("moe", mixture, flags)):
        arguments = pico.train(corpus, 1, tmp_path / f"{name}.jsonl", moe=name == "moe") + more
        zygote.run(1, [*arguments, "--pretrained-checkpoint", str(start)], tmp_path / "log" / name)
    losses = {name: read_losses(tmp_path / f"{name}.jsonl")[1] for name in ("dense", "moe")}
    if topk == 1:
        assert losses["moe"] != losses["dense"]
    else:
        assert losses["moe"] == pytest.approx(losses["dense"], abs=TOLERANCE)


def test_parameters_active_for_a_token(four_experts, dense):
    """Of four experts in four layers k are active; under sampled top-1 all of the first layer's, one of the others'."""
    from megatron_btx.evaluation.program import count_parameters
    from megatron_btx.mixing.loader import open_source

    source, expert, routers = open_source("mix", str(four_experts)), 3 * 32 * 48, 4 * 4 * 32
    total, active = count_parameters(source, 2, False)
    assert total - active == 4 * 2 * expert
    assert count_parameters(source, 4, False) == (total, total)
    assert count_parameters(source, 1, True) == (total, active - 4 * expert + 3 * expert)
    assert count_parameters(open_source("dense", str(dense)), 1, False) == (total - routers - 4 * 3 * expert,) * 2


@pytest.fixture(scope="module")
def experts_with_equal_shared_weights(dense, tmp_path_factory) -> dict[str, Path]:
    """Three experts that differ in their feed-forward blocks alone."""
    folder = tmp_path_factory.mktemp("experts")
    experts = {}
    for number, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(number)

        def change(key: str, tensor: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            if ".mlp." in key and tensor.dim() == 3:
                return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            return tensor

        experts[name] = rewrite(dense, folder / name, change)
    return experts


MOE_OF_THREE = [*pico.MOE, "--num-experts", "3"]


def test_a_forced_router_is_that_expert(experts_with_equal_shared_weights, zygote, corpus, tmp_path):
    """A router forced to expert i, with equal shared weights, gives dense expert i's loss."""
    experts = experts_with_equal_shared_weights
    mixture = mix(experts, tmp_path / "mix")
    alone = evaluate(zygote, tmp_path / "alone", experts, corpus, [])
    losses = {name: result["losses"]["text"] for name, result in alone.items()}
    assert max(losses.values()) - min(losses.values()) > 1e-3, "the experts must differ for this test to mean anything"
    for number, name in enumerate(experts):
        named = {"entry": "tests.support.forced_router", "environment": {"FORCED_EXPERT": str(number)}}
        result = evaluate(zygote, tmp_path / name, {"mix": mixture}, corpus, MOE_OF_THREE, **named)["mix"]
        assert result["losses"]["text"] == pytest.approx(losses[name], abs=TOLERANCE)
        for shares in result["routing"]["text"]:
            assert shares[number] == pytest.approx(0.5, abs=1e-9)  # the other half are second choices of gate zero


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "--expert-model-parallel-size 1"),
        (2, "--pipeline-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"),
        (3, "--expert-model-parallel-size 3"),
    ],
)
def test_evaluation_does_not_depend_on_the_layout(
    world_size, layout, experts_with_equal_shared_weights, zygote, corpus, tmp_path
):
    """The same tokens, losses and shares of routing under every layout."""
    mixture = mix(experts_with_equal_shared_weights, tmp_path / "mix")
    flags = [*MOE_OF_THREE, "--micro-batch-size", "1"]
    one = evaluate(zygote, tmp_path / "one", {"mix": mixture}, corpus, flags)["mix"]
    other = evaluate(
        zygote, tmp_path / "other", {"mix": mixture}, corpus, flags + layout.split(), world_size=world_size
    )["mix"]
    if world_size == 3:  # 32 sequences are not a multiple of three ranks
        assert other["tokens"]["text"] == 960
        return
    assert other["tokens"] == one["tokens"] == {"text": 1024}
    assert other["losses"]["text"] == pytest.approx(one["losses"]["text"], abs=TOLERANCE)
    assert torch.allclose(torch.tensor(other["routing"]["text"]), torch.tensor(one["routing"]["text"]), atol=1e-9)


@pytest.fixture(scope="module")
def ensembles(experts_with_equal_shared_weights, zygote, corpus, tmp_path_factory) -> Callable[..., dict]:
    """Evaluates the experts and their ensembles in a layout; a member's training text is a corpus of its own."""
    folder = tmp_path_factory.mktemp("ensembles")
    members = []
    for seed, name in enumerate(experts_with_equal_shared_weights):
        members.append(f"{name}={pico.write_corpus(folder / name, documents=20, seed=seed)}")

    def evaluate_in(world_size: int, layout: str, chosen: Sequence[str] = members) -> dict:
        flags = ["--micro-batch-size", "1", *layout.split(), "--btx-btm-top-k", "1", "--btx-btm-member", *chosen]
        flags += ["--btx-btm-weights", "tf-idf", "bayes", "--btx-btm-interval", "8"]
        output = folder / f"{world_size}{layout}"[:40].replace(" ", "")
        return evaluate(zygote, output, experts_with_equal_shared_weights, corpus, flags, world_size=world_size)

    evaluate_in.members = members  # type: ignore[attr-defined]
    return evaluate_in


def test_an_ensemble_of_one_is_that_expert(ensembles):
    found = ensembles(1, "", ensembles.members[1:2])
    for name in ("btm-top1", "btm-bayes-top1"):
        assert found[name]["losses"]["text"] == pytest.approx(found["b"]["losses"]["text"], abs=TOLERANCE)
        assert found[name]["tokens"] == found["b"]["tokens"]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, "--tensor-model-parallel-size 2"),
        (4, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    ],
)
def test_ensembles_do_not_depend_on_the_layout(world_size, layout, ensembles):
    """The same choices for every token: sequences are where they were, whichever rank had them."""
    one, other = ensembles(1, "--seed 1"), ensembles(world_size, layout)
    for name in ("btm-top1", "btm-bayes-top1"):
        shares = one[name]["routing"]["text"][0]
        assert min(shares) > 0 and max(shares) < 1, "one member alone would hide an exchange"
        assert torch.allclose(torch.tensor(other[name]["routing"]["text"]), torch.tensor([shares]), atol=1e-9)
        assert other[name]["losses"]["text"] == pytest.approx(one[name]["losses"]["text"], abs=TOLERANCE)
