"""Find recurrences: what passes states on, from one place to the next, becomes one operator.

before  m = aten.exp(aten.masked_fill(aten.cumsum(aten.masked_fill(a[..., None], ~strictly_below, 0), -2), ~below, -inf))
        y = aten.matmul(m, x)                                          # states of chunks, as Mamba-2 passes them on
        y = aten.stack([s_0, s_1, ...])                                # a loop: s_1 = g[1] * s_0 + k[1]^T @ (u[1] - w[1] @ s_0)
after   y = cp.recurrence(aten.exp(a)[..., None], x, -2, False)        # y[t] = exp(a[t]) * y[t - 1] + x[t]
        y = cp.recurrence(g * eye - k^T @ w, k^T @ u, 0, True)         # y[t] = (g[t] - k[t]^T @ w[t]) @ y[t - 1] + k[t]^T @ u[t]

Along sharded tokens, each rank computes its own part of a recurrence, and one state and one factor for each rank travel.
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.affine_loops import FEWEST, Found, counts_of_turns, loop_for_all_turns
from cpcompile.analysis.patterns.decays import recurrence_of_product
from cpcompile.analysis.patterns.nodes import value_numbers
from cpcompile.analysis.patterns.turns import JOINERS
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call

aten = torch.ops.aten
PRODUCTS = {aten.matmul.default, aten.bmm.default}


def find_recurrences(gm: fx.GraphModule) -> int:
    """Return how many recurrences were found.

    Needs: no `einsum` of two tensors (`open_products`).
    Gives: `cp.recurrence` in their place.
    """
    count, reader, nodes = 0, Reader(gm), list(gm.graph.nodes)
    may_be_loops = any(len(Call.of(node)["tensors"]) >= FEWEST for node in nodes if node.target in JOINERS)
    numbers = value_numbers(gm.graph) if may_be_loops else {}

    def number(node: fx.Node) -> int:
        return numbers.setdefault(node, len(numbers))  # what an earlier recurrence left has none yet

    counts = counts_of_turns(gm.graph, number) if may_be_loops else set()
    loops = []
    for node in nodes:
        new = None
        if node.target in PRODUCTS:
            new = recurrence_of_product(node, reader)
        elif node.target in JOINERS and len(Call.of(node)["tensors"]) in counts:
            found = loop_for_all_turns(node, reader, number)
            if found is not None:
                new = found.joined
                loops.append(found)
        if new is not None:
            replace_uses(node, new)
            gm.graph.erase_node(node)
            count += 1
    if loops:
        gm.graph.eliminate_dead_code()
    for loop in loops:
        read_last_turn(loop)
    return count


def read_last_turn(loop: Found) -> None:
    """Let what a loop leaves be read from what its turns compute, if nothing else of the loop is read any more."""
    alive = [node for node in loop.nodes if node.users and not loop.nodes.issuperset(node.users)]
    if any(node not in loop.last for node in alive):
        return
    for node in alive:
        of_all, behind = loop.last[node], [user for user in node.users if user not in loop.nodes]
        if all(of_all < user for user in behind):
            entry = insert_call(of_all.next, aten.select.int, of_all, 0, -1)
            replace_uses(node, entry)
