"""Repeated nodes: what tracing makes of a call is copied for the next call of the same function on operands that are alike.

before  h1 = linear(x, w1); h2 = linear(h1, w2)    # both run on fake tensors, operator by operator
after   h1 = linear(x, w1); h2 = a copy of h1's nodes, which read h1 and w2

A call that is copied runs nothing: its result has a node, and becomes a tensor only where a call that is not copied reads it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_mode, set_proxy_slot, snapshot_fake
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

# Arguments that are what they print as.
_FIXED = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))
_OF_OPERATOR = ("tensor_meta", "original_aten", "torch_fn")  # what nodes are told when an operator runs
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, types.BuiltinFunctionType)


class WritesError(Exception):
    """An operator writes to an operand, so that tensors have to be what they are views of."""


@dataclass(slots=True, eq=False)
class Copied:
    """The result of a call that was copied.

    Attributes:
        node: what computes it, as long as there is no tensor.
        kind: what another result must be to be like it.
        requires_grad: of the tensor.
        tensor: once an operator has read it.
    """

    node: fx.Node
    kind: Any
    requires_grad: bool
    tensor: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Trace:
    """What a call was traced to.

    Attributes:
        given: the nodes of its operands, in order.
        nodes: those that it made.
        bases: of those that are views, the node that has the memory.
        renamed: of operands that it returned as they were (`x.to(x.dtype)`), by number, the node that is read in their place.
        result: the node of the result, or which operand it is.
        kind: of the result.
        requires_grad: of the result.
    """

    given: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    bases: dict[fx.Node, fx.Node]
    renamed: dict[int, fx.Node]
    result: fx.Node | int
    kind: Any
    requires_grad: bool


class RepeatedNodes:
    """The calls that one trace has seen."""

    def __init__(self) -> None:
        self._known: dict[Any, _Trace] = {}
        self._without_value: dict[fx.Node, tuple[FakeTensor, fx.Node | None]] = {}

    def call(self, run: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of `run(target, args, kwargs)`, which may be a `Copied`; operands may be as well.

        Raises:
            WritesError: the call writes to a tensor.
        """
        flat, spec = tree_flatten((args, kwargs))
        operands = list({id(x): x for x in flat if isinstance(x, Copied | torch.Tensor)}.values())
        key = _key(target, flat, spec, operands)
        if key in self._known:
            return self._copy(self._known[key], operands)
        args, kwargs = self.tensors((args, kwargs))
        graph = _tracer().graph
        last = next(iter(reversed(graph.nodes)))
        given = None if key is None else [node_of(x) for x in operands]
        result = run(target, args, kwargs)
        nodes = list(_behind(last))
        refuse_writes(nodes)
        if given and nodes and type(result) is FakeTensor:
            trace = _traced(given, operands, nodes, result)
            if trace is not None:
                self._known[key] = trace
        return result

    def tensors(self, values: Any) -> Any:
        """Return values with tensors in the place of what was copied."""
        return tree_map_only(Copied, self._tensor, values)

    def fill_in(self) -> None:
        """Give the nodes that were copied their values."""
        for node in list(self._without_value):
            self._value(node)

    def _copy(self, trace: _Trace, operands: Sequence[Copied | torch.Tensor]) -> Copied | torch.Tensor:
        tracer = _tracer()
        new = dict(zip(trace.given, map(node_of, operands), strict=True))
        for node in trace.nodes:
            read = [fx.node.map_arg(x, lambda old: new.get(old, old)) for x in (node.args, node.kwargs)]
            name = tracer.graph._target_to_str(node.target.overloadpacket.__name__)  # type: ignore[union-attr]
            new[node] = copy = tracer.create_node("call_function", node.target, *read, name=name)
            base = trace.bases.get(node)
            self._without_value[copy] = node.meta["val"], None if base is None else new[base]
            copy.meta |= {name: node.meta[name] for name in _OF_OPERATOR if name in node.meta}
        for i, node in trace.renamed.items():
            _rename(operands[i], new[node])
        if isinstance(trace.result, int):
            return operands[trace.result]
        return Copied(new[trace.result], trace.kind, trace.requires_grad)

    def _tensor(self, copied: Copied) -> torch.Tensor:
        if copied.tensor is None:
            with _disable_current_modes():
                tensor = snapshot_fake(self._value(copied.node))
                assert tensor is not None
                tensor.requires_grad_(copied.requires_grad)
            _rename(tensor, copied.node)
            copied.tensor = tensor
        return copied.tensor

    def _value(self, node: fx.Node) -> FakeTensor:
        if node in self._without_value:
            example, base = self._without_value.pop(node)
            node.meta["val"] = _like(example, None if base is None else self._value(base))
        value: FakeTensor = node.meta["val"]
        return value


def refuse_writes(nodes: Iterable[fx.Node]) -> None:
    """Refuse operators that write to an operand.

    Raises:
        WritesError: there is one.
    """
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise WritesError(node)


