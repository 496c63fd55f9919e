"""Products: one operand's rows against the other's columns; a contracted token dim leaves a partial sum.

A product of tokens with tokens (scores of queries and keys, weights and values) keeps the rows of the first
operand and gathers the second.
"""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.ir.operator_call import Call
from cpcompile.rules.pointwise import aligned, is_one
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
        gathers=("other",),
    )


@rule(aten.mm.default)
def mm(call: Call) -> Indices:
    """[m k], [k n] -> [m n]"""
    return Indices({"self": ("m", "k"), "mat2": ("k", "n")}, (("m", "n"),), summed=True, gathers=("mat2",))


@rule(aten.bmm.default)
def bmm(call: Call) -> Indices:
    """[b m k], [b k n] -> [b m n]"""
    return Indices(
        {"self": ("b", "m", "k"), "mat2": ("b", "k", "n")}, (("b", "m", "n"),), summed=True, gathers=("mat2",)
    )


@rule(aten.baddbmm.default)
def baddbmm(call: Call) -> Indices:
    """[b m n], [b m k], [b k n] -> [b m n], where the first broadcasts"""
    added = aligned(call.shape("self"), tuple(call.result.shape))
    by_dim = {"d0": "b", "d1": "m", "d2": "n"}
    names: Names = tuple(name and by_dim[name] for name in added)
    operands: dict[str, Names] = {"self": names, "batch1": ("b", "m", "k"), "batch2": ("b", "k", "n")}
    return Indices(operands, (("b", "m", "n"),), gathers=("batch2",))


@rule(aten.linalg_solve_triangular.default)
def solve_triangular(call: Call) -> Indices:
    """[... i i], [... i n] -> [... i n], closed along i"""
    shape = tuple(call.result.shape)
    batch: Names = tuple(f"d{i}" for i in range(len(shape) - 2))
    of_system, of_columns = (aligned(call.shape(name)[:-2], shape[:-2]) for name in ("self", "B"))
    columns: Names = (None, "n") if call["left"] else ("n", None)
    return Indices({"self": (*of_system, None, None), "B": (*of_columns, *columns)}, ((*batch, *columns),))


@rule(aten.cdist.default, aten._cdist_forward.default)
def distances(call: Call) -> Indices:
    """[... m k], [... n k] -> [... m n]"""
    batch: Names = tuple(f"d{i}" for i in range(call.result.dim() - 2))
    first, second = (aligned(call.shape(name)[:-2], tuple(call.result.shape)[:-2]) for name in ("x1", "x2"))
    return Indices({"x1": (*first, "m", None), "x2": (*second, "n", None)}, ((*batch, "m", "n"),), gathers=("x2",))


@rule(aten.mv.default, aten.dot.default, aten.vdot.default, aten.inner.default, aten.outer.default, aten.ger.default)
def of_vectors(call: Call) -> Indices:
    """[... k], [k] -> [...]; [m], [n] -> [m n]"""
    (first, a), (second, b) = ((name, len(call.shape(name))) for name, _ in call.operands())
    if call.target in (aten.outer.default, aten.ger.default):
        return Indices({first: ("m",), second: ("n",)}, (("m", "n"),), gathers=(second,))
    left, right = leading(a - 1, "m"), leading(b - 1, "n")
    return Indices({first: (*left, "k"), second: (*right, "k")}, ((*left, *right),), summed=True, gathers=(second,))


@rule(aten.tensordot.default)
def tensordot(call: Call) -> Indices:
    """[m k], [k n] -> [m n]"""
    names: dict[str, list[str | None]] = {
        name: [f"{name}{i}" for i in range(len(call.shape(name)))] for name in ("self", "other")
    }
    for i, (a, b) in enumerate(zip(call["dims_self"], call["dims_other"], strict=True)):
        names["self"][a] = names["other"][b] = f"k{i}"
    result = [name for dims in names.values() for name in dims if name and not name.startswith("k")]
    operands: dict[str, Names] = {name: tuple(dims) for name, dims in names.items()}
    return Indices(operands, (tuple(result),), summed=True, gathers=("other",))


@rule(aten.einsum.default)
def einsum(call: Call) -> Indices:
    """as the equation says; a letter that the result lacks is summed over"""
    equation = call["equation"].replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow:
        letters = terms.replace(",", "")
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    split = terms.split(",")
    # A letter that one operand has twice reads a diagonal, of all operands: none of them can be sharded along it.
    diagonal = {letter for term in split for letter in term if term.count(letter) > 1}
    if "." in equation:
        names: list[Names] = [(None,) * len(call.shape(name)) for name, _ in call.operands()]
        return Indices(dict(zip(dict(call.operands()), names, strict=True)), ((None,) * call.result.dim(),))

    def closed(term: str) -> Names:
        return tuple(None if letter in diagonal else letter for letter in term)

    operands = {
        name: tuple(None if is_one(n) else d for d, n in zip(closed(term), call.shape(name), strict=True))
        for (name, _), term in zip(call.operands(), split, strict=True)
    }
    return Indices(operands, (closed(result),), summed=True, gathers=tuple(operands)[1:])


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
