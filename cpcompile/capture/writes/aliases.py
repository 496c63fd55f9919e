"""Aliases: which nodes of a captured graph share memory, and what each is a view of.

The fake values of a trace tell the truth about memory: whether a `reshape` or a `to` is a view or a copy is read
from their storages.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.ir.operator_call import Call, is_tensor, value_of, values_of

aten = torch.ops.aten

# They update their running statistics, which their schemas do not say: the arguments, and the flag that makes them do it.
HIDDEN_WRITES = {
    aten.batch_norm.default: ("training", ("running_mean", "running_var")),
    aten.instance_norm.default: ("use_input_stats", ("running_mean", "running_var")),
}


def storages(node: fx.Node) -> set[int]:
    """Return the memory that the results of `node` live in."""
    values = values_of(node)
    return {x.untyped_storage()._cdata for x in values if isinstance(x, torch.Tensor) and x.layout is torch.strided}


def source_of(node: fx.Node) -> fx.Node | None:
    """Return the operand that shares the memory of `node`, or None where `node` has its own."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        several = node.args[0]
        return several if isinstance(several, fx.Node) and source_of(several) is not None else None
    own = storages(node)
    return next((operand for operand in node.all_input_nodes if own & storages(operand)), None)


def written_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments that the operator of `node` writes, by name."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return {}
    call = Call.of(node)
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return {name: call[name] for name in names if call[name] is not None}


def hidden_writes(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the operands that the operator of `node` writes although its schema does not say so."""
    if node.target in HIDDEN_WRITES:
        call = Call.of(node)
        flag, names = HIDDEN_WRITES[call.target]
        yield from (call[name] for name in names if call[flag] and is_tensor(call[name]))


def is_view_in_place(node: fx.Node) -> bool:
    """Tell whether an operator in place changes only what its operand looks like, such as `unsqueeze_`; no data."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.inplace_view in node.target.tags


def same_sizes(a: Any, b: Any) -> bool:
    """Tell whether two lists of sizes or strides are known to be equal."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors have the same sizes, strides and offset."""
    offsets = a.storage_offset(), b.storage_offset()
    return same_sizes((*a.shape, *a.stride(), offsets[0]), (*b.shape, *b.stride(), offsets[1]))


def settled_writes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the copies to inputs at the end of the graph that nothing reads: what is left of writes to inputs."""
    (output,) = gm.graph.find_nodes(op="output")
    settled: list[fx.Node] = []
    node = output.prev
    while is_last_copy(node) or node.target is torch._C._set_grad_enabled:
        settled += [node] if is_last_copy(node) else []
        node = node.prev
    written = [storages(node.args[0]) for node in settled]  # type: ignore[arg-type]
    read = [storages(node) for node in output.all_input_nodes] + [storages(node.args[1]) for node in settled]  # type: ignore[arg-type]
    all_written = set().union(*written)
    is_alone = len(all_written) == sum(map(len, written)) and not any(all_written & memory for memory in read)
    return settled if is_alone else []


def is_last_copy(node: fx.Node) -> bool:
    """Tell whether a node copies a value of the same kind to an input and nothing reads it there."""
    if node.target is not aten.copy_.default or node.users:
        return False
    place, source = node.args[:2]
    assert isinstance(place, fx.Node) and isinstance(source, fx.Node)
    return place.op == "placeholder" and same_sizes(value_of(place).shape, value_of(source).shape)
