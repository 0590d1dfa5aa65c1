"""The experts that the tests of the mix share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.hugging_face import Older
from tests.support.mixing import rewrite


@pytest.fixture(scope="session")
def older() -> Iterator[Older]:
    """The older transformers."""
    started = Older()
    yield started
    started.close()


@pytest.fixture(scope="session")
def experts(dense: Path, once: Callable[..., Path]) -> dict[str, Path]:
    """Three experts whose every tensor differs: two iterations of one run, and a perturbed copy."""
    generator = torch.Generator().manual_seed(7)

    def perturbed(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.01 * torch.randn(tensor.shape, generator=generator)

    wiki = once("wiki", lambda folder: rewrite(dense, folder, perturbed))
    return {"math": dense / "iter_0000005", "code": dense, "wiki": wiki}
