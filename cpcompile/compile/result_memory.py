"""Stored: in whose memory the result of a node of a compiled graph is, and what reads it there."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import is_view

aten = torch.ops.aten
invoke_subgraph = torch.ops.higher_order.invoke_subgraph
# Operators of ATen that are no part of a generated kernel: what they read and return is stored.
APART = frozenset(
    getattr(aten, name)
    for name in [
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "convolution",
        "convolution_backward",
        "_grouped_mm",
        "_scaled_mm",
        "sort",
        "topk",
        "_fft_r2c",
        "_fft_c2r",
        "_fft_c2c",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "index_put",
        "index_put_",
        "scatter",
        "scatter_add",
        "scatter_reduce",
        "embedding_dense_backward",
        "masked_scatter",
        "nonzero",
        "unique_consecutive",
    ]
    if hasattr(aten, name)
)


def root_of(node: fx.Node) -> fx.Node:
    """Return the node whose memory the result of a node is. One of several results has memory of its own."""
    while node.op == "call_function" and node.all_input_nodes:
        source = node.all_input_nodes[0]
        operand = operand_of(node)
        if operand is not None:
            node = operand
            continue
        is_part_of_view = node.target is operator.getitem and is_view(source.target)
        if not (is_part_of_view or is_wait(node) or is_view(node.target)):
            break
        node = source
    return node


def operand_of(node: fx.Node) -> fx.Node | None:
    """Return the operand of a call of a layer that one of its results is a view of; None of other nodes."""
    call = node.args[0] if node.target is operator.getitem else None
    if not isinstance(call, fx.Node) or call.target is not invoke_subgraph:
        return None
    body = body_of(call)
    (output,) = body.graph.find_nodes(op="output")
    result = output.args[0][node.args[1]]
    given = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
    return given.get(root_of(result)) if isinstance(result, fx.Node) else None


def body_of(call: fx.Node) -> Any:
    """Return the module that a call of a layer runs."""
    name: Any = call.args[0]
    return getattr(call.graph.owning_module, name.target)


def is_wait(node: fx.Node) -> bool:
    """Tell whether a node waits for a collective, whose result it returns."""
    return getattr(node.target, "namespace", "") == "_c10d_functional" and "wait_tensor" in str(node.target)


def is_apart(node: fx.Node) -> bool:
    """Tell whether an operator is no part of a generated kernel."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True  # one of several results, a higher-order operator
    return target.namespace not in ("aten", "prims") or target.overloadpacket in APART


def readers_of(node: fx.Node) -> list[fx.Node]:
    """Return what reads a result, through views of it."""
    found = []
    for user in node.users:
        found += readers_of(user) if root_of(user) is not user else [user]
    return found
