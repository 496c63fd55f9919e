"""Functionalise writes: operators in place become operators that return what those write, so that no two nodes share memory.

before  q = aten.new_empty(x, [2, 8, 6]); head = aten.slice(q, 2, 0, 4); aten.copy_(head, a); aten.add_(count, 1)
        y = aten.mul(q, 2)
after   q = aten.new_empty(x, [2, 8, 6]); q_1 = aten.slice_scatter(q, a, 2, 0, 4); count_1 = aten.add(count, 1)
        y = aten.mul(q_1, 2); aten.copy_(count, count_1)                              # count is a buffer
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.capture.writes.aliases import (
    hidden_writes,
    is_view_in_place,
    same_sizes,
    settled_writes,
    storages,
    written_arguments,
)
from cpcompile.capture.writes.functional import DRAWS, functional_form
from cpcompile.capture.writes.values import Values, is_leaf
from cpcompile.capture.writes.views import COPYING, refusal, sizes
from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.insertion import fake_result, insert_call, keep_source
from cpcompile.ir.operator_call import Call, is_tensor, value_of, values_of

aten = torch.ops.aten


def functionalise_writes(gm: fx.GraphModule) -> int:
    """Return how many operators in place were replaced.

    Needs: the graph of one device as it was captured: operators in place, views of one memory.
    Gives: values only, so that no later pass thinks of aliases.

    What an input holds afterwards (a buffer, a parameter without gradients) is copied to it at the end of the graph.

    Raises:
        NoRule: an operator in place that has no functional form, or a write through a view that cannot be undone.
    """
    writes = {node: written for node in gm.graph.nodes if (written := written_arguments(node))}
    refuse_hidden_writes(gm, writes)
    if set(writes) == set(settled_writes(gm)):
        return 0
    walk = WriteWalk(gm, writes)
    for node in list(gm.graph.nodes):
        walk.step(node)
    walk.finish()
    return len(writes)


class WriteWalk:
    """Walks the graph once in order: what reads gets the latest values, what writes is replaced."""

    def __init__(self, gm: fx.GraphModule, writes: dict[fx.Node, dict[str, Any]]) -> None:
        self.gm, self.writes = gm, writes
        places = [p for node, written in writes.items() if not is_view_in_place(node) for p in written.values()]
        for node, written in writes.items():
            if not all(map(is_tensor, written.values())):
                raise NoRule(refusal(node, "it writes a list of tensors"))
        self.written = {memory for place in places for memory in storages(place)}
        self.values = Values(gm, self.written)
        self.last_writes: dict[fx.Node, fx.Node] = {}
        self.results: dict[fx.Node, list[fx.Node]] = {}
        self.of_data: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if _torch.is_data(node) or self.values.sources[node] in self.of_data:
                self.of_data.add(node)
        self.needed: dict[int, fx.Node] = {}  # by memory, what may read it in backward

    def step(self, node: fx.Node) -> None:
        """Take the node that is next in order."""
        operands = node.all_input_nodes
        self._step(node)
        self._note_needed(node, operands)

    def _note_needed(self, node: fx.Node, operands: Sequence[fx.Node]) -> None:
        """Note that backward may read what an operator has read or made."""
        is_view = self.values.sources[node] is not None and node not in self.writes
        if is_view or not any(isinstance(x, torch.Tensor) for x in values_of(node)):
            return
        is_differentiable = self.values.is_differentiable(node)
        if node in self.writes and not is_differentiable:
            return
        needed = [x for x in operands if is_differentiable or x not in self.of_data]
        needed += [node] if is_differentiable and node.op == "call_function" else []
        for memory in self.written.intersection(set().union(*map(storages, needed))):
            self.needed.setdefault(memory, node)

    def _refuse_unnoticed(self, node: fx.Node, place: fx.Node) -> None:
        """Refuse a write to `.data` behind which backward computes with other numbers than forward did.

        Raises:
            NoRule: with both lines.
        """
        reader = next((self.needed[m] for m in storages(place) if m in self.needed), None)
        if place in self.of_data and reader is not None:
            raise NoRule(
                f"{node.target}: it writes to the .data of a tensor that {reader.target} has used before, whose backward on one "
                f"device would compute with what is written now, unnoticed.\n\n{where(node)}\n{where(reader)}\n\n"
                "Write it before it is used, or behind the step of the optimizer (torch.no_grad(), out of the model)."
            )

    def _step(self, node: fx.Node) -> None:
        if node.target is torch._C._set_grad_enabled:
            self.values.is_recording = bool(node.args[0])
        elif node.target is aten.sym_size.int:
            node.args = (self.values.canonical(node.args[0]), *node.args[1:])  # type: ignore[arg-type]
        elif node.target is operator.getitem and node.args[0] in self.results:
            self.values.unite(node, self.results[node.args[0]][node.args[1]])  # type: ignore[index]
        elif node not in self.writes:
            self._read(node)
            self.values.track(node)
        elif is_view_in_place(node):
            node.target = self._form(node)
            self._read(node)
            self.values.track(node)
        else:
            self._read(node)
            self._replace(node, list(self.writes[node].items()))

    def _read(self, node: fx.Node) -> None:
        """Give `node` the latest values of its operands."""
        arguments = fx.map_arg((node.args, node.kwargs), lambda operand: self.values.read(operand, node))
        if arguments != (node.args, node.kwargs):
            node.args, node.kwargs = arguments

    def _form(self, node: fx.Node) -> torch._ops.OpOverload:
        assert isinstance(node.target, torch._ops.OpOverload)
        if node.target is aten.set_.source_Tensor:
            raise NoRule(
                f"{node.target}: x.data = y puts other memory under a tensor.\n\n{where(node)}\n\n"
                "Write x.data.copy_(y), or move it out of the model."
            )
        form = functional_form(node.target)
        if form is None or (is_view_in_place(node) and form._schema.returns[0].alias_info is None):
            raise NoRule(refusal(node, "it writes, and there is no operator that returns what it writes"))
        return form

    def _replace(self, node: fx.Node, places: list[tuple[str, fx.Node]]) -> None:
        """Compute what `node` writes, and make it the latest value of the places that it writes to."""
        for _, place in places:
            self._refuse_unnoticed(node, place)
        call = Call.of(node)
        if node.target is aten.copy_.default:
            results = [call["src"]]
        else:
            result = self._emit_form(node, call)
            is_tuple = isinstance(value_of(result), tuple | list)
            results = (
                [insert_call(node, operator.getitem, result, i) for i in range(len(places))] if is_tuple else [result]
            )
        for (name, place), result in zip(places, results, strict=True):
            value = self._fitted(node, call[name], result)
            if value is not result or node.target is not aten.copy_.default:
                annotate(value, origin=annotation(node).origin)
            self.values.write(place, value, node)
            self.last_writes[self.values.roots[self.values.canonical(place)]] = node
        if isinstance(value_of(node), tuple | list):
            self.results[node] = [place for _, place in places]
        else:
            self.values.unite(node, places[0][1])

    def _emit_form(self, node: fx.Node, call: Call) -> fx.Node:
        """Insert the functional form of `node`."""
        form = self._form(node)
        given = [call[a.name] for a in call.target._schema.arguments if not a.is_out]
        if call.target.overloadpacket in DRAWS and self.values.is_differentiable(given[0]):
            given[0] = insert_call(node, aten.detach.default, given[0])
        arguments = list(zip(form._schema.arguments, given, strict=True))
        kwargs = {a.name: value for a, value in arguments if a.kwarg_only}
        new = insert_call(node, form, *(value for a, value in arguments if not a.kwarg_only), **kwargs)
        new.args, new.kwargs = Call.of(new).rebound({})
        return new

    def _fitted(self, node: fx.Node, place: fx.Node, value: fx.Node) -> fx.Node:
        """Return `value` with dtype, device and sizes of the place where `node` writes it."""
        have, wanted = value_of(value), value_of(place)
        if not same_sizes(have.shape, wanted.shape):
            if node.target is not aten.copy_.default:
                raise NoRule(refusal(node, "it changes the size of what it writes"))
            value = insert_call(node, aten.expand.default, value, sizes(node, place))
        if have.device != wanted.device:  # after the expansion, so that gradients are added up in their own dtype
            value = insert_call(node, aten.to.device, value, wanted.device, wanted.dtype)
        elif have.dtype != wanted.dtype:
            value = insert_call(node, aten.to.dtype, value, wanted.dtype)
        if storages(value) & self.written and any(p.op == "placeholder" for p in self._owners(value)):
            value = insert_call(node, aten.clone.default, value)  # the input itself is written at the end
        return value

    def _owners(self, value: fx.Node) -> list[fx.Node]:
        return [self.values.owners[m] for m in storages(value) if m in self.values.owners]

    def finish(self) -> None:
        """Copy what inputs hold at the end to them, and remove the operators in place."""
        (output,) = self.gm.graph.find_nodes(op="output")
        for place, last in self.last_writes.items():
            if place.op == "placeholder":
                self._copy_to_input(place, last, output)
        for node in reversed(self.writes):
            if written_arguments(node):
                for item in list(node.users):
                    self.gm.graph.erase_node(item)
                self.gm.graph.erase_node(node)
        copy_where_views_may_fail(self.gm, self.values.moved)
        for view in self.values.views():
            assert callable(view.target)
            view.meta["val"] = fake_result(view.target, *fx.map_arg((view.args, view.kwargs), value_of))

    def _copy_to_input(self, place: fx.Node, last: fx.Node, output: fx.Node) -> None:
        """Copy the latest value of an input to it. Parameters are written without gradients or not at all."""
        mode = self.values.is_recording
        self._set_recording(mode and not (self.values.is_differentiable(place) and is_leaf(place)), output)
        copy = insert_call(output, aten.copy_.default, place, self.values.read(place, output))
        keep_source(copy, last)
        self._set_recording(mode, output)

    def _set_recording(self, mode: bool, before: fx.Node) -> None:
        if mode != self.values.is_recording:
            with self.gm.graph.inserting_before(before):
                self.gm.graph.call_function(torch._C._set_grad_enabled, (mode,))
            self.values.is_recording = mode


def refuse_hidden_writes(gm: fx.GraphModule, writes: dict[fx.Node, dict[str, Any]]) -> None:
    """Refuse what could not be kept in order: running statistics that are used again, and writes inside nested graphs."""
    hidden: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        own = list(hidden_writes(node))
        memory = {m for operand in node.all_input_nodes if operand not in own for m in storages(operand)}
        memory |= {m for operand in own for m in storages(operand) if node in writes}
        for m in memory & hidden.keys():
            raise NoRule(refusal(node, f"it uses running statistics that {hidden[m].name} updates"))
        hidden.update({m: node for operand in own for m in storages(operand)})
    places = {
        m: node for node, written in writes.items() for p in written.values() if is_tensor(p) for m in storages(p)
    }
    for m in places.keys() & hidden.keys():
        raise NoRule(refusal(places[m], f"it writes running statistics that {hidden[m].name} updates"))
    for nested in gm.modules():
        for node in nested.graph.nodes if isinstance(nested, fx.GraphModule) and nested is not gm else ():
            if written_arguments(node) and not is_view_in_place(node):
                raise NoRule(refusal(node, "it writes inside a nested graph"))


def copy_where_views_may_fail(gm: fx.GraphModule, moved: set[fx.Node]) -> None:
    """Let views of values with other strides copy if they must, and of all that comes from these."""
    moved = set(moved)
    for node in gm.graph.nodes:
        if node.op != "call_function" or moved.isdisjoint(node.all_input_nodes):
            continue
        if node.target is aten.as_strided.default:
            raise NoRule(
                refusal(node, "its elements are chosen by strides, which operators in place before it changed")
            )
        node.target = COPYING.get(node.target, node.target)
        moved.add(node)
