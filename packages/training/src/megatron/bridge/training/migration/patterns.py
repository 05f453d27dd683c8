"""Reading what Megatron-LM writes as Python expressions: patterns over layers, and windows."""

import ast
from typing import Any

# Longest list that a pattern may come to; models have a few hundred layers at most.
_MOST = 10_000


def pattern(word: str) -> int | list[int]:
    """A number N, or a list by layer: `([0]*3+[1]*58)`.

    Raises:
        ValueError: it is neither.
    """
    try:
        value = _value(ast.parse(word.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError) as error:
        raise ValueError(f"{word!r} is neither a number nor a pattern such as ([0]*3+[1]*58)") from error
    if isinstance(value, int) or all(isinstance(each, int) for each in value):
        return value
    raise ValueError(f"{word!r} is neither a number nor a pattern of numbers")


def _value(node: ast.expr) -> Any:
    """A number or a list, from additions and multiplications of such."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_value(each) for each in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _value(node.left) + _value(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _value(node.left), _value(node.right)
        length = (len(left) if isinstance(left, list) else 1) * (len(right) if isinstance(right, list) else 1)
        times = right if isinstance(right, int) else left
        if isinstance(times, int) and length * times <= _MOST:
            return left * right
    raise TypeError("not of a pattern")


def window(word: str) -> list[int]:
    """How many positions a query sees to its left and right: `(128,0)` or `128,0`.

    Raises:
        ValueError: it says something else.
    """
    sides = word.strip("() ").split(",")
    try:
        left, right = map(int, sides)
    except ValueError as error:
        raise ValueError(f"{word!r} is no window; write it as two numbers: 128,0") from error
    return [left, right]
