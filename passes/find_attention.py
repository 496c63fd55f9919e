"""Find attention: every form of attention becomes one `cpcompile.attention` node.

before  out = aten.scaled_dot_product_attention(q, repeat(k), repeat(v), mask, scale=0.25)     # or
        out = aten.matmul(aten.softmax(aten.matmul(q, repeat(k)^T) * 0.25 + mask, -1), repeat(v))
after   out = cpcompile.attention(q, k, v, mask, None, None, 0.25, False, 0, 0.0, 0.0)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.call import Call, is_tensor, value_of
from cpcompile.emit import emit
from cpcompile.masks.read import Reader, constant

aten = torch.ops.aten

_CONVERSIONS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
}
_ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
_MULTIPLICATIONS = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar}
_TANH = {aten.tanh.default, aten.tanh_.default}
_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor}
_SELECTIONS = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten.special_softmax.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_DETACHES = {aten.detach.default, aten.detach_.default}
_DROPOUTS = {aten.dropout.default, aten.dropout_.default}
_REGROUPINGS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
# A chain that crosses one of these is not computed under one mode: its gradient or its dtypes would change.
_MODE_SWITCHES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}
# A score that is replaced by at most this and one to which it is added are the same number, whatever the
# score.
_ABSORBING = torch.finfo(torch.bfloat16).min


@dataclass(frozen=True, slots=True)
class Masking:
    """A mask that is added to the scores (`fill` is None), or a boolean that fills scores where it is `where`."""

    tensor: fx.Node
    fill: float | None = None
    where: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """What is applied to a product of queries and keys: scale, then softcap, then masks."""

    nodes: tuple[fx.Node, ...]
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[Masking, ...] = ()

    @property
    def product(self) -> fx.Node:
        """The product of queries and keys."""
        return self.nodes[0]


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention as found: what it computes, and the nodes that compute it, in their order."""

    nodes: tuple[fx.Node, ...]
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    is_causal: bool = False
    softcap: float = 0.0
    dropout: float = 0.0


def find_attention(gm: fx.GraphModule) -> int:
    """Return how many attentions were found. Runs first: later passes know no other form of attention."""
    reader = Reader(gm)
    count = 0
    for node in list(gm.graph.nodes):
        found = read_fused(node) or read_written_out(node, reader)
        if found is not None:
            write_operator(found)
            count += 1
    return count


