"""New routers: how their rows are made, and what routing they start with."""

from __future__ import annotations

import dataclasses
import functools
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_btx.checkpoint.safe_pickle import UNREADABLE
from megatron_btx.common.errors import InputError

if TYPE_CHECKING:
    import torch

_SAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class RouterInit:
    """How the routers of a mix start."""

    kind: Literal["normal", "zeros", "file"] = "normal"
    """normal: drawn; zeros: all gates equal; file: read from :attr:`file`."""
    seed: int = 1234
    """Seed of normal."""
    std: float = 0.02
    """Standard deviation of normal; the paper is silent, this is how Megatron draws the other weights."""
    file: Path | None = None
    """An .npy file with rows [mixture layers, experts, hidden] or [experts, hidden]."""

    def __str__(self) -> str:
        if self.kind == "file":
            return str(self.file)
        return self.kind


def describe_routers(init: RouterInit, before: str = "") -> str:
    """How routers start, in words.

    Args:
        before: what stands before the word or the file's name where they are not drawn.
    """
    if init.kind == "normal":
        return f"normal, std {init.std:g}, seed {init.seed}"
    return f"{before}{init}"


def router_rows(init: RouterInit, layers: int, experts: int, hidden: int) -> torch.Tensor:
    """The routers of all mixture layers, in order: fp32 [L, E, H]; one generator draws them all, layer after layer.

    Raises:
        InputError: a file of rows cannot be read, is of another shape, or holds numbers that are not finite.
    """
    written = 0
    if init.file is not None and init.file.is_file():
        written = init.file.stat().st_mtime_ns
    return _router_rows(init, written, layers, experts, hidden)


@functools.lru_cache(maxsize=2)
def _router_rows(init: RouterInit, written: int, layers: int, experts: int, hidden: int) -> torch.Tensor:
    """As :func:`router_rows`, made once for all its readers; ``written`` tells one file from the next of its name."""
    import torch

    if init.kind == "normal":
        generator = torch.Generator().manual_seed(init.seed)
        drawn = [torch.empty(experts, hidden).normal_(0.0, init.std, generator=generator) for _ in range(layers)]
        return torch.stack(drawn)
    if init.file is None:
        return torch.zeros(layers, experts, hidden)
    rows = _rows_of_file(init.file)
    if rows.dim() == 2:
        rows = rows.expand(layers, *rows.shape)
    if tuple(rows.shape) != (layers, experts, hidden):
        raise InputError(
            f"--router-init {init}: holds {list(rows.shape)}, expected [{layers}, {experts}, {hidden}] "
            f"(mixture layers, experts, hidden) or [{experts}, {hidden}] for all layers"
        )
    if not bool(torch.isfinite(rows).all()):
        raise InputError(f"--router-init {init}: holds NaN or infinite numbers; make it again")
    return rows


def _rows_of_file(file: Path) -> torch.Tensor:
    import numpy as np
    import torch

    if not file.is_file():  # reading a pipe would wait forever
        raise InputError(f"--router-init {file}: expected normal, zeros, or an .npy file; there is none")
    try:
        # Mapped, so that a header which claims more than the file holds is refused before memory is asked for.
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
        if rows.dtype.kind not in "fiu":
            raise TypeError(f"its type is {rows.dtype}")
        return torch.from_numpy(np.array(rows)).float()
    except (*UNREADABLE, zipfile.BadZipFile) as error:  # .npz and .pt files are zip archives
        raise InputError(f"--router-init {file}: is not an .npy file of numbers ({error}); see numpy.save") from error


@dataclasses.dataclass(frozen=True)
class StartingRoute:
    """What routing starts with, for inputs of unit root mean square."""

    entropy: float
    """Mean entropy of the routing probabilities, as a share of its largest value ln E."""
    first_gate: float
    """Mean share of the expert with the largest gate among the k chosen: 1 is one-hot, 1/k even."""
    least_load: float
    largest_load: float
    """Smallest and largest share of (token, choice) pairs that an expert of any layer gets, as a share of even."""

    @property
    def nearly_one_hot(self) -> bool:
        """Whether the choice is all but made: gradients hardly reach the other experts."""
        return self.entropy < 0.1


def starting_route(rows_LEH: torch.Tensor, topk: int) -> StartingRoute:
    """Estimate the routing of a fresh mix from normal inputs of unit root mean square (as norms make them)."""
    import torch

    experts, hidden = rows_LEH.shape[1:]
    inputs_TH = torch.randn(_SAMPLES, hidden, generator=torch.Generator().manual_seed(0))
    entropy = first_gate = 0.0
    loads = []
    for weight_EH in rows_LEH:
        logits_TE = inputs_TH @ weight_EH.T
        log_probabilities_TE = torch.log_softmax(logits_TE, dim=-1)
        entropy += float(-(log_probabilities_TE.exp() * log_probabilities_TE).sum(-1).mean()) / math.log(experts)
        chosen = torch.topk(logits_TE, topk, dim=-1)
        gates_TK = torch.softmax(chosen.values, dim=-1) if topk > 1 else log_probabilities_TE.exp().amax(-1, True)
        first_gate += float(gates_TK[:, 0].mean())
        loads.append(torch.bincount(chosen.indices.flatten(), minlength=experts) * experts / (topk * _SAMPLES))
    layers = len(rows_LEH)
    load_LE = torch.stack(loads)
    return StartingRoute(entropy / layers, first_gate / layers, float(load_LE.min()), float(load_LE.max()))
