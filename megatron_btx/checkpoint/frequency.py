"""Megatron's --moe-layer-freq as a text, read without running it."""

from __future__ import annotations

import ast

from megatron_btx.ground.errors import InputError

_LAYERS_BELOW = 10_000


def layer_frequency(text: str) -> int | tuple[int, ...]:
    """A number, or a list built with + and *, as [0,1,1,0] or ([0]+[1]*3)*2. Raises InputError for anything else."""
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise InputError(
            f"--moe-layer-freq {text}: expected a number, or a list of 0 and 1 as [0,1,1,0] or ([0]+[1]*3)*2"
        ) from error
    if isinstance(value, int):
        return value
    return tuple(value)


def _evaluate(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < _LAYERS_BELOW:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate_number(element) for element in node.elts]
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and _size(left) + _size(right) < _LAYERS_BELOW:
            return left + right  # type: ignore[operator,no-any-return]
        if isinstance(node.op, ast.Mult) and _size(left) * _size(right) < _LAYERS_BELOW:
            return left * right  # type: ignore[operator,return-value]
    raise ValueError(ast.dump(node))


def _evaluate_number(node: ast.expr) -> int:
    value = _evaluate(node)
    if isinstance(value, list):
        raise ValueError("a list in a list")
    return value


def _size(value: int | list[int]) -> int:
    """How long a list is, or what a number would make of a list by multiplying it."""
    if isinstance(value, list):
        return len(value)
    return value
