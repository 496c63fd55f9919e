"""Find attention: every form of attention becomes one `cpcompile.attention` node.

before  out = aten.scaled_dot_product_attention(q, repeat(k), repeat(v), mask, scale=0.25)     # or
        out = aten.matmul(aten.softmax(aten.matmul(q, repeat(k)^T) * 0.25 + mask, -1), repeat(v))
after   out = cpcompile.attention(q, k, v, mask, None, None, 0.25, False, 0, 0.0)

Written out, it is read by what it means: softmax ignores the largest score that is taken from a row, `scores * m - 1e9 * (1 - m)`
is a fill, weights that are set to 0 where scores are hidden say what an empty row is. Weights that are used otherwise too are
computed anyway, and stay; without a gradient (a detached copy, a statistic) they are computed beside the operator.

What the operator cannot say stays written out, or is: a trained bias, the dropout of one device, dims beyond `[B, H, S, D]`.
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.attention import Attention, num_heads
from cpcompile.analysis.patterns.formula import written_out
from cpcompile.analysis.patterns.fused import is_one_operator, read_fused
from cpcompile.analysis.patterns.nodes import erase_unused
from cpcompile.analysis.patterns.repeated_heads import unrepeated
from cpcompile.analysis.patterns.written_out import read_written_out
from cpcompile.analysis.patterns.zero_keys import with_sink_for_zeros
from cpcompile.ir.annotation import annotate
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import value_of

aten = torch.ops.aten


def find_attention(gm: fx.GraphModule, *, exact_dropout: bool = False) -> int:
    """Return how many attentions were found.

    Needs: products and flex attention are opened (`open_products`, `open_flex_attention`).
    Gives: `cp.attention` wherever rows of tokens attend to others; no later pass knows another form.

    With `exact_dropout`, weights that are dropped as one device drops them need a tensor of all weights: they stay written out.
    """
    reader = Reader(gm)
    count = 0
    for node in list(gm.graph.nodes):
        fused = read_fused(node)
        found = fused or read_written_out(node, reader, exact_dropout)
        if found is None:
            continue
        if fused is not None and not is_one_operator(fused, exact_dropout):
            replace_by(fused, written_out(fused))
        else:
            write_operator(with_sink_for_zeros(found, reader))
        count += 1
    return count


def write_operator(found: Attention) -> None:
    """Replace the nodes of an attention by the operator."""
    end = found.nodes[-1]
    k, v = unrepeated(end, found.k), unrepeated(end, found.v)
    if num_heads(k) != num_heads(v):
        k, v = found.k, found.v
    operands = [found.q, k, v, with_rows(end, found.mask)]
    if value_of(end).dim() == 3:
        operands = [as_one_head(end, node) for node in operands]
    settings = (found.scale, found.is_causal, 0, found.softcap)
    terms = {name: term for name, term in (("dropout", found.dropout), ("sinks", found.sinks)) if term}
    new = insert_call(end, torch.ops.cpcompile.attention.default, *operands, None, None, *settings, **terms)
    annotate(new, fill=found.fill)
    if value_of(end).dim() == 3:
        new = insert_call(end, aten.squeeze.dim, new, 1)
    replace_by(found, new)


def replace_by(found: Attention, new: fx.Node) -> None:
    """Put a node in the place of an attention."""
    replace_uses(found.nodes[-1], new)
    erase_unused(found.nodes)


def with_rows(before: fx.Node, mask: fx.Node | None) -> fx.Node | None:
    """Return a mask with a dim of queries, also one that is the same for all of them."""
    while mask is not None and value_of(mask).dim() < 2:
        mask = insert_call(before, aten.unsqueeze.default, mask, 0)
    return mask


def as_one_head(before: fx.Node, node: fx.Node | None) -> fx.Node | None:
    """Return a `[B, S, D]` operand with a head dim; a mask of fewer dims broadcasts as it is."""
    return (
        insert_call(before, aten.unsqueeze.default, node, 1) if node is not None and value_of(node).dim() == 3 else node
    )