def read_fused(node: fx.Node) -> Attention | None:
    """Read `scaled_dot_product_attention`."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    call = Call.of(node)
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    scale = call["scale"] if call["scale"] is not None else default_scale(call)
    if scale is None or not is_batched(*(value_of(x).shape for x in (q, k, v))):
        return None
    if value_of(q).dim() == 4 and num_heads(q) != num_heads(k) and not call["enable_gqa"]:
        return None
    if mask is not None and may_need_gradient(mask):
        return None
    q, k, v = (converted(node, operand, value_of(node).dtype) for operand in (q, k, v))
    return Attention(
        (node,), q, k, v, mask, float(scale), is_causal=call["is_causal"], dropout=float(call["dropout_p"])
    )


def default_scale(call: Call) -> float | None:
    """Return `head_dim ** -0.5`, or None when the head dim is symbolic."""
    size = call.shape("query")[-1]
    return float(size**-0.5) if isinstance(size, int) else None


def read_written_out(node: fx.Node, reader: Reader) -> Attention | None:
    """Read `softmax(cap(q @ k^T * scale) + masks) @ v`, from its softmax."""
    if node.target not in _SOFTMAX or Call.of(node)["dim"] not in (-1, value_of(node).dim() - 1):
        return None
    scores = read_scores(node.args[0], reader)
    weighing = read_weighing(node)
    if scores is None or weighing is None or switches_mode(scores.product, weighing.nodes[-1]):
        return None
    end = weighing.nodes[-1]
    dtype = value_of(end).dtype
    keys = second(scores.product)
    written = [source(scores.product), source(keys) if is_transposition(keys) else keys, second(end)]
    q_shape, k_shape, v_shape = (value_of(x).shape for x in (written[0], keys, written[2]))
    keeps_dtype = value_of(scores.product).dtype == dtype or all(is_of(x, dtype) for x in written)
    if (
        not keeps_dtype
        or not is_batched(q_shape, [*k_shape[:-2], k_shape[-1], k_shape[-2]], v_shape)
        or not can_mask(scores.masks)
    ):
        return None
    q, k, v = (of_dtype(end, x, dtype) for x in written)
    k = k if is_transposition(keys) else emit(end, aten.transpose.int, k, -2, -1)
    return Attention(
        nodes=(*scores.nodes, *weighing.nodes),
        q=q,
        k=k,
        v=v,
        mask=written_mask(end, scores),
        scale=scores.scale,
        softcap=scores.softcap,
        dropout=weighing.dropout,
    )


def read_scores(node: Any, reader: Reader) -> Scores | None:
    """Read back from a value that goes into a softmax to the product of queries and keys, as long as nothing else uses it."""
    if not is_tensor(node) or len(node.users) != 1:
        return None
    if node.target in _PRODUCTS:
        return Scores((node,))
    if node.target in _ADDITIONS:
        return read_addition(node, reader)
    if node.target in _FILLS | _SELECTIONS:
        return read_fill(node, reader)
    if is_conversion(node) or node.target in _TANH | _MULTIPLICATIONS | _DIVISIONS:
        scores = read_scores(node.args[0], reader)
        return None if scores is None else applied(scores, node, reader)
    return None


def applied(scores: Scores, node: fx.Node, reader: Reader) -> Scores | None:
    """Return the scores after `node`, a conversion, a constant factor or a tanh."""
    scores = replace(scores, nodes=(*scores.nodes, node))
    if is_conversion(node):
        return scores
    if scores.masks:
        return None
    if node.target in _TANH:
        return None if scores.softcap else replace(scores, softcap=1.0)
    factor = constant(reader, node.args[1])
    if factor is None or factor <= 0:
        return None
    factor = 1 / factor if node.target in _DIVISIONS else factor
    # c * tanh(s * x) is the softcap c of the scores (c * s) * x.
    return replace(scores, scale=scores.scale * factor, softcap=scores.softcap * factor)


def read_addition(node: fx.Node, reader: Reader) -> Scores | None:
    """Read scores to which a mask is added, on either side."""
    call = Call.of(node)
    for inner, mask in itertools.permutations((call["self"], call["other"])):
        scores = read_scores(inner, reader) if is_tensor(mask) and call["alpha"] == 1 else None
        if scores is not None:
            return masked(scores, node, Masking(mask))
    return None


def read_fill(node: fx.Node, reader: Reader) -> Scores | None:
    """Read scores that are replaced by a constant where a boolean says so."""
    call = Call.of(node)
    if node.target in _FILLS:
        sides = [(call["self"], call["value"], Masking(call["mask"]))]
    else:
        condition = call["condition"]
        sides = [
            (call["self"], call["other"], Masking(condition, where=False)),
            (call["other"], call["self"], Masking(condition)),
        ]
    for inner, value, masking in sides:
        fill = constant(reader, value)
        scores = read_scores(inner, reader) if fill is not None else None
        if scores is not None:
            return masked(scores, node, replace(masking, fill=fill))
    return None


def masked(scores: Scores, node: fx.Node, masking: Masking) -> Scores | None:
    """Return the scores after a mask, unless the mask has dims that they do not have."""
    if not same_shape(value_of(node).shape, value_of(scores.product).shape):
        return None
    return replace(scores, nodes=(*scores.nodes, node), masks=(*scores.masks, masking))


@dataclass(frozen=True, slots=True)
class Weighing:
    """What follows a softmax: dropout, then the product with the values, which is the last node."""

    nodes: tuple[fx.Node, ...]
    dropout: float


def read_weighing(softmax: fx.Node) -> Weighing | None:
    """Read on from a softmax to the product with the values, as long as nothing else uses the weights."""
    nodes, dropout = [softmax], 0.0
    while len(nodes[-1].users) == 1:
        (node,) = nodes[-1].users
        nodes.append(node)
        if node.target in _PRODUCTS:
            return Weighing(tuple(nodes), dropout) if node.args[0] is nodes[-2] is not node.args[1] else None
        if node.target in _DROPOUTS and not dropout:
            call = Call.of(node)
            dropout = float(call["p"]) if call["train"] else 0.0
        elif not is_conversion(node):
            return None
    return None


def is_conversion(node: fx.Node) -> bool:
    """Tell whether a node changes no more than the memory format, or one floating-point dtype to another."""
    return node.target in _CONVERSIONS and all(value_of(n).dtype.is_floating_point for n in (node, source(node)))


def source(node: fx.Node) -> fx.Node:
    """Return the first operand."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node), node.format_node()
    return operand


