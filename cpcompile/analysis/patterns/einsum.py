"""An einsum of two tensors as a product of matrices, batched or not, or as a product element by element."""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch import fx

from cpcompile.analysis.patterns.formula import size_of
from cpcompile.analysis.patterns.nodes import converted, same_shape
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Product:
    """Two tensors with a letter for each dim, and the letters of the result.

    Letters of both tensors and the result are batches, those of both tensors only are summed.
    """

    a: fx.Node
    b: fx.Node
    of_a: str
    of_b: str
    result: str

    @classmethod
    def of(cls, call: Call) -> Product | None:
        """Read an einsum; None when it is no product of two tensors that this can write."""
        terms, _, result = call["equation"].replace(" ", "").partition("->")
        if len(call["tensors"]) != 2 or not result:
            return None
        a, b = call["tensors"]
        of_a, of_b, result = spelled_out([*terms.split(","), result], [value_of(x).dim() for x in (a, b)])
        if result and result[-1] not in of_b:
            a, b, of_a, of_b = b, a, of_b, of_a  # the last letter is a column
        product = cls(a, b, of_a, of_b, result)
        if not product.batches and len(product.columns) > 1 and len(product.rows) < 2:
            product = cls(b, a, of_b, of_a, result)  # a matrix comes second, so that no dims are merged
        return product if product.is_plain else None

    @property
    def batches(self) -> str:
        """Letters of both tensors and the result."""
        return "".join(x for x in self.result if x in self.of_a and x in self.of_b)

    @property
    def rows(self) -> str:
        """Letters of the first tensor and the result."""
        return "".join(x for x in self.result if x not in self.of_b)

    @property
    def columns(self) -> str:
        """Letters of the second tensor and the result."""
        return "".join(x for x in self.result if x not in self.of_a)

    @property
    def summed(self) -> str:
        """Letters of both tensors only."""
        return "".join(x for x in self.of_b if x not in self.result)

    @property
    def is_plain(self) -> bool:
        """No letter is repeated in a tensor or summed in one alone, and sizes agree."""
        terms = (self.of_a, self.of_b, self.result)
        shared = [x for x in self.of_a if x in self.of_b]
        sizes = [
            [value_of(x).shape[of.index(i)] for i in shared] for x, of in ((self.a, self.of_a), (self.b, self.of_b))
        ]
        return (
            all(len(set(term)) == len(term) for term in terms)
            and set(self.result) | set(shared) == set(self.of_a) | set(self.of_b)
            and same_shape(*sizes)
        )

    def write(self, before: fx.Node) -> fx.Node:
        """Return the product, written before a node, in the dtype of that node."""
        a, b = (converted(before, x, value_of(before).dtype) for x in (self.a, self.b))
        if not self.summed:
            factors = (spread(before, x, of, self.result) for x, of in ((a, self.of_a), (b, self.of_b)))
            return insert_call(before, aten.mul.Tensor, *factors)
        a = merged(before, permuted(before, a, self.of_a, self.batches + self.rows + self.summed), len(self.summed))
        out = (
            self.batched(before, a, b)
            if self.batches
            else insert_call(before, aten.matmul.default, a, self.matrix(before, b))
        )
        if len(self.columns) > 1:
            sizes = [size_of(before, self.b, self.of_b.index(x)) for x in self.columns]
            out = insert_call(before, aten.unflatten.int, out, -1, sizes)
        return permuted(before, out, self.batches + self.rows + self.columns, self.result)

    def matrix(self, before: fx.Node, b: fx.Node) -> fx.Node:
        """Return the second tensor as batches of matrices, or of vectors when the result has no column."""
        if len(self.columns) == 1 and self.of_b[-1] in self.summed:
            b = merged(
                before, permuted(before, b, self.of_b, self.batches + self.columns + self.summed), len(self.summed)
            )
            return insert_call(before, aten.transpose.int, b, -2, -1)
        b = permuted(before, b, self.of_b, self.batches + self.summed + self.columns)
        b = merged(before, b, len(self.columns))
        return merged(before, b, len(self.summed), behind=min(len(self.columns), 1))

    def batched(self, before: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
        """Return matrices times matrices; all rows but the last letter are batches over which the second tensor broadcasts."""
        b = self.matrix(before, b)
        b = b if self.columns else insert_call(before, aten.unsqueeze.default, b, -1)
        for _ in self.rows[1:]:
            b = insert_call(before, aten.unsqueeze.default, b, len(self.batches))
        a = a if self.rows else insert_call(before, aten.unsqueeze.default, a, -2)
        out = insert_call(before, aten.matmul.default, a, b)
        out = out if self.rows else insert_call(before, aten.squeeze.dim, out, -2)
        return out if self.columns else insert_call(before, aten.squeeze.dim, out, -1)


def spelled_out(terms: list[str], ranks: list[int]) -> list[str]:
    """Return the terms, the result last, with letters for the dims of an ellipsis, which are counted from the back."""
    unused = [x for x in string.ascii_letters if not any(x in term for term in terms)]
    counts = [rank - len(term) + 3 if "..." in term else 0 for term, rank in zip(terms, ranks, strict=False)]
    names = "".join(unused[: max(counts)])
    return [
        term.replace("...", names[len(names) - count :])
        for term, count in zip(terms, [*counts, len(names)], strict=True)
    ]


def permuted(before: fx.Node, x: fx.Node, have: str, wanted: str) -> fx.Node:
    """Return a tensor with its dims in another order."""
    return (
        x if have == wanted else insert_call(before, aten.permute.default, x, [have.index(letter) for letter in wanted])
    )


def merged(before: fx.Node, x: fx.Node, count: int, behind: int = 0) -> fx.Node:
    """Return a tensor with `count` dims as one, those before the last `behind` dims."""
    return insert_call(before, aten.flatten.using_ints, x, -count - behind, -1 - behind) if count > 1 else x


def spread(before: fx.Node, x: fx.Node, have: str, wanted: str) -> fx.Node:
    """Return a tensor with its dims in order, and dims of size 1 for the other letters."""
    x = permuted(before, x, have, "".join(letter for letter in wanted if letter in have))
    for dim, letter in enumerate(wanted):
        x = x if letter in have else insert_call(before, aten.unsqueeze.default, x, dim)
    return x
