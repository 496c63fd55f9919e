"""Follow documents: where the documents of a batch begin is found out first, for a layout that depends on it.

before  h = aten.embedding(wte, ids); ...; documents = aten.cumsum(...); o = cp.attention(q, k, v, None, documents, ...)
after   documents = aten.cumsum(...); bounds = cp.document_bounds(documents); h = aten.embedding(wte, ids); ...
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.patterns.nodes import value_numbers
from cpcompile.balance.layout import follows_documents
from cpcompile.errors import CannotFollow, where
from cpcompile.ir.annotation import annotate
from cpcompile.ir.insertion import insert_document_bounds
from cpcompile.ir.operator_call import Call
from cpcompile.ir.plan import Plan

aten, cp = torch.ops.aten, torch.ops.cpcompile

# What hidden states are made with: documents that depend on these are known too late.
OF_HIDDEN_STATES = {aten.embedding.default, aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default}


def follow_documents(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many sequences have documents that the layout follows.

    Needs: `cp.attention` with documents (`lift_masks`), and a layout that follows them.
    Gives: `cp.document_bounds` before anything is sharded, annotated `is_of_layout`.

    Raises:
        CannotFollow: attentions see different documents, or documents that the model computes from hidden states.
    """
    if not follows_documents(plan.layout):
        return 0
    numbers = value_numbers(gm.graph)
    firsts: dict[str, tuple[fx.Node, fx.Node]] = {}  # by the number of tokens, since a sequence has no other name yet
    for site in gm.graph.find_nodes(op="call_function", target=cp.attention.default):
        documents = Call.of(site)["documents"]
        if documents is None:
            continue
        first, _ = firsts.setdefault(str(documents.meta["val"].shape[-1]), (documents, site))
        if numbers[first] != numbers[documents]:
            raise refusal(
                plan, site, "its documents are not those of the attentions before it, and it can follow one kind"
            )
    for documents, site in firsts.values():
        hoist(gm, documents, site, plan)
        with gm.graph.inserting_after(documents):
            bounds = insert_document_bounds(documents.next, documents)
        annotate(bounds, is_of_layout=True)
    return len(firsts)


def hoist(gm: fx.GraphModule, documents: fx.Node, site: fx.Node, plan: Plan) -> None:
    """Move what the documents are computed from to the front, behind the placeholders."""
    wanted, stack = {documents}, [documents]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in wanted:
                wanted.add(operand)
                stack.append(operand)
    if any(node.target in OF_HIDDEN_STATES or node.target is cp.attention.default for node in wanted):
        raise refusal(plan, site, "its documents are computed from hidden states, which are sharded already")
    behind = gm.graph.find_nodes(op="placeholder")[-1]
    for node in [n for n in gm.graph.nodes if n in wanted and n.op != "placeholder"]:
        behind.append(node)
        behind = node


def refusal(plan: Plan, site: fx.Node, reason: str) -> CannotFollow:
    """Return the error of a layout that cannot follow the documents of an attention."""
    return CannotFollow(
        f"balancer={plan.layout!r} cannot follow the documents of this attention: {reason}.\n\n{where(site)}\n\n"
        "Use balancer='zig_zag' or 'contiguous', which depend on nothing, or leave the choice to 'auto'."
    )