def second(node: fx.Node) -> fx.Node:
    """Return the second operand."""
    operand = node.args[1]
    assert isinstance(operand, fx.Node), node.format_node()
    return operand


def switches_mode(first: fx.Node, last: fx.Node) -> bool:
    """Tell whether autocast or gradients are switched between two nodes."""
    node = first
    while node is not last:
        if getattr(node.target, "__name__", "") in _MODE_SWITCHES:
            return True
        node = node.next
    return False


def is_of(node: fx.Node, dtype: torch.dtype) -> bool:
    """Tell whether an operand is in `dtype`, or was converted from it just before."""
    return value_of(node).dtype == dtype or (is_conversion(node) and value_of(source(node)).dtype == dtype)


def of_dtype(before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return an operand in the dtype of the result, from before its conversion if it was converted."""
    is_original = value_of(node).dtype != dtype and is_of(node, dtype)
    return source(node) if is_original else converted(before, node, dtype)


def converted(before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return the node in `dtype`, the one in which autocast computes."""
    return node if value_of(node).dtype == dtype else emit(before, aten.to.dtype, node, dtype)


def is_transposition(node: fx.Node) -> bool:
    """Tell whether a node exchanges the last two dims of another."""
    rank = value_of(node).dim()
    if node.target is not aten.transpose.int:
        return False
    call = Call.of(node)
    return {call.dim("dim0", "self"), call.dim("dim1", "self")} == {rank - 2, rank - 1}


def num_heads(node: fx.Node) -> Any:
    """Return the size of the head dim."""
    return value_of(node).shape[-3]


def same_shape(a: Any, b: Any) -> bool:
    """Tell whether two shapes are known to be equal."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def is_batched(q: Any, k: Any, v: Any) -> bool:
    """Tell whether the shapes are `[B, H, S, D]`, or `[B, S, D]`, with as many heads as the operator takes."""
    if not same_shape(v[:-1], k[:-1]) or len(q) != len(k) or not statically_known_true(q[0] == k[0]):
        return False
    if len(q) == 3:
        return True
    is_grouped = isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1] == 0
    return len(q) == 4 and is_grouped


def may_need_gradient(mask: fx.Node) -> bool:
    """Tell whether a mask depends on an input that takes a gradient: the operator has none for its mask."""
    seen: set[fx.Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if (
            node in seen
            or not is_tensor(node)
            or not value_of(node).dtype.is_floating_point
            or node.target in _DETACHES
        ):
            continue
        seen.add(node)
        if node.op == "placeholder":
            example = getattr(node.meta.get("grapharg"), "example", None)
            if not isinstance(example, torch.Tensor) or example.requires_grad:
                return True
        waiting.extend(node.all_input_nodes)
    return False


def can_mask(masks: tuple[Masking, ...]) -> bool:
    """Tell whether one mask means all of them: a finite fill is like an addition when it absorbs the score, and alone."""
    if any(may_need_gradient(masking.tensor) for masking in masks):
        return False
    fills = [masking.fill for masking in masks if masking.fill is not None]
    return all(fill == float("-inf") or (fill <= _ABSORBING and len(masks) == 1) for fill in fills)


def written_mask(before: fx.Node, scores: Scores) -> fx.Node | None:
    """Return one node that means all masks."""
    mask = None
    for masking in scores.masks:
        new = one_mask(before, masking, value_of(scores.product).dtype)
        mask = new if mask is None else combined(before, mask, new)
    return mask


def one_mask(before: fx.Node, masking: Masking, dtype: torch.dtype) -> fx.Node:
    """Return a mask as the operator takes it: a boolean that is true to attend, or a number to add."""
    if masking.fill is None:
        return masking.tensor
    kept = emit(before, aten.logical_not.default, masking.tensor) if masking.where else masking.tensor
    if masking.fill == float("-inf"):
        return kept
    zero = emit(before, aten.new_zeros.default, masking.tensor, [], dtype=dtype)
    return emit(before, aten.where.ScalarOther, kept, zero, masking.fill)


def combined(before: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
    """Return the mask that means two."""
    is_boolean = [value_of(mask).dtype is torch.bool for mask in (a, b)]
    if all(is_boolean):
        return emit(before, aten.logical_and.default, a, b)
    if not any(is_boolean):
        return emit(before, aten.add.Tensor, a, b)
    kept, added = (a, b) if is_boolean[0] else (b, a)
    return emit(before, aten.where.ScalarOther, kept, added, float("-inf"))


def write_operator(found: Attention) -> None:
    """Replace the nodes of an attention by the operator."""
    end = found.nodes[-1]
    k, v = unrepeated(end, found.k), unrepeated(end, found.v)
    if num_heads(k) != num_heads(v):
        k, v = found.k, found.v
    operands = [found.q, k, v, found.mask]
    if value_of(end).dim() == 3:
        operands = [as_one_head(end, node) for node in operands]
    settings = (found.scale, found.is_causal, 0, found.softcap, found.dropout)
    new = emit(end, torch.ops.cpcompile.attention.default, *operands, None, None, *settings)
    if value_of(end).dim() == 3:
        new = emit(end, aten.squeeze.dim, new, 1)
    end.replace_all_uses_with(new)
    # Dropout and operators in place are not dead code to fx, even when nothing uses them.
    for node in reversed(found.nodes):
        node.graph.erase_node(node)


def as_one_head(before: fx.Node, node: fx.Node | None) -> fx.Node | None:
    """Return a `[B, S, D]` operand with a head dim; a mask of fewer dims broadcasts as it is."""
    return emit(before, aten.unsqueeze.default, node, 1) if node is not None and value_of(node).dim() == 3 else node


def unrepeated(before: fx.Node, node: fx.Node) -> fx.Node:
    """Return `[B, K, S, D]` of which `node` `[B, K * n, S, D]` repeats every head n times, or `node`."""
    if value_of(node).dim() != 4:
        return node
    if node.target is aten.repeat_interleave.self_int and Call.of(node)["dim"] in (1, -3):
        return source(node)
    if node.target not in _REGROUPINGS:
        return node
    expanded = source(node)
    while is_conversion(expanded):
        expanded = source(expanded)
    if expanded.target is not aten.expand.default or value_of(expanded).dim() != 5:
        return node
    batch, heads, copies, *rest = value_of(expanded).shape
    is_repeat = same_shape(value_of(node).shape, (batch, heads * copies, *rest))
    if not is_repeat or not same_shape(value_of(source(expanded)).shape, (batch, heads, 1, *rest)):
        return node
    return without_copies(before, source(expanded))


def without_copies(before: fx.Node, one_copy: fx.Node) -> fx.Node:
    """Return `[B, K, 1, S, D]` without its third dim."""
    inner = one_copy
    while inner.target is aten.slice.Tensor and same_shape(value_of(inner).shape, value_of(source(inner)).shape):
        inner = source(inner)
    if inner.target is aten.unsqueeze.default and Call.of(inner)["dim"] in (2, -3):
        return source(inner)
    return emit(before, aten.squeeze.dim, one_copy, 2)
