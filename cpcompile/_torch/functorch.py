"""Transforms of `torch.func` in a Dynamo graph: a call of `torch.vmap` becomes plain operators on all elements at once.

before  _vmap_increment_nesting(S, "error"); a = _add_batch_dim(x, 0, 1); b = a.sin(); y = _remove_batch_dim(b, 1, S, 0)
        _vmap_decrement_nesting()
after   y = aten.sin(x)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

_VMAP, _VMAP_END = "_vmap_increment_nesting", "_vmap_decrement_nesting"
_DERIVATIVES = ("_grad_increment_nesting", "_jvp_increment_nesting")
_SETS_GRADIENTS = ("_set_grad_enabled", "inference_mode", "_enter_inference_mode")


class TransformError(Exception):
    """A transform of which no graph of plain operators would have the right gradients.

    Dynamo keeps no source of the nodes that begin and end something; `node` is the first one behind with a source.
    """

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = next((later for later in _from(node) if "stack_trace" in later.meta), node)
        self.reason = reason


def name_of(node: fx.Node) -> str:
    """Return the name of the function that a node calls, which torch has moved between its modules, or ''."""
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def is_opening(node: fx.Node) -> bool:
    """Tell whether a node begins a transform."""
    return name_of(node) in (_VMAP, *_DERIVATIVES)


def is_inside() -> bool:
    """Tell whether a transform is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def calls_of(opening: fx.Node) -> list[fx.Node]:
    """Return the nodes of a transform, from the one that begins it to the one that ends it, inner transforms included.

    Raises:
        TransformError: a derivative is taken; the operators that compute it would have no gradients themselves.
    """
    calls: list[fx.Node] = []
    depth = 0
    for node in _from(opening):
        if name_of(node) in _DERIVATIVES:
            raise TransformError(node, "a derivative is taken inside the model")
        calls.append(node)
        depth += (name_of(node) == _VMAP) - (name_of(node) == _VMAP_END)
        if depth == 0:
            break
    return calls


def _from(node: fx.Node) -> Iterator[fx.Node]:
    while node.op != "root":
        yield node
        node = node.next


def refuse_wrong_gradients(calls: Sequence[fx.Node], inputs: Sequence[Any]) -> None:
    """Raise `TransformError` where gradients are switched off for some operators only, which the new ones would not know."""
    is_trained = any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(inputs))
    for node in calls:
        if is_trained and name_of(node) in _SETS_GRADIENTS:
            raise TransformError(node, "gradients are switched off inside it, and .detach() would do")


def run_as_operators(calls: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Run `calls` on inputs, tensors and sizes in any containers, so that a trace under way sees no transform.

    The trace before dispatch sees operators above the transform, on tensors that have no graph. The calls are therefore
    traced on their own, below the transform, and the trace under way gets the operators that this finds. Gradients are
    those of these operators.
    """
    flat, spec = tree_flatten(list(inputs))

    def run(*values: Any) -> Any:
        return calls(*tree_unflatten(values, spec))

    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        operators = make_fx(run, decomposition_table={}, tracing_mode="real", _allow_non_fake_inputs=True)(*flat)
    operators.graph.eliminate_dead_code()
    unchoose_kernels(operators)
    return fx.Interpreter(operators).run(*flat)


# What `scaled_dot_product_attention` becomes below the transform, as one of its kernels.
_KERNELS = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
)


def unchoose_kernels(gm: fx.GraphModule) -> None:
    """Make attentions for which the trace has chosen a kernel what the model called: other passes know only that."""
    for node in list(gm.graph.nodes):
        users = list(node.users)
        if node.target not in _KERNELS or any(user.args[1] != 0 for user in users):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        mask = given.get("attn_mask", given.get("attn_bias"))
        settings = {name: given[name] for name in ("dropout_p", "is_causal", "scale") if name in given}
        operands = (given["query"], given["key"], given["value"], mask)
        with gm.graph.inserting_before(node):
            whole = gm.graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, operands, settings)
        for user in users:
            user.replace_all_uses_with(whole)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    gm.recompile()
