"""Products: one operand's rows against the other's columns; a contracted token dim leaves a partial sum.

A product of tokens with tokens (scores of queries and keys, weights and values) keeps the rows of the first
operand and gathers the second.
"""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.call import Call
from cpcompile.rules.pointwise import is_one
from cpcompile.rules.registry import Indices, Names, rule

aten = torch.ops.aten


def leading(count: int, prefix: str = "b") -> Names:
    """Return names for leading dims, counted from the right so that they broadcast."""
    return tuple(f"{prefix}{count - i}" for i in range(count))


@rule(aten.linear.default)
def linear(call: Call) -> Indices:
    """[... k], [n k], [n] -> [... n]"""
    batch = leading(len(call.shape("input")) - 1)
    out: Names = ("n",) if len(call.shape("weight")) == 2 else ()
    operands: dict[str, Names] = {"input": (*batch, "k"), "weight": (*out, "k")}
    if call["bias"] is not None:
        operands["bias"] = out[: len(call.shape("bias"))]
    return Indices(operands, ((*batch, *out),), summed=call["bias"] is None)


@rule(aten.matmul.default)
def matmul(call: Call) -> Indices:
    """[... m k], [... k n] -> [... m n]"""
    left, right = call.shape("self"), call.shape("other")
    count = max(len(left), len(right)) - 2
    batch = leading(max(count, 0))

    def names(shape: tuple[Any, ...], matrix: Names, vector: Names) -> Names:
        if len(shape) == 1:
            return vector
        own = shape[:-2]
        return (*(None if is_one(n) else b for n, b in zip(own, batch[len(batch) - len(own) :], strict=True)), *matrix)

    result = (*batch, *(("m",) if len(left) > 1 else ()), *(("n",) if len(right) > 1 else ()))
    return Indices(
        {"self": names(left, ("m", "k"), ("k",)), "other": names(right, ("k", "n"), ("k",))},
        (result,),
        summed=True,
        gathers="other",
    )


@rule(aten.mm.default)
def mm(call: Call) -> Indices:
    """[m k], [k n] -> [m n]"""
    return Indices({"self": ("m", "k"), "mat2": ("k", "n")}, (("m", "n"),), summed=True, gathers="mat2")


@rule(aten.bmm.default)
def bmm(call: Call) -> Indices:
    """[b m k], [b k n] -> [b m n]"""
    return Indices({"self": ("b", "m", "k"), "mat2": ("b", "k", "n")}, (("b", "m", "n"),), summed=True, gathers="mat2")


@rule(aten.addmm.default)
def addmm(call: Call) -> Indices:
    """[m n] or [n], [m k], [k n] -> [m n]"""
    shape = call.shape("self")
    added = ("m", "n")[2 - len(shape) :]
    names = tuple(None if is_one(size) else name for size, name in zip(shape, added, strict=True))
    return Indices({"self": names, "mat1": ("m", "k"), "mat2": ("k", "n")}, (("m", "n"),))


@rule(aten.embedding.default)
def embedding(call: Call) -> Indices:
    """[v d], [...] -> [... d]"""
    batch = leading(len(call.shape("indices")))
    if call["scale_grad_by_freq"]:  # the gradient divides by counts over all tokens
        batch = (None,) * len(batch)
    return Indices({"weight": (None, "d"), "indices": batch}, ((*batch, "d"),))
