"""Attention sites: the attentions of a graph as data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operators)
from cpcompile.choose.attention import AttentionSite
from cpcompile.choose.kernels import sized
from cpcompile.errors import LengthDependent, where
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import JOINS, Call, size_estimate, size_hint, values_of
from cpcompile.ir.placement import Sharded
from cpcompile.runtime.attention.catalogue import STRATEGIES

aten, cp = torch.ops.aten, torch.ops.cpcompile

# What every form of attention has in it before it is found.
ATTENTION_LIKE = {
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten._softmax.default,
    torch.ops.higher_order.flex_attention,
}

REWRITTEN = {cp.attention.default, *(getattr(cp, f"{name}_attention").default for name in STRATEGIES)}


# What each token goes through by itself before it attends: it has one row for each.
PRODUCTS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}

MOST_NUMBERS = 3  # of tokens that are tried


def attention_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the attentions of the graph, in order."""
    return list(gm.graph.find_nodes(op="call_function", target=cp.attention.default))


def rewritten_attentions(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the attentions of a rewritten graph, in order: collectives, and those that exchange nothing."""
    return [node for node in gm.graph.nodes if node.target in REWRITTEN]


def numbers_of_tokens(gm: fx.GraphModule, inputs: Container[str]) -> list[int]:
    """Return how many tokens a model may have that makes them itself, the likeliest first.

    Those of its attentions, and then the rows that products read one by one: an attention may be of a form that is not known, or
    of windows, and a mixer has none.

    Raises:
        LengthDependent: the number of those of its attentions is symbolic.
    """
    found = [tokens_of_attention(gm), *rows_of_products(gm, inputs)]
    return list(dict.fromkeys(number for number in found if number))[:MOST_NUMBERS]


def rows_of_products(gm: fx.GraphModule, inputs: Container[str]) -> list[int]:
    """Return how many rows of each sample products with a weight read, those first on which most is computed.

    Rows may have several dims, those of an image. Those that are the size of an input are left out: users know what it means, and
    name it.
    """
    values = [x.meta.get("val") for x in gm.graph.find_nodes(op="placeholder") if x.name in inputs]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor) and value.dim()]
    given, batches = {str(n) for shape in shapes for n in shape}, {str(shape[0]) for shape in shapes}
    work: Counter[int] = Counter()
    for node in gm.graph.nodes:
        batch, rows, channels = rows_of(node)
        for size in rows if str(batch) in batches else ():
            if isinstance(size, int) and str(size) not in given:
                work[size] += math.prod(map(size_hint, rows)) * channels
    return [rows for rows, _ in work.most_common() if rows > 1]


def rows_of(node: fx.Node) -> tuple[Any, Sequence[Any], int]:
    """Return the batch and the other sizes of the rows that a product with a weight reads, and the channels of both sides."""
    if node.target not in {aten.linear.default, *CONVOLUTIONS}:
        return 0, (), 0
    call = Call.of(node)
    shape, weight = call.shape("input"), call.shape("weight")
    channels = sum(map(size_hint, weight[:2]))
    if node.target is aten.linear.default:
        return shape[0], shape[1:-1], channels
    is_product = len(shape) == len(weight) and all(size == 1 for size in weight[2:])  # in another layout
    return (shape[0], shape[2:], channels) if is_product else (0, (), 0)


def tokens_of_attention(gm: fx.GraphModule) -> int:
    """Return how many tokens most attentions have among themselves, or else as queries; 0 where there is no attention.

    Of tokens that are joined only where they attend (heads of a text and of an image), those of the longest sequence count.

    Raises:
        LengthDependent: the number is symbolic.
    """
    nodes = [node for node in attention_nodes(gm) if attends_to_itself(node)] or attention_nodes(gm)
    sizes = [longest_part(Call.of(node)["q"], Call.of(node).shape("q")[2]) for node in nodes]
    numbers = [size for size in sizes if isinstance(size, int) and size > 1]
    if sizes and not numbers and any(not isinstance(size, int) for size in sizes):
        raise LengthDependent(
            f"the model makes its tokens itself, and their number {sizes[0]} depends on its inputs.\n\n{where(nodes[0])}\n\n"
            "Name the input that holds them: token_dims={'name': dim}."
        )
    return max(numbers, key=numbers.count, default=0)


def longest_part(q: fx.Node, size: Any) -> Any:
    """Return how many tokens the queries of `size` tokens have that products read: of joined ones, those of the longest part."""
    joined: list[Any] = []
    seen, todo = set(), [q]
    while todo:
        node = todo.pop()
        if node in seen or not any(str(n) == str(size) for x in values_of(node) for n in getattr(x, "shape", ())):
            continue
        seen.add(node)
        if node.target in PRODUCTS:
            return size
        if node.target in JOINS and not joined:
            call = Call.of(node)
            dim = call.dim("dim", "tensors.0")
            if str(call.result.shape[dim]) == str(size):
                joined = [call.shape(name)[dim] for name, _ in call.operands()]
        todo += node.all_input_nodes
    return max((part for part in joined if isinstance(part, int)), default=size)


def whole_attentions(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the attentions that every rank computes whole, with those that no pattern knows: a softmax of scores."""
    known = [node for node in gm.graph.nodes if node.target in ATTENTION_LIKE and not annotation(node).is_local]
    unknown = [node for node in known if node.meta["val"].dim() > 2]
    return [x for x in rewritten_attentions(gm) + unknown if not isinstance(annotation(x).placement, Sharded)]


def attends_to_itself(node: fx.Node) -> bool:
    """Tell whether an attention has as many keys as queries."""
    call = Call.of(node)
    return str(call.shape("q")[2]) == str(call.shape("k")[2])


def attention_site(node: fx.Node, kernel: str = "cudnn") -> AttentionSite:
    """Return what the cost of the attention `node` depends on; `kernel`: by whose rate it is estimated."""
    call, numbers = Call.of(node), sized(Call.of(node))
    q, k, v = (call.tensor(name) for name in "qkv")
    mask = call["mask"]
    return AttentionSite(
        batch=size_estimate(q.shape[0]),
        heads=size_estimate(q.shape[1]),
        kv_heads=size_estimate(k.shape[1]),
        tokens=size_estimate(q.shape[2]),
        head_dim=size_estimate(q.shape[3]),
        value_dim=size_estimate(v.shape[3]),
        bytes_per_element=q.element_size(),
        device=q.device.type,
        is_causal=bool(call["is_causal"]),
        window=numbers["window"],
        is_additive=mask is not None and call.tensor("mask").is_floating_point(),
        lookahead=numbers["lookahead"],
        has_documents=call["documents"] is not None,
        kernel=kernel,
    )
