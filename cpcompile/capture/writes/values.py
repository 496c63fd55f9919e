"""Values: what the nodes that share written memory hold, version by version."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from cpcompile.capture.writes.aliases import same_layout, source_of, storages
from cpcompile.capture.writes.views import join_pieces, refusal, replay, write_back
from cpcompile.errors import NoRule
from cpcompile.ir.insertion import insert_call, keep_source
from cpcompile.ir.operator_call import value_of, values_of

aten = torch.ops.aten


class Values:
    """The nodes that hold the latest values of the nodes that share written memory, while a pass walks the graph.

    A write makes a new version of the memory; views of it are computed anew where they are next read. A value
    written while gradients are off leaves the gradient of what it replaces as it was, so that every node has a
    value for each of the two modes.

    Attributes:
        is_recording: whether gradients are on at the current node.
        moved: values whose strides differ from those of what they replace.
    """

    def __init__(self, gm: fx.GraphModule, written: set[int]) -> None:
        self.written = written
        self.sources = {node: source_of(node) for node in gm.graph.nodes}
        self.arguments = {node: (node.args, node.kwargs) for node in gm.graph.nodes}
        self.is_recording = True
        self.moved: set[fx.Node] = set()
        self.owners: dict[int, fx.Node] = {}
        self.roots: dict[fx.Node, fx.Node] = {}
        self.versions: dict[fx.Node, int] = {}
        self._current: dict[fx.Node, dict[bool, tuple[int, fx.Node]]] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._differentiable: dict[fx.Node, bool] = {}
        self._own_gradient: set[fx.Node] = set()

    def canonical(self, node: fx.Node) -> fx.Node:
        """Return the node that was written, for the result of an operator in place."""
        return self._same.get(node, node)

    def unite(self, result: fx.Node, written: fx.Node) -> None:
        """Let the result of an operator in place be what it has written."""
        self._same[result] = self.canonical(written)

    def views(self) -> list[fx.Node]:
        """Return the views of written memory that the graph had."""
        return [node for node in self.roots if self.sources[node] is not None]

    def track(self, node: fx.Node) -> None:
        """Take up `node`, whose operands are the latest values."""
        self.is_differentiable(node)
        memory = storages(node) & self.written
        source = self.sources.get(node)
        if not memory or (source is None and isinstance(value_of(node), tuple | list)):
            return
        if source is None:
            self._own(node, memory)
            root = node
        else:
            source = self.sources[node] = self.canonical(source)
            root = self.roots[source]
        self.roots[node] = root
        version = self.versions.setdefault(root, 0)
        self._current[node] = {True: (version, node), False: (version, node)}

    def _own(self, node: fx.Node, memory: set[int]) -> None:
        assert node.op != "get_attr", "constants are copied before they are written"
        others = [self.owners.setdefault(m, node) for m in memory]
        if any(other is not node for other in others):
            raise NoRule(refusal(node, f"it shares the memory of {others[0].name}, which is written"))

    def read(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """Return the node that holds the latest value of `node`; if there is none yet, it is computed before `before`."""
        node = self.canonical(node)
        if node not in self._current:
            return node
        value = self._latest(node)
        if value is None:
            value = self._computed(node, before)
            self._keep(node, value, (True, False) if self.is_recording else (False,))
        if value is not node and is_moved(value, node):
            self.moved.add(value)
        return value

    def write(self, node: fx.Node, value: fx.Node, before: fx.Node) -> None:
        """Make `value` the latest value of `node`, and of what `node` is a view of what follows from it."""
        node = self.canonical(node)
        root = self.roots[node]
        changed = [(node, value)]
        while (source := self.sources[node]) is not None:
            view, node, new = node, source, changed[-1][1]
            if view.target is operator.getitem:
                node = self.sources[source]  # type: ignore[assignment]  # what was cut into pieces
                new = join_pieces(before, view, self.read(source, before), new)
                old = self.read(node, before)
            else:
                old = self.read(node, before)
                new = write_back(before, view, node, old, new)
            changed.append((node, self._across(view, old, new, before)))
        modes: tuple[bool, ...] = (True, False)
        if not self.is_recording and self.is_differentiable(self._current[root][True][1]):
            modes = (False,)
        self.versions[root] += 1
        for changed_node, new in changed:
            self._keep(changed_node, new, modes)

    def _across(self, view: fx.Node, old: fx.Node, new: fx.Node, before: fx.Node) -> fx.Node:
        """Return the new value of what `view` is a view of: no gradient passes a view by `detach`."""
        if not self.is_recording or view.target is not aten.detach.default:
            return new
        if self.is_differentiable(new):
            self._own_gradient.add(view)
            new = self._emit(before, aten.detach.default, new)
        return self.with_gradient_of(old, new, before) if self.is_differentiable(old) else new

    def with_gradient_of(self, old: fx.Node, new: fx.Node, before: fx.Node) -> fx.Node:
        """Return the value of `new` with the gradient of `old`, as a write without gradients leaves it.

        Exact where `old` is finite: what is added is 0 then, and NaN elsewhere.
        """
        if not self.is_differentiable(old):
            return new
        zero = self._emit(before, aten.sub.Tensor, old, self._emit(before, aten.detach.default, old))
        return self._emit(before, aten.add.Tensor, new, zero)

    def is_differentiable(self, node: fx.Node) -> bool:
        """Tell whether `node` may depend on what takes a gradient. Asked first while the mode is that of the node."""
        if node not in self._differentiable:
            operands = [self.is_differentiable(operand) for operand in node.all_input_nodes]  # each in this mode
            is_computed = self.is_recording and node.target is not aten.detach.default and any(operands)
            is_source = node.op == "placeholder" and takes_gradient(node)
            self._differentiable[node] = is_floating(node) and (is_source or is_computed)
        return self._differentiable[node]

    def _latest(self, node: fx.Node) -> fx.Node | None:
        version = self.versions[self.roots[node]]
        for mode in (True,) if self.is_recording else (False, True):
            known, value = self._current[node][mode]
            if known == version:
                return value
        return None

    def _computed(self, node: fx.Node, before: fx.Node) -> fx.Node:
        source = self.sources[node]
        if source is None:
            return self.with_gradient_of(self._current[node][True][1], self._current[node][False][1], before)
        if self.is_recording and node in self._own_gradient:
            raise NoRule(
                refusal(node, "this view without gradients was given gradients in place, and then written elsewhere")
            )
        latest = self.read(source, before)

        def argument(operand: fx.Node) -> fx.Node:
            return latest if self.canonical(operand) is source else self.read(operand, before)

        value = replay(before, node, *fx.map_arg(self.arguments[node], argument))
        keep_source(value, node)
        return value

    def _keep(self, node: fx.Node, value: fx.Node, modes: tuple[bool, ...]) -> None:
        self.is_differentiable(value)
        for mode in modes:
            self._current[node][mode] = (self.versions[self.roots[node]], value)

    def _emit(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        node = insert_call(before, target, *args)
        self.is_differentiable(node)
        return node


def is_moved(value: fx.Node, node: fx.Node) -> bool:
    """Tell whether `value`, which takes the place of `node`, has other strides."""
    a, b = value_of(value), value_of(node)
    return isinstance(a, torch.Tensor) and not same_layout(a, b)


def is_floating(node: fx.Node) -> bool:
    """Tell whether some result of `node` can have a gradient."""
    tensors = [x for x in values_of(node) if isinstance(x, torch.Tensor)]
    return any(x.is_floating_point() or x.is_complex() for x in tensors)


def takes_gradient(node: fx.Node) -> bool:
    """Tell whether an input takes a gradient; one of which nothing is known may."""
    example = getattr(node.meta.get("grapharg"), "example", None)
    return not isinstance(example, torch.Tensor) or example.requires_grad


def is_leaf(node: fx.Node) -> bool:
    """Tell whether an input is where gradients end, such as a parameter."""
    example = getattr(node.meta.get("grapharg"), "example", None)
    return not isinstance(example, torch.Tensor) or example.is_leaf
