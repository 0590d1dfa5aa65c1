"""Reading checkpoints with PyTorch's own code, and expecting refusals: helpers of the tests of the mix."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_btx.mixing.cli import main


def iteration(path: Path) -> Path:
    """The one iteration folder that a path stands for, found without the package's own code."""
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return path
    latest = tracker.read_text()
    return path / (latest if latest == "release" else f"iter_{int(latest):07d}")


def index(path: Path) -> Any:
    """PyTorch's own index of a checkpoint."""
    return pickle.loads((iteration(path) / ".metadata").read_bytes())


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All model tensors of a checkpoint, read by PyTorch instead of by the package."""
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in index(path).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    dcp.load(wanted, checkpoint_id=str(iteration(path)), no_dist=True)
    return wanted


def byte_entry(path: Path, key: str) -> Any:
    """One entry that is not a tensor, unpickled without restrictions."""
    (info,) = (info for entry, info in index(path).storage_data.items() if entry.fqn == key)
    with (iteration(path) / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        return torch.load(io.BytesIO(file.read(info.length)), weights_only=False)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit, signs of zero included."""
    return left.shape == right.shape and left.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes()


def expert_words(experts: dict[str, Path] | Iterable[tuple[str, Path]]) -> list[str]:
    """The --expert flags of a mix."""
    pairs = experts.items() if isinstance(experts, dict) else experts
    return [f"--expert={name}={path}" for name, path in pairs]


def refused(words: list[str], output: Path, capsys: Any) -> str:
    """Run the converter, expect its one-line refusal and nothing left behind; returns the line."""
    before = sorted(os.listdir(output.parent))
    capsys.readouterr()
    code = main([*words, "--output", str(output)])
    shown = capsys.readouterr()
    assert code == 2, shown.out
    lines = shown.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert sorted(os.listdir(output.parent)) == before, "a refusal must leave nothing behind"
    return lines[0]
