"""Megatron's --moe-layer-freq as a text, read without running it."""

from __future__ import annotations

import ast
import math

from megatron_btx.ground.errors import InputError

_LAYERS_BELOW = 10_000


def layer_frequency(text: str) -> int | tuple[int, ...]:
    """A number, or a list built with + and *, as [0,1,1,0] or ([0]+[1]*3)*2. Raises InputError for anything else."""
    try:
        value = _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(
            f"--moe-layer-freq {text}: expected a number, or a list of 0 and 1 as [0,1,1,0] or ([0]+[1]*3)*2"
        ) from error
    return value if isinstance(value, int) else tuple(value)


def _evaluated(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < _LAYERS_BELOW:
        return node.value
    if isinstance(node, ast.List):
        values = [_evaluated(element) for element in node.elts]
        if all(isinstance(value, int) for value in values):
            return values  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluated(node.left), _evaluated(node.right)
        sizes = [len(value) if isinstance(value, list) else value for value in (left, right)]
        if (sum(sizes) if isinstance(node.op, ast.Add) else math.prod(sizes)) < _LAYERS_BELOW:
            value = left + right if isinstance(node.op, ast.Add) else left * right  # type: ignore[operator]
            return value  # type: ignore[no-any-return]
    raise ValueError(ast.dump(node))
