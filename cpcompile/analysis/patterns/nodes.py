"""What the patterns ask of nodes: operands, dtypes, shapes and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.operands import CONVERSIONS
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import value_of

aten = torch.ops.aten

PADS = {aten.pad.default, aten.constant_pad_nd.default}
# They read only the shape, the dtype or the device of their operands, or of those behind the first.
_CREATIONS = {
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
}
_LIKE_ANOTHER = {aten.type_as.default, aten.to.other, aten.expand_as.default, aten.view_as.default}
# A chain that crosses one of these is not computed under one mode: its gradient or its dtypes would change.
_MODE_SWITCHES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}


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


def is_conversion(node: fx.Node) -> bool:
    """Tell whether a node changes no more than the memory format, or one floating-point dtype to another."""
    return node.target in CONVERSIONS and all(value_of(n).dtype.is_floating_point for n in (node, source(node)))


def converted(before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return the node in `dtype`, the one in which autocast computes."""
    return node if value_of(node).dtype == dtype else insert_call(before, aten.to.dtype, node, dtype)


def same_shape(a: Any, b: Any) -> bool:
    """Tell whether two shapes are known to be equal."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def may_need_gradient(mask: fx.Node) -> bool:
    """Tell whether a mask depends on an input that takes a gradient: the operator has none for its mask."""
    seen: set[fx.Node] = set()
    waiting = [mask]
    while waiting:
        node = waiting.pop()
        if node in seen or not may_be_differentiable(value_of(node)) or node.target is aten.detach.default:
            continue
        seen.add(node)
        if node.op == "placeholder":
            example = getattr(node.meta.get("grapharg"), "example", None)
            if not isinstance(example, torch.Tensor) or example.requires_grad:
                return True
        if node.target not in _CREATIONS:
            waiting.extend(node.all_input_nodes[: 1 if node.target in _LIKE_ANOTHER else None])
    return False


def may_be_differentiable(value: Any) -> bool:
    """Tell whether gradients can go through a value: floating-point numbers, or the results of an operator with several."""
    return isinstance(value, tuple | list) or (isinstance(value, torch.Tensor) and value.dtype.is_floating_point)


def is_used(node: fx.Node) -> bool:
    """Tell whether a result of the graph depends on a node, or an operator that is kept for what it does."""
    waiting, seen = [node], {node}
    while waiting:
        user = waiting.pop()
        if user is not node and (user.op == "output" or user.is_impure()):
            return True
        waiting += [n for n in user.users if n not in seen]
        seen.update(user.users)
    return False


def erase_with_users(node: fx.Node) -> None:
    """Erase a node and all that depends on it."""
    for user in list(node.users):
        erase_with_users(user)
    node.graph.erase_node(node)


def erase_unused(nodes: Sequence[fx.Node]) -> None:
    """Erase nodes, in their order, that nothing needs any more, and all that depends on them.

    Dropout and operators in place are not dead code to fx, even when nothing uses them.
    """
    for node in reversed(nodes):
        if not is_used(node):
            erase_with_users(node)


def value_numbers(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return a number for the value of each node: nodes that compute the same from the same have the same number."""
    numbers: dict[fx.Node, int] = {}
    known: dict[Any, int] = {}
    for node in graph.nodes:
        key: Any = node
        if isinstance(node.target, torch._ops.OpOverload) and is_function(node.target):
            arguments = fx.map_arg((node.args, node.kwargs), lambda operand: Numbered(numbers[operand]))
            key = (node.target, repr(arguments))
        numbers[node] = known.setdefault(key, len(numbers))
    return numbers


class Numbered(int):
    """The number of a value, told apart from a number that the graph has."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def is_function(target: torch._ops.OpOverload) -> bool:
    """Tell whether an operator computes the same whenever it is called on the same, and does nothing else."""
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return not (is_random or target._schema.is_mutable)


def records_gradients(node: fx.Node) -> object:
    """Return what gradients were last set to before a node, None where they never are."""
    while node.op != "root":
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            return node.args[0]
        node = node.prev
    return None


def switches_mode(first: fx.Node, last: fx.Node) -> bool:
    """Tell whether autocast or gradients are switched between two nodes."""
    node = first
    while node is not last:
        if getattr(node.target, "__name__", "") in _MODE_SWITCHES:
            return True
        node = node.next
    return False
