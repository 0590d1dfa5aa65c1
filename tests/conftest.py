"""Session fixtures: a forking process and a pico corpus for each worker, models that are made once for all of them."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import pico
from tests.support.runner import Zygote, gpu_count

gc.disable()  # looking at what is being imported, again and again, is a quarter of the time that collecting takes


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Callable[[Path], object]], Path]]:
    """``once(name, make)``: a folder that ``make(folder)`` fills once for all workers of a call; no test may change it.

    It is made anew in every call of pytest, so that no change of the code can find an old one.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    used: dict[Path, str] = {}

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, record = root / name, root / f"{name}.sha256"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                record.write_text(hash_of(folder))
        used[folder] = record.read_text()
        return folder

    yield folder_of
    assert [folder for folder, made in used.items() if hash_of(folder) != made] == [], "changed by a test"


LONGEST = (
    *("slurm/test_slurm", "quickstart/test_quickstart", "slurm/test_submission", "quickstart/test_four_models"),
    *("faults/test_orphans", "unit/mixing/test_memory"),
)
"""Files that take a minute or more and are not collected early, the longest first; the rest follows as collected."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take the files in this order: one that took a long file last would work on alone."""
    place = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it in every test."""
    gc.freeze()
    gc.enable()


def hash_of(folder: Path) -> str:
    """A hash of all files of a folder, with their names."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that forks the ranks of Megatron runs: over NCCL with two GPUs or more, else over gloo."""
    # All runs of a session on one kind of device: their losses are compared with each other.
    started = Zygote(gpus=gpu_count() if gpu_count() > 1 else 0)
    yield started
    started.close()


@pytest.fixture(scope="session")
def warm_python(zygote: Zygote) -> Iterator[Path]:
    """An interpreter whose programs have torch and Megatron at once: for starts that are not what a test is about."""
    if zygote.gpus:  # it has what is for GPUs, and these programs run on the CPU
        yield Path(sys.executable)
        return
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket is short
        yield zygote.warm_python(Path(folder))


@pytest.fixture
def starts_warm(warm_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs that this process starts are started warm."""
    monkeypatch.setattr(sys, "executable", str(warm_python))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a pico corpus."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pico.write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def dense(zygote: Zygote, corpus: Path, once: Callable[..., Path]) -> Path:
    """Root of a dense pico checkpoint with iterations 5 and 10."""

    def make(folder: Path) -> None:
        arguments = pico.train(corpus, 10) + ["--save", str(folder / "checkpoint"), "--save-interval", "5"]
        zygote.run(1, arguments, folder / "log")

    return once("dense", make) / "checkpoint"


@pytest.fixture(scope="session")
def four_experts(dense: Path, once: Callable[..., Path]) -> Path:
    """A mixture of four different experts: two iterations of one run, and perturbed copies."""
    import torch

    from tests.support.mixing import mix, rewrite

    def perturbed(seed: int) -> object:
        generator = torch.Generator().manual_seed(seed)
        return lambda key, tensor: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)

    def make(folder: Path) -> None:
        experts = {"a": dense / "iter_0000005", "b": dense}
        experts |= {name: rewrite(dense, folder / name, perturbed(seed)) for seed, name in enumerate("cd")}
        mix(experts, folder / "mix")

    return once("four-experts", make) / "mix"


@pytest.fixture(scope="session")
def quickstart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny texts where the quickstart's recipe looks for its own."""
    from tests.support.quickstart_texts import write_texts

    return write_texts(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def in_quickstart_folder(quickstart_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which the quickstart's recipe can be planned, as the working directory."""
    monkeypatch.chdir(quickstart_folder)
    return quickstart_folder
