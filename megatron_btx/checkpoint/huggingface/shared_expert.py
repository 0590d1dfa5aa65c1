"""Qwen2-MoE's shared expert, a part that no mixture made here has: written as zeros, read back as nothing.

The architecture has one in every mixture layer: three matrices, and a gate that scales what they give. Servers build it
from the configuration: vLLM cannot load one of width zero, llama.cpp takes the feed-forward width in place of zero.
Matrices of zeros add nothing in any of them, and stay zeros when the mixture is trained further: every gradient has a
factor of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_btx.checkpoint.huggingface.families import bad_value, class_defaults, family_of
from megatron_btx.checkpoint.names import Row
from megatron_btx.checkpoint.pieces import Piece
from megatron_btx.checkpoint.sizes import Sizes
from megatron_btx.checkpoint.stored import Reader
from megatron_btx.common.errors import CheckpointError

MODEL_TYPE = "qwen2_moe"
WIDTH_KEY = "shared_expert_intermediate_size"
WRITTEN_WIDTH = 256
"""One block of llama.cpp's k-quants, and a multiple of every usual degree of tensor parallelism."""
_HF = "model.layers.{layer}.mlp.shared_expert"
_PIECE = "layers.{layer}.shared_expert"
_ROWS = (
    (Row(f"{_PIECE}.gate.weight", "SH", "", qwen_moe=f"{_HF}.gate_proj.weight"), "zeros"),
    (Row(f"{_PIECE}.up.weight", "SH", "", qwen_moe=f"{_HF}.up_proj.weight"), "zeros"),
    (Row(f"{_PIECE}.down.weight", "HS", "", qwen_moe=f"{_HF}.down_proj.weight"), "zeros"),
    (Row(f"{_PIECE}_gate.weight", "1H", "", qwen_moe=f"{_HF}_gate.weight"), "ramp"),
)
"""The tensors, and what is written in them.

The gate's numbers run from 1 to 2. llama.cpp computes its sigmoid as ``silu(x) / x``, which is NaN for ``x = 0``: zeros
would give that for every token, and equal numbers for hidden states whose mean is zero.
"""


def pieces(sizes: Sizes, width: int) -> Iterator[tuple[Piece, str]]:
    """The tensors of all shared experts of a model, and what is written in each: zeros, or ramp."""
    extents = sizes.extents | {"S": width, "1": 1}
    for layer, is_mixture in enumerate(sizes.mixture_layers):
        for row, content in _ROWS:
            if is_mixture:
                shape = tuple(extents[axis] for axis in row.axes)
                yield Piece(row.piece.format(layer=layer), shape, row, {"layer": layer}, False), content


def width_of(config: Mapping[str, Any], where: str) -> int:
    """Width of the shared expert that a configuration says; 0 for architectures without one.

    Raises:
        InputError: it is no width.
    """
    family = family_of(config, where)
    width = config.get(WIDTH_KEY, class_defaults(family).get(WIDTH_KEY, 0))
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
    import torch

    if family_of(config, where).model_type != MODEL_TYPE:
        return set()
    width = width_of(config, where)
    names = set()
    for piece, content in pieces(sizes, width):
        key = piece.row.qwen_moe.format(layer=piece.numbers["layer"])
        if key not in reader.tensors:
            if width:
                raise CheckpointError(f"{where}: {key} is missing; its configuration asks for it, so it is incomplete")
            continue
        shape = reader.tensors[key].shape
        if shape != piece.shape:
            raise CheckpointError(
                f"{where}: {key}: {list(shape)} is stored, its configuration says {list(piece.shape)} "
                f"({WIDTH_KEY} and hidden_size); the two do not belong together"
            )
        numbers = reader.read(key, (0, 0), shape)
        if content == "zeros" and torch.count_nonzero(numbers):
            raise CheckpointError(
                f"{where}: {key} holds other numbers than zero, expected a shared expert that adds nothing; "
                "shared experts are not converted, take a model without one"
            )
        if not bool(torch.isfinite(numbers).all()):
            raise CheckpointError(f"{where}: {key} holds NaN or infinite numbers, expected finite ones; save it again")
        names.add(key)
    return names
