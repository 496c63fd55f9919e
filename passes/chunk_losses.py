"""Chunk losses: logits that only a loss reads are computed for some tokens at a time, with the loss and their gradients.

before  logits = aten.linear(hidden, weight); loss = aten.cross_entropy_loss(logits, labels, None, SUM)
after   loss, = cp.chunked_loss(hidden, weight, None, [labels], [], body, 2048)
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.gradient_flow import needs_no_gradient
from cpcompile.analysis.token_rows import NotByRowsError, RowRegion, region_of
from cpcompile.ir.insertion import insert_call, keep_source
from cpcompile.ir.operator_call import is_tensor, value_of
from cpcompile.runtime.chunked_loss import Body, Result, add_body

aten, cp = torch.ops.aten, torch.ops.cpcompile
FEW = 1 / 64  # of the values of a token's logits may leave a chunk
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default)


def chunk_losses(gm: fx.GraphModule, *, chunk: int, may_return_logits: bool) -> int:
    """Return how many heads have their losses computed in chunks of `chunk` tokens.

    Args:
        gm: the graph of every rank.
        chunk: how many tokens.
        may_return_logits: whether logits that the model returns as well are made only when they are read (`defer_outputs`).

    Needs: reductions rewritten (`rewrite_reductions`), so that what is left are sums.
    Gives: `cp.chunked_loss`; logits that are returned stay beside it.
    """
    count = 0
    for node in list(gm.graph.nodes):
        head = head_of(node)
        if head is None or value_of(node).dim() < 2:
            continue
        try:
            region = region_of(node, needs_no_gradient)
        except NotByRowsError:
            continue
        results = results_of(region, may_return_logits)
        count += bool(results) and replace_by_chunks(region, head, results, chunk)
    gm.graph.eliminate_dead_code()
    return count


def head_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return (hidden states, weight `[classes, features]`, bias) of a product with a weight; None for another operator."""
    if node.target is aten.linear.default:
        hidden, weight, *bias = node.args
        return hidden, weight, bias[0] if bias else None  # type: ignore[return-value]
    if node.target in (aten.matmul.default, aten.mm.default) and len(node.args) == 2:
        hidden, turned = node.args
        is_turned = isinstance(turned, fx.Node) and turned.target in _TRANSPOSES and value_of(turned).dim() == 2
        if is_turned and is_tensor(hidden):
            return hidden, turned.args[0], None  # type: ignore[union-attr, return-value]
    return None


def results_of(region: RowRegion, may_return_logits: bool) -> list[fx.Node]:
    """Return what the rest of the graph reads of a region; nothing if that is the logits themselves, or as large."""
    few = max(FEW * value_of(region.source).shape[-1], 1)
    results = []
    for node in (region.source, *region.nodes):
        outside = region.readers(node)
        rows = region.rows[node]
        if not outside:
            continue
        if rows is None or torch.Size(rows.inner).numel() <= few:
            results.append(node)
        elif not may_return_logits or any(user.op != "output" for user in outside):
            return []
    return results if region.with_gradient().intersection(results) else []


def replace_by_chunks(
    region: RowRegion,
    head: tuple[fx.Node, fx.Node, fx.Node | None],
    results: list[fx.Node],
    chunk: int,
) -> bool:
    """Let what reads the results of a region read those of `cp.chunked_loss`; False where nothing can stand in its place."""
    function, rows, others = region.body(results)
    hidden, weight, bias = head
    first = region.first_reader(results)
    read = (hidden, weight, bias, *rows, *others, *region.read_to_write(results))
    if any(x >= first for x in read if x is not None):
        return False
    smooth = region.with_gradient()
    inner = [None if (rows_of := region.rows[node]) is None else rows_of.inner for node in results]
    kinds = [Result(sizes, value_of(x).dtype, x in smooth) for sizes, x in zip(inner, results, strict=True)]
    key = add_body(Body(function, tuple(kinds)))
    flat = [insert_call(first, aten.reshape.default, x, [-1, *value_of(x).shape[region.num_lead[x] :]]) for x in rows]
    arguments = (hidden, weight, bias, flat, list(others), key, chunk, False)
    call = insert_call(first, cp.chunked_loss.default, *arguments)
    keep_source(call, region.source)
    region.replace(results, call, first)
    return True
