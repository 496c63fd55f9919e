"""Own backward: a call of a `torch.autograd.Function` in a Dynamo graph as plain operators, its backward beside its forward.

before  y = autograd_function_apply(forward, backward, x)
after   x_1 = aten.detach(x); y = aten.relu(x_1)                       # forward
        g = cp.incoming_gradient(y); dx = aten.mul(g, 2)               # backward, marked
        y_1 = cp.own_gradient([y], [x], [g], [dx])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

MARK = "cpcompile_backward"  # of `custom`: the number of the call that a node of a backward belongs to
_KEPT_META = ("nn_module_stack", "recompute", "ac_graph_id")
_numbers = itertools.count()

Run = Callable[[fx.GraphModule, Sequence[Any]], Any]


def is_own_function(target: Any) -> bool:
    """Tell whether a call is one of a `torch.autograd.Function`."""
    return target is torch.ops.higher_order.autograd_function_apply


def run_own_function(call: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], run: Run) -> Any:
    """Run such a call, so that a trace under way sees its forward and, if an operand takes gradients, its backward.

    `run` runs a graph on values.
    """
    forward, backward, *operands = args
    for body in (forward, backward):
        skip_modes(body)
    lead = [None] * (len(forward.graph.find_nodes(op="placeholder")) - len(operands))  # a context that nobody reads
    copy_meta(call, forward)
    own = [x.detach() if isinstance(x, torch.Tensor) else x for x in operands]
    output, saved = run(forward, [*lead, *own])
    if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in operands):
        return output
    results = list(output) if isinstance(output, tuple | list) else [output]
    apart = set(kwargs.get("non_differentiable_idx", ()))
    places = [i for i, x in enumerate(results) if isinstance(x, torch.Tensor) and is_smooth(x) and i not in apart]
    custom = {**(call.meta.get("custom") or {}), MARK: next(_numbers)}
    with torch.fx.traceback.annotate(custom):
        incoming = {i: torch.ops.cpcompile.incoming_gradient(results[i]) for i in places}
        copy_meta(call, backward, custom)
        needed = [bool(node.users) for node in backward.graph.find_nodes(op="placeholder")][len(lead) :]
        given = [
            incoming[i] if i in incoming else torch.zeros_like(x) if needed[i] and x is not None else None
            for i, x in enumerate(results)
        ]
        found = run(backward, [*lead, *given, *saved])
        found = found if isinstance(found, tuple | list) else [found]
        pairs = [
            (x, fitted(gradient, x))
            for x, gradient in zip(operands, found, strict=False)
            if isinstance(x, torch.Tensor) and x.requires_grad and gradient is not None
        ]
        made = torch.ops.cpcompile.own_gradient(
            [results[i] for i in places], [x for x, _ in pairs], list(incoming.values()), [g for _, g in pairs]
        )
    for i, x in zip(places, made, strict=True):
        results[i] = x
    return type(output)(results) if isinstance(output, tuple | list) else results[0]


def is_smooth(x: torch.Tensor) -> bool:
    """Tell whether a tensor may have a gradient."""
    return x.is_floating_point() or x.is_complex()


def skip_modes(body: fx.GraphModule) -> None:
    """Drop switches of gradients: what a function computes has none that torch would derive."""
    for node in body.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        body.graph.erase_node(node)


def copy_meta(call: fx.Node, body: fx.GraphModule, custom: Mapping[str, Any] | None = None) -> None:
    """Give the nodes of a body what is known of the call: its module, checkpoint and marks."""
    for node in body.graph.nodes:
        node.meta.update({key: call.meta[key] for key in _KEPT_META if key in call.meta})
        node.meta["custom"] = {**(node.meta.get("custom") or {}), **(call.meta.get("custom") or {}), **(custom or {})}
        if custom:  # backward runs once
            node.meta.pop("recompute", None)
            node.meta.pop("ac_graph_id", None)


def fitted(gradient: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """Return a gradient summed over what the operand was broadcast along, as autograd takes it."""
    lead = gradient.dim() - operand.dim()
    if lead > 0:
        gradient = gradient.sum(list(range(lead)))
    dims = [d for d, size in enumerate(operand.shape) if is_one(size) and not is_one(gradient.shape[d])]
    if dims:
        gradient = gradient.sum(dims, keepdim=True)
    return gradient


def is_one(size: Any) -> bool:
    """Tell whether a size is the number 1."""
    return isinstance(size, int) and size == 1