def _tracer() -> Any:
    """Return the tracer under way."""
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer


def node_of(value: Copied | torch.Tensor) -> fx.Node:
    """Return the node that is read for a value of the trace; the tensors of a call that has a key all have one."""
    tensor = value.tensor if isinstance(value, Copied) else value
    if tensor is None:
        return value.node  # type: ignore[union-attr]
    node: fx.Node = _tracer().tensor_tracker[tensor].proxy.node
    return node


def _rename(value: Copied | torch.Tensor, node: fx.Node) -> None:
    """Have a node read for a value of the trace."""
    tensor = value.tensor if isinstance(value, Copied) else value
    if tensor is None:
        value.node = node  # type: ignore[union-attr]
    else:
        tracer = _tracer()
        set_proxy_slot(tensor, tracer, _ProxyTensor(fx.Proxy(node, tracer), None))


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes behind a node."""
    node = node.next
    while node.op != "root":
        yield node
        node = node.next


def _key(target: Any, flat: Sequence[Any], spec: Any, operands: Sequence[Any]) -> Any:
    """Return what two calls have in common of which one can be a copy of the other; None if none can."""
    if not isinstance(target, (str, *_OPERATORS)) and not (getattr(target, "__module__", None) or "").startswith(
        "torch"
    ):
        return None
    place = {id(x): i for i, x in enumerate(operands)}
    kinds = []
    for x in flat:
        kind = _kind(x)
        if kind is None:
            return None
        kinds.append((place.get(id(x)), kind))
    return target, spec, tuple(kinds), torch.is_grad_enabled()


def _kind(value: Any) -> Any:
    """Return what calls see of an operand; None of one that none is like."""
    if isinstance(value, Copied):
        return value.kind
    if isinstance(value, torch.SymInt):
        return "a size", value.node.expr
    if isinstance(value, slice):
        parts = value.start, value.stop, value.step
        return ("a slice", repr(value)) if all(isinstance(x, int | None) for x in parts) else None
    if not isinstance(value, torch.Tensor):
        return (type(value), repr(value)) if type(value) in _FIXED else None
    tracked = _tracer().tensor_tracker.get(value)
    is_plain = (
        type(value) is FakeTensor and value.layout is torch.strided and not value.is_conj() and not value.is_neg()
    )
    if tracked is None or tracked.constant is not None or not is_plain:
        return None
    device = value.device
    if torch.is_autocast_enabled(device.type):
        return None  # it remembers the weights that it has cast, and knows them by being leaves
    sizes = [
        x.node.expr if isinstance(x, torch.SymInt) else x
        for x in (*value.shape, *value.stride(), value.storage_offset())
    ]
    return value.dtype, device, value.requires_grad, tuple(sizes)


def _traced(
    given: Sequence[fx.Node], operands: Sequence[Copied | torch.Tensor], nodes: Sequence[fx.Node], result: FakeTensor
) -> _Trace | None:
    """Return what a call was traced to; None where it cannot be copied."""
    memory = {_memory(x.meta["val"]): x for x in reversed(given) if type(x.meta.get("val")) is FakeTensor}
    known = set(given)
    bases = {}
    for node in nodes:
        value = node.meta.get("val")
        reads = all(x in known or isinstance(x.meta.get("val"), torch.SymInt) for x in node.all_input_nodes)
        if not isinstance(node.target, torch._ops.OpOverload) or "eager_input_vals" in node.meta or not reads:
            return None
        if type(value) is not FakeTensor or value.layout is not torch.strided or free_unbacked_symbols(value):
            return None
        if value.is_conj() or value.is_neg():
            return None
        known.add(node)
        base = memory.setdefault(_memory(value), node)
        if base is not node:
            bases[node] = base
        elif value.storage_offset() != 0:
            return None
    kind, source = _kind(result), node_of(result)
    if kind is None or source not in nodes or len(set(given)) < len(given):
        return None
    tensors = [x.tensor if isinstance(x, Copied) else x for x in operands]
    renamed = {i: now for i, x in enumerate(operands) if (now := node_of(x)) is not given[i]}
    returned = next((i for i, x in enumerate(tensors) if x is result), source)
    return _Trace(tuple(given), tuple(nodes), bases, renamed, returned, kind, result.requires_grad)


def _memory(value: torch.Tensor) -> int:
    memory: int = value.untyped_storage()._cdata
    return memory


def _like(example: FakeTensor, base: FakeTensor | None) -> FakeTensor:
    """Return a tensor like an example, in memory of its own or in that of `base`."""
    sizes, strides = example.shape, example.stride()
    with in_kernel_invocation_manager(example.fake_mode):
        made = torch.empty_strided(sizes, strides, dtype=example.dtype, device="meta")
        if base is not None:
            made.set_(base.untyped_storage(), example.storage_offset(), sizes, strides)
    return FakeTensor(example.fake_mode, made, example.fake_device)
