"""Session fixtures: one forking process, one pico corpus, one dense checkpoint, shared by all tests that need them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import pico
from tests.runner import Zygote, gpu_count


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that forks the ranks of Megatron runs: over NCCL with two GPUs or more, else over gloo."""
    # All runs of a session on one kind of device: their losses are compared with each other.
    started = Zygote(gpus=gpu_count() if gpu_count() > 1 else 0)
    yield started
    started.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a pico corpus."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pico.write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def dense(zygote: Zygote, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a dense pico checkpoint with iterations 5 and 10."""
    folder = tmp_path_factory.mktemp("dense")
    arguments = pico.train(corpus, 10) + ["--save", str(folder / "checkpoint"), "--save-interval", "5"]
    zygote.run(1, arguments, folder / "log")
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def four_experts(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four different experts: two iterations of one run, and perturbed copies."""
    import torch

    from tests.mixing import mix, rewrite

    folder = tmp_path_factory.mktemp("four-experts")

    def perturbed(seed: int) -> object:
        generator = torch.Generator().manual_seed(seed)
        return lambda key, tensor: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)

    experts = {"a": dense / "iter_0000005", "b": dense}
    experts |= {name: rewrite(dense, folder / name, perturbed(seed)) for seed, name in enumerate("cd")}
    return mix(experts, folder / "mix")


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny texts where the quickstart's recipe looks for its own."""
    from tests.quickstart_texts import write_texts

    return write_texts(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def in_quickstart_folder(quickstart_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which the quickstart's recipe can be planned, as the working directory."""
    monkeypatch.chdir(quickstart_folder)
    return quickstart_folder
