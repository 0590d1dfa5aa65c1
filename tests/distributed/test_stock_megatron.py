"""A mix is a checkpoint of stock Megatron: it loads and trains without this package's layers and checks."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support import pico
from tests.support.mixing import mix, rewrite
from tests.support.runner import read_losses, read_metrics

TOLERANCE = 1e-5
"""Megatron's own attention and norms sum in another order than torch's."""


@pytest.fixture(scope="module")
def mixture(dense, tmp_path_factory) -> Path:
    """Different experts, and an epsilon that is not Megatron's default."""
    folder = tmp_path_factory.mktemp("stock")
    experts = {
        name: rewrite(path, folder / name, arguments={"layernorm_epsilon": 1e-4})
        for name, path in {"a": dense / "iter_0000005", "b": dense, "c": dense}.items()
    }
    return mix(experts, folder / "mix")


def flags_of(mixture: Path) -> list[str]:
    """megatron_args.txt, as ``$(cat ...)`` in a shell gives it."""
    return shlex.split((mixture / "megatron_args.txt").read_text())


def running(corpus: Path, folder: Path, metrics: Path) -> list[str]:
    """What a mix cannot know: data, batches, optimizer."""
    words = [*pico.TRAINING, "--train-iters", "3", "--train-data-path", str(corpus), "--btx-metrics", str(metrics)]
    # The last one is for Megatron's own norms, which without apex and Transformer Engine are torch's.
    return [*words, "--data-cache-path", str(folder / "cache"), "--no-persist-layer-norm"]


@pytest.fixture(scope="module")
def ours(mixture, zygote, corpus, tmp_path_factory) -> dict[int, float]:
    """The losses of our program, started from the mix with the flags beside it."""
    folder = tmp_path_factory.mktemp("ours")
    arguments = [*flags_of(mixture), *running(corpus, folder, folder / "metrics.jsonl")]
    zygote.run(1, [*arguments, "--pretrained-checkpoint", str(mixture)], folder / "log")
    return read_losses(folder / "metrics.jsonl")


@pytest.mark.parametrize("how", ["--pretrained-checkpoint", "--load"])
def test_stock_megatron_continues_from_a_mix(how, mixture, ours, zygote, corpus, tmp_path):
    """With exactly the flags beside the mix, Megatron's own layers and no check: the same losses."""
    arguments = [*flags_of(mixture), *running(corpus, tmp_path, tmp_path / "metrics.jsonl"), how, str(mixture)]
    zygote.run(1, arguments, tmp_path / "log", entry="tests.support.stock_program")
    losses = read_losses(tmp_path / "metrics.jsonl")
    assert losses == pytest.approx(ours, abs=TOLERANCE) and len(losses) == 3
    assert "loading release distributed checkpoint" in (tmp_path / "log.0").read_text()


def test_the_epsilon_matters_for_this_comparison(mixture, ours, zygote, corpus, tmp_path):
    """A flag that is lost between the mix and the run would be seen."""
    flags = flags_of(mixture)
    assert flags[flags.index("--norm-epsilon") + 1] == "0.0001"
    flags[flags.index("--norm-epsilon") + 1] = "1e-5"
    arguments = [*flags, *running(corpus, tmp_path, tmp_path / "metrics.jsonl"), "--load", str(mixture)]
    zygote.run(1, arguments, tmp_path / "log", entry="tests.support.stock_program")
    assert abs(read_losses(tmp_path / "metrics.jsonl")[1] - ours[1]) > 2 * TOLERANCE


def test_use_checkpoint_args(mixture, ours, zygote, corpus, tmp_path):
    """Megatron reads the model from the mix's arguments; what it never reads (the epsilon) is given."""
    told = "--norm-epsilon 1e-4 --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --attention-dropout 0"
    told += " --hidden-dropout 0 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
    told += " --tokenizer-type NullTokenizer --vocab-size 96 --padded-vocab-size 128"
    arguments = [*told.split(), *running(corpus, tmp_path, tmp_path / "metrics.jsonl"), "--load", str(mixture)]
    arguments += ["--use-checkpoint-args", "--micro-batch-size", "1"]
    zygote.run(1, arguments, tmp_path / "log", entry="tests.support.stock_program")
    assert read_losses(tmp_path / "metrics.jsonl") == pytest.approx(ours, abs=TOLERANCE)


@pytest.mark.parametrize("layout", [[], ["--pipeline-model-parallel-size", "2"]], ids=["1", "pp2"])
def test_our_routers_in_megatrons_own_layers(layout, mixture, zygote, corpus, tmp_path):
    """Sampled top-1, its soft first layer and the paper's balancing loss: the losses of our layers."""
    flags = flags_of(mixture)
    flags += "--moe-router-topk 1 --moe-router-pre-softmax --btx-sample-top1 --btx-load-balancing paper".split()
    flags += ["--moe-aux-loss-coeff", "0.5"]
    losses = {}
    for entry in ("megatron_btx.training.program", "tests.support.stock_program"):
        words = [*running(corpus, tmp_path, tmp_path / f"{entry}.jsonl"), *layout, "--load", str(mixture)]
        zygote.run(2 if layout else 1, [*flags, *words, "--finetune"], tmp_path / f"log-{entry}", entry=entry)
        losses[entry] = read_metrics(tmp_path / f"{entry}.jsonl")
    ours, stock = losses.values()
    assert len(ours) == 3 and ours[1]["load_balancing_loss"] > 0
    for step, values in ours.items():
        for name in ("lm loss", "load_balancing_loss", "grad-norm"):
            assert stock[step][name] == pytest.approx(values[name], abs=TOLERANCE), (step, name)


def test_the_average_has_flags_of_its_own(dense, zygote, corpus, tmp_path):
    """--method average: its megatron_args.txt builds the dense model."""
    average = mix({"a": dense, "b": dense}, tmp_path / "average", "--method", "average")
    losses = {}
    for name, flags, path in (("average", flags_of(average), average), ("dense", pico.MODEL, dense)):
        arguments = [
            *flags,
            *running(corpus, tmp_path, tmp_path / f"{name}.jsonl"),
            "--pretrained-checkpoint",
            str(path),
        ]
        zygote.run(1, arguments, tmp_path / f"log-{name}", entry="tests.support.stock_program")
        losses[name] = read_losses(tmp_path / f"{name}.jsonl")
    assert losses["average"] == losses["dense"]
