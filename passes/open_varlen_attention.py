"""Open varlen attention: packed sequences become documents.

before  out = torch_attn._varlen_attn(q, k, v, cu_seq, cu_seq, 512, 512, True, None, [-1, 0])[0]    # q: [T, H, D]
after   lengths = cpcompile.checked_packing(cu_seq, "cu_seqlens", "cu_seq", T)
        documents = aten.searchsorted(lengths, aten.arange(T), right=True)[None]
        out = cpcompile.attention(q', k', v', None, documents, None, 0.125, True, 0, 0.0)      # q': [1, H, T, D]

Lengths that do not go from 0 to T end the step: what is outside of all sequences has no defined output. Where `cu_seq_k` is
another tensor than `cu_seq_q`, the device checks that both say the same: collators make two tensors of one list.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.attention.varlen  # registers the operator
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.analysis.patterns.formula import coordinate, size_of
from cpcompile.analysis.patterns.nodes import erase_with_users, is_used
from cpcompile.errors import NoRule, where
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

OTHER_KEYS = (
    "varlen_attn: cu_seq_k is not cu_seq_q, so that the keys of a sequence are not its own tokens, which cannot be sharded: pass "
    "the same lengths for both, or use scaled_dot_product_attention with a mask."
)

# The others, which differ from one version of torch to the next, are of caches.
_KNOWN = {
    *("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"),
    *("is_causal", "scale", "window_size", "enable_gqa", "num_splits"),
}


def open_varlen_attention(gm: fx.GraphModule) -> int:
    """Return how many were opened.

    Needs: no operator writes (`functionalise_writes`).
    Gives: `cp.attention` of one row of tokens, with a document for each.

    Raises:
        NoRule: queries and keys are packed differently, a cache is read, or the logsumexp is used.
    """
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.torch_attn._varlen_attn.default)
    ids: dict[tuple[fx.Node, str], fx.Node] = {}  # all layers share the documents of the same lengths
    for node in nodes:
        call = Call.of(node)
        reason = why_not(call)
        if reason:
            raise NoRule(f"varlen_attn: {reason}.\n\n{where(node)}\n\nUse scaled_dot_product_attention with a mask.")
        write_operator(call, ids)
    return len(nodes)


def why_not(call: Call) -> str:
    """Return why a call is not an attention of tokens over the same tokens, or ''."""
    is_same = call["cu_seq_k"] is call["cu_seq_q"] or str(call.shape("query")[0]) == str(call.shape("key")[0])
    if not is_same:
        return "there are other keys than queries, so that they are not of the same tokens"
    unknown = [name for name, given in call.arguments.items() if name not in _KNOWN and given is not None]
    if unknown:
        return f"{', '.join(unknown)}: attention over a cache cannot be sharded"
    others = [item for item in call.node.users if item.args[1] != 0]
    return "its logsumexp is used" if any(is_used(item) for item in others) else ""


def write_operator(call: Call, known: dict[tuple[fx.Node, str], fx.Node]) -> None:
    """Replace one call by the operator; `known` has the documents of earlier calls."""
    node = call.node
    q, k, v = (with_batch(node, call[name]) for name in ("query", "key", "value"))
    scale = call.arguments.get("scale")
    scale = call.shape("query")[2] ** -0.5 if scale is None else scale
    left, right = call.arguments.get("window_size") or (-1, -1)
    is_causal = call["is_causal"] or right == 0
    settings = (float(scale), is_causal, left + 1, 0.0, 0.0, -1 if is_causal else right)
    attention = torch.ops.cpcompile.attention.default
    ids = documents(call, "cu_seq_q", known)
    if call["cu_seq_k"] is not call["cu_seq_q"]:
        others = documents(call, "cu_seq_k", known)
        is_same = insert_call(node, aten.all.default, insert_call(node, aten.eq.Tensor, ids, others))
        insert_call(node, aten._assert_async.msg, is_same, OTHER_KEYS)
    out = insert_call(node, attention, q, k, v, None, ids, None, *settings)
    out = insert_call(node, aten.squeeze.dim, insert_call(node, aten.transpose.int, out, 1, 2), 0)
    for item in list(node.users):
        assert item.target is operator.getitem, item.format_node()
        if item.args[1] == 0:
            replace_uses(item, out)
        erase_with_users(item)
    node.graph.erase_node(node)


def with_batch(before: fx.Node, x: fx.Node) -> fx.Node:
    """Return `[T, H, D]` as `[1, H, T, D]`."""
    return insert_call(before, aten.transpose.int, insert_call(before, aten.unsqueeze.default, x, 0), 1, 2)


def documents(call: Call, name: str, known: dict[tuple[fx.Node, str], fx.Node]) -> fx.Node:
    """Return the sequence of each token, `[1, T]`, counted from 1."""
    before, q, cu_seq = call.node, call["query"], call[name]
    key = cu_seq, str(value_of(q).shape[0])
    if key not in known:
        checked = torch.ops.cpcompile.checked_packing.default
        lengths = insert_call(before, checked, cu_seq, "cu_seqlens", name, size_of(before, q, 0))
        tokens = insert_call(before, aten.to.dtype, coordinate(before, q, 0, [-1]), value_of(cu_seq).dtype)
        ids = insert_call(before, aten.searchsorted.Tensor, lengths, tokens, right=True)
        known[key] = insert_call(before, aten.unsqueeze.default, ids, 0)
    return known[key]
