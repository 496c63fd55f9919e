"""Insertion: a new node beside an old one, with everything that later passes read from a node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile import _torch
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.operator_call import value_of
from cpcompile.ir.placement import FULL, Placement

# Where the user's code made it, and what an activation checkpoint said about it.
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id", "custom")


def insert_call(before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call of `target` before the node `before`, as a part of what that node computes."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    keep_source(node, before)
    node.meta["val"] = fake_result(target, *fx.map_arg((args, kwargs), value_of))
    return node


def insert_document_bounds(before: fx.Node, documents: fx.Node) -> fx.Node:
    """Insert where documents begin, before a node. The host waits for it, so that a checkpoint does not compute it again.

    As it waits, it also checks what tells them apart.
    """
    for check in checks_of(documents):
        check.args = (*check.args[:4], True)
    bounds = insert_call(before, torch.ops.cpcompile.document_bounds.default, documents)
    bounds.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    bounds.meta.pop("ac_graph_id", None)
    return bounds


def checks_of(node: fx.Node) -> list[fx.Node]:
    """Return the checks of packed documents that a node is computed from."""
    seen, stack = {node}, [node]
    while stack:
        operands = set(stack.pop().all_input_nodes) - seen
        seen |= operands
        stack += operands
    return [found for found in seen if found.target is torch.ops.cpcompile.checked_packing.default]


def replace_uses(old: fx.Node, new: fx.Node) -> None:
    """Let all that uses `old` use `new`, which holds the same value in another way, and is compared as that value."""
    annotate(new, origin=annotation(old).origin)
    old.replace_all_uses_with(new)


def keep_source(node: fx.Node, source: fx.Node) -> None:
    """Give `node` the user's line and module of `source`."""
    node.meta.update({key: source.meta[key] for key in _KEPT_META if key in source.meta})


def insert_copy(
    graph: fx.Graph,
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    source: fx.Node,
    placement: Placement = FULL,
) -> fx.Node:
    """Insert, at the graph's insertion point, a call that holds the value of `source` in another placement."""
    node = graph.call_function(target, arguments)
    node.meta.update({key: source.meta[key] for key in (*_KEPT_META, "val") if key in source.meta})
    annotate(node, placement=placement, origin=annotation(source).origin or source.name)
    return node


def fake_result(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `target` on fake values."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    modes = [v.fake_mode for v in leaves if hasattr(v, "fake_mode")]
    with _torch.symbolic_operators(), modes[0] if modes else contextlib.nullcontext():
        return target(*args, **kwargs)
