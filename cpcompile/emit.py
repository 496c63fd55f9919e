"""Emit: a new node beside an old one, with everything that later passes read from a node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import fx

from cpcompile.call import value_of

# Where the user's code made it, and what an activation checkpoint said about it.
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id", "custom")


def emit(before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call of `target` before the node `before`, as a part of what that node computes."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta.update({key: before.meta[key] for key in _KEPT_META if key in before.meta})
    node.meta["val"] = fake_result(target, args, kwargs)
    return node


def fake_result(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `target` on the fake values of its arguments."""
    values = fx.map_arg(args, value_of)
    modes = [v.fake_mode for v in values if hasattr(v, "fake_mode")]
    with modes[0] if modes else contextlib.nullcontext():
        return target(*values, **kwargs)
