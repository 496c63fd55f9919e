"""Open products: `einsum` of two tensors and `baddbmm` become the operators that they are made of.

before  scores = aten.einsum("bqhd,bkhd->bhqk", [q, k])
        scores = aten.baddbmm(bias, q, k, beta=0.5)
after   scores = aten.matmul(aten.permute(q, [0, 2, 1, 3]), aten.transpose(aten.permute(k, [0, 2, 1, 3]), -2, -1))
        scores = aten.add(aten.bmm(q, k), aten.mul(bias, 0.5))

An einsum that is no product of two tensors (a diagonal, a sum of one tensor, three tensors) stays as it is.
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.patterns.einsum import Product
from cpcompile.analysis.patterns.expansions import expanded
from cpcompile.ir.insertion import replace_uses
from cpcompile.ir.operator_call import Call

aten = torch.ops.aten


def open_products(gm: fx.GraphModule) -> int:
    """Return how many products were opened.

    Needs: no operator writes (`functionalise_writes`).
    Gives: `matmul`, `bmm`, `mul` and `add` in place of `einsum` and `baddbmm`.
    """
    count = 0
    for target in (aten.einsum.default, aten.baddbmm.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            new = einsum(Call.of(node)) if target is aten.einsum.default else expanded(Call.of(node))
            if new is not None:
                replace_uses(node, new)
                gm.graph.erase_node(node)
                count += 1
    return count


def einsum(call: Call) -> fx.Node | None:
    """Return the product that an einsum is, or None."""
    product = Product.of(call)
    return None if product is None else product.write(call.node)
