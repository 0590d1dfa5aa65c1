"""Qwen2-MoE's shared expert, a part that no mixture made here has: written as zeros, read back as nothing.

The architecture has one in every mixture layer: three matrices, and a gate that scales what they give. Servers build it
from the configuration: vLLM cannot load one of width zero, llama.cpp takes the feed-forward width in place of zero.
Matrices of zeros add nothing in any of them, and stay zeros when the mixture is trained further: every gradient has a
factor of zero.

Axes: S width of the shared expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_btx.checkpoint.huggingface.families import bad_value, family_of
from megatron_btx.checkpoint.names import Row
from megatron_btx.checkpoint.pieces import Piece
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.checkpoint.stored import Reader
from megatron_btx.common.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "qwen2_moe"
WIDTH_KEY = "shared_expert_intermediate_size"
WRITTEN_WIDTH = 256
"""One block of llama.cpp's k-quants, and a multiple of every usual degree of tensor parallelism."""
_HF = "model.layers.{layer}.mlp.shared_expert"
_PIECE = "layers.{layer}.shared_expert"
_ROWS = {
    "zeros": tuple(
        Row(f"{_PIECE}.{name}.weight", "", qwen_moe=f"{_HF}.{name}_proj.weight") for name in ("gate", "up", "down")
    ),
    "ramp": (Row(f"{_PIECE}_gate.weight", "", qwen_moe=f"{_HF}_gate.weight"),),
}
"""The tensors, by what is written in them.

The gate's numbers run from 1 to 2. llama.cpp computes its sigmoid as ``silu(x) / x``, which is NaN for ``x = 0``: zeros
would give that for every token, and equal numbers for hidden states whose mean is zero.
"""
_READ_BYTES = 1 << 20


def pieces(sizes: Sizes, width: int) -> Iterator[tuple[Piece, str]]:
    """The tensors of all shared experts of a model, and what is written in each: zeros, or ramp."""
    for layer, is_mixture in enumerate(sizes.mixture_layers):
        if not is_mixture:
            continue
        for content, rows in _ROWS.items():
            for row in rows:
                name = row.piece.format(layer=layer)
                yield Piece(name, _shape(row, sizes.hidden, width), row, {"layer": layer}, False), content


def _shape(row: Row, hidden: int, width: int) -> tuple[int, int]:
    if row.piece.endswith("_gate.weight"):
        return 1, hidden
    if row.piece.endswith(".down.weight"):
        return hidden, width
    return width, hidden


def width_of(config: Mapping[str, Any], where: str) -> int:
    """Width of the shared expert that a configuration says; 0 for architectures without one.

    Raises:
        InputError: it is no width.
    """
    family = family_of(config, where)
    width = config.get(WIDTH_KEY, family.defaults.get(WIDTH_KEY, 0))
    if type(width) is not int or width < 0:
        raise bad_value(where, WIDTH_KEY, width, "an integer of at least 0", "correct it there")
    if width and family.is_mixture and family.model_type != MODEL_TYPE:
        raise bad_value(where, WIDTH_KEY, width, "0", "this architecture has no shared expert; correct it there")
    return width


def names_without_effect(reader: Reader, config: Mapping[str, Any], sizes: Sizes, where: str) -> set[str]:
    """The names of a folder's shared experts, all of which were found to add nothing.

    Raises:
        CheckpointError: one is missing, has another shape than the configuration says, or holds numbers that matter.
    """
    if family_of(config, where).model_type != MODEL_TYPE:
        return set()
    width = width_of(config, where)
    names = set()
    for piece, content in pieces(sizes, width):
        key = piece.row.qwen_moe.format(layer=piece.numbers["layer"])
        if key in reader.tensors:
            _check_shape(reader, key, piece.shape, where)
            _check_numbers(reader, key, content == "zeros", where)
            names.add(key)
        elif width:
            raise CheckpointError(f"{where}: {key} is missing; its configuration asks for it, so it is incomplete")
    return names


def _check_shape(reader: Reader, key: str, expected: Sequence[int], where: str) -> None:
    stored = reader.tensors[key]
    if tuple(stored.shape) != tuple(expected):
        raise CheckpointError(
            f"{where}: {key}: {list(stored.shape)} is stored, its configuration says {list(expected)} "
            f"({WIDTH_KEY} and hidden_size); the two do not belong together"
        )


def _check_numbers(reader: Reader, key: str, must_be_zero: bool, where: str) -> None:
    """Refuse what adds something: any other number than zero in a matrix, NaN or infinity in a gate."""
    import torch

    for rows in _rows(reader, key):
        if must_be_zero and torch.count_nonzero(rows):
            raise CheckpointError(
                f"{where}: {key} holds other numbers than zero, expected a shared expert that adds nothing; "
                "shared experts are not converted, take a model without one"
            )
        if not bool(torch.isfinite(rows).all()):
            raise CheckpointError(f"{where}: {key} holds NaN or infinite numbers, expected finite ones; save it again")


def _rows(reader: Reader, key: str) -> Iterator[torch.Tensor]:
    """All rows of a matrix, about a MiB at a time."""
    stored = reader.tensors[key]
    count, columns = stored.shape
    if columns == 0:
        return
    step = max(1, _READ_BYTES // (columns * stored.dtype.itemsize))
    for low in range(0, count, step):
        yield reader.read(key, (low, 0), (min(step, count - low), columns))
