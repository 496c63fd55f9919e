"""Tracing: fake inputs, and a Dynamo graph as ATen before dispatch."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo
import torch.fx.traceback
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile._torch import functorch
from cpcompile._torch.functorch import TransformError as TransformError
from cpcompile._torch.own_backward import is_own_function, run_own_function

_DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]  # x.data
_DATA_KEY = "cpcompile_data"


def is_data(node: fx.Node) -> bool:
    """Tell whether a `detach` is the `.data` of a tensor: what is written there, autograd does not notice."""
    return _DATA_KEY in node.meta.get("custom", {})


def fake_inputs(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Return the fake mode of the compilation under way and `example_inputs` in it, with the symbols that Dynamo gave them.

    A backend receives real tensors; AOTAutograd makes them fake again by the same steps, so both see the same
    symbols.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None:
        mode = detect_fake_mode(list(example_inputs)) or FakeTensorMode(
            shape_env=ShapeEnv(), allow_non_fake_inputs=True
        )

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        symbols = context.tensor_to_context.get(value) if context is not None else None  # type: ignore[no-untyped-call]
        source = symbols.tensor_source if symbols is not None else None
        return mode.from_tensor(value, static_shapes=symbols is None, symbolic_context=symbols, source=source)

    return mode, [fake(value) for value in example_inputs]


def this_compilation() -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the compilation under way, if any, the one under way again, once it has ended."""
    return functools.partial(tracing, TracingContext.try_get())


def fake_static_input(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the fake mode of the compilation under way, with its sizes as they are; outside of one, the tensor."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return value
    return context.fake_mode.from_tensor(value, static_shapes=True)


class _InlineCheckpoints(fx.Interpreter):
    """Run a Dynamo graph with the bodies of activation checkpoints in line, their nodes marked for recomputation.

    Bodies of `torch.compiler.nested_compile_region` run in line too, calls of `torch.vmap` and of a `torch.autograd.Function` as
    plain operators. `policies` gets the `context_fn` of each checkpoint that has one, by the number that its nodes are marked
    with.
    """

    num_regions = 0

    def __init__(self, gm: fx.GraphModule, skipped: Container[fx.Node], policies: dict[int, Callable[[], Any]]) -> None:
        super().__init__(gm)
        self.skipped, self.policies = skipped, policies

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _DATA:
            n.meta["custom"] = {**n.meta.get("custom", {}), _DATA_KEY: True}
        if n in self.skipped and n.op != "placeholder":  # which takes its value from the list of all
            return None
        if is_own_function(n.target):
            with self._set_current_node(n):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                return run_own_function(n, args, kwargs, self._run_body)
        if not functorch.is_opening(n) or functorch.is_inside():
            return super().run_node(n)
        calls = functorch.calls_of(n)
        self.env.update(dict.fromkeys(calls))  # what is there already does not run again
        self.env.update(self._run_transform(calls))
        return self.env[n]

    def _run_transform(self, calls: list[fx.Node]) -> dict[fx.Node, Any]:
        """Run the calls of a transform as plain operators and return the values that are read behind it."""
        inside = set(calls)
        given = list({x: None for node in calls for x in node.all_input_nodes if x not in inside})
        results = [node for node in calls if any(user not in inside for user in node.users)]
        inputs = [self.env[node] for node in given]
        functorch.refuse_wrong_gradients(calls, inputs)

        def run(*values: Any) -> list[Any]:
            self.env.update(zip(given, values, strict=True))
            for node in calls:
                self.env[node] = None if node in self.skipped else super(_InlineCheckpoints, self).run_node(node)
            return [self.env[node] for node in results]

        found = functorch.run_as_operators(run, inputs)
        self.env.update(zip(given, inputs, strict=True))
        return dict(zip(results, found, strict=True))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.flex_attention:
            # Its gradient asks for the lists of blocks, though only kernels read them.
            no_list = args[0].new_empty(0, dtype=torch.int32)
            lists = [no_list if i in (2, 3, 6, 7) and x is None else x for i, x in enumerate(args[4])]
            args = (*args[:4], tuple(lists), *args[5:])
        if target is _DATA:  # which no trace sees
            return args[0].detach()
        if target is torch.ops.higher_order.invoke_subgraph:  # args: the body, its name, what it is given
            return self._run_body(args[0], args[2:])
        if target is not tag_activation_checkpoint:
            return super().call_function(target, args, kwargs)
        body = args[0]
        _InlineCheckpoints.num_regions += 1
        if "_checkpoint_context_fn" in body.meta:
            self.policies[_InlineCheckpoints.num_regions] = body.meta["_checkpoint_context_fn"]
        for node in body.graph.nodes:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = _InlineCheckpoints.num_regions
        return self._run_body(body, args[1:])

    def _run_body(self, body: fx.GraphModule, args: Sequence[Any]) -> Any:
        return _InlineCheckpoints(body, self.skipped, self.policies).run(*args)


def symbolic_operators() -> AbstractContextManager[None]:
    """Return a context in which composite operators take symbolic sizes; before torch 2.13 some read them in C++."""
    return enable_python_dispatcher()


@contextlib.contextmanager
def _hooks_kept() -> Iterator[None]:
    """Switch the hooks of saved tensors on again when tracing ends inside a derivative, which switches them off."""
    try:
        yield
    except BaseException:
        torch._C._autograd._saved_tensors_hooks_enable()
        raise


def trace_pre_dispatch(
    gm: fx.GraphModule, mode: FakeTensorMode, inputs: Sequence[Any], skipped: Container[fx.Node] = ()
) -> tuple[fx.GraphModule, dict[int, Callable[[], Any]]]:
    """Trace `gm` to ATen before dispatch: no decomposition, no autograd, source lines and module paths kept.

    Nodes that are `skipped` do not run and give None. Returns the graph, and the `context_fn` of activation checkpoints by the
    `ac_graph_id` of their nodes.
    """
    policies: dict[int, Callable[[], Any]] = {}
    interpreter = _InlineCheckpoints(gm, skipped, policies)
    with torch.fx.traceback.preserve_node_meta(), enable_python_dispatcher(), mode, _hooks_kept():
        traced = make_fx(
            lambda *args: interpreter.run(*args),
            decomposition_table={},
            tracing_mode="real",
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*inputs)
    return traced, policies


def is_only_traced(value: torch.Tensor) -> bool:
    """Tell whether a tensor exists only while tracing, and has no value afterwards."""
    is_wrapped = isinstance(value, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(value)
    return is_wrapped or value.grad_fn is not None


@contextlib.contextmanager
def trial_on_fake_tensors() -> Iterator[None]:
    """Run operators on fake tensors of a mode of its own; one whose shapes do not fit raises and logs nothing."""
    with quiet_fake_tensors(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


@contextlib.contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Log nothing of an operator whose shapes do not fit: the error that it raises says it all, in one line and not in 20."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled
