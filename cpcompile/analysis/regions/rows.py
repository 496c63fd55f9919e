"""Rows: where the tokens of a region's operands are in its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]

from cpcompile.ir.operator_call import expression
from cpcompile.ir.placement import Sharded
from cpcompile.rules.views import quotient


def locate_rows(shape: Sequence[Any], target: Sequence[Any], at: Sharded, length: Any) -> Sharded | None:
    """Return where the tokens of `shape`, sharded `at`, are in `target`, a tensor with the same rows, or None.

    The rows are the elements of the leading dims, up to the tokens, in row-major order; the trailing dims may differ.
    """
    tokens = expression(at.count(length))
    rows = product(shape[: at.dim + 1])
    outer = quotient(rows, tokens * at.inner)
    before = sympy.Integer(1)
    for dim, size in enumerate(map(expression, target)):
        rest = None if outer is None else quotient(outer, before)
        inner = None if rest is None else quotient(size, rest * tokens)
        if inner is not None and inner.is_Integer:
            ends = (product(target[: end + 1]) for end in range(dim, len(target)))
            return replace(at, dim=dim, inner=int(inner)) if any(end == rows for end in ends) else None
        before *= size
    return None


def product(sizes: Sequence[Any]) -> sympy.Expr:
    """Return the product of sizes as an expression."""
    result = sympy.Integer(1)
    for size in sizes:
        result *= expression(size)
    return result


def with_tokens(shape: Sequence[Any], at: Sharded, length: Any, local: int) -> list[int]:
    """Return a shape of numbers with `local` slots in the place of the tokens."""
    sizes = list(shape)
    sizes[at.dim] = sizes[at.dim] // at.count(length) * local
    return sizes
