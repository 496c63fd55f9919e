"""Affine loops: an unrolled loop that carries a state, of which each turn makes a linear map of it plus something of its own.

    state = state * g[i] + k[i]^T @ (u[i] - w[i] @ state)        is        state = (g[i] - k[i]^T @ w[i]) @ state + k[i]^T @ u[i]

What a turn computes beside the state is computed for all turns at once, and so is what reads it: the states before all turns are
one recurrence. Gated delta rules, linear attention and state spaces that loop over chunks or tokens are such loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.patterns.expansions import expanded
from cpcompile.analysis.patterns.nodes import same_shape, switches_mode
from cpcompile.analysis.patterns.state_maps import Affine, Maps, write_recurrence
from cpcompile.analysis.patterns.turns import NotOneLoop, Turns, Writer, apply, is_pointwise, operands_of_turns, read_of
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten
FEWEST = 3  # turns: two of them have to be compared to know what changes
DEEPEST = 100  # operators behind one another in a turn


class DependOnEachOther(Exception):
    """The map of a state reads one whose map is being read: they and those between them are one state."""

    def __init__(self, readings: Sequence[Reading], level: int) -> None:
        super().__init__()
        self.level = level
        self.states = tuple(state for reading in readings[level:] for state in reading.states)


@dataclass(frozen=True, slots=True)
class Reading:
    """States of which the maps are being read: the nodes with which turns begin, and what is known of others."""

    states: tuple[tuple[fx.Node, ...], ...]
    maps: Maps
    known: dict[tuple[fx.Node, ...], Affine] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Carried:
    """A state that turns pass on: the nodes with which each begins, and both what they begin with and what they leave."""

    nodes: tuple[fx.Node, ...]
    before: Turns
    after: Turns


def counts_of_turns(graph: fx.Graph, number: Callable[[fx.Node], int]) -> set[int]:
    """Return how many turns loops may have: the lengths of dims of which all elements are read one by one."""
    read: dict[tuple[int, int], tuple[int, set[int]]] = {}
    for node in graph.nodes:
        found = read_of(node)
        if found is not None:
            x, dim, index = found
            read.setdefault((number(x), dim), (value_of(x).shape[dim], set()))[1].add(index)
    return {length for length, indices in read.values() if len(indices) == length >= FEWEST}


@dataclass(frozen=True, slots=True)
class Found:
    """A loop that is written for all turns at once.

    Attributes:
        joined: what its turns compute, joined.
        last: what is computed in the last turn, and the same of all turns.
        nodes: all nodes of turns.
    """

    joined: fx.Node
    last: dict[fx.Node, fx.Node]
    nodes: frozenset[fx.Node]


def loop_for_all_turns(node: fx.Node, reader: Reader, number: Callable[[fx.Node], int]) -> Found | None:
    """Return a loop whose results are joined, written for all turns at once; None if this is no affine loop.

    Args:
        node: a call of `stack` or `cat`.
        number: the same number for nodes of the same value.
    """
    call = Call.of(node)
    entries, mark = tuple(call["tensors"]), node.prev
    loop = Loop(Writer(node), reader, number, len(entries))
    try:
        found = loop.turns(entries)
    except NotOneLoop:
        found = None
    if isinstance(found, Turns) and not found.is_shared and loop.carried:
        dim = int(call["dim"]) % (found.dims + (node.target is aten.stack.default))
        joined = loop.writer.insert(aten.movedim.int, found.node, 0, dim)
        if node.target is not aten.stack.default:
            joined = loop.writer.insert(aten.flatten.using_ints, joined, dim, dim + 1)
        return loop.found(joined)
    while node.prev is not mark:
        node.graph.erase_node(node.prev)
    return None


@dataclass(slots=True)
class Loop:
    """Reads the nodes of all turns, and writes what they compute for all of them.

    Attributes:
        count: how many turns there are.
        known: what is written already.
        carried: the states that are.
        readings: the states of which maps are being read, each for the map of the one before.
        depth: how many operators are being read, each an operand of the one before.
        retries: how often nodes of one operator may still be read as a state, when they are no turns.
    """

    writer: Writer
    reader: Reader
    number: Callable[[fx.Node], int]
    count: int
    known: dict[tuple[fx.Node, ...], Turns] = field(default_factory=dict)
    carried: list[Carried] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    depth: int = 0
    retries: int = 10

    def found(self, joined: fx.Node) -> Found:
        """Return what was read of the loop, of which `joined` takes the place."""
        own = {nodes: turns for nodes, turns in self.known.items() if not turns.is_shared and len(nodes) == self.count}
        last = {nodes[-1]: turns.node for nodes, turns in own.items() if read_of(nodes[-1]) is None}
        return Found(joined, last, frozenset(node for nodes in own for node in nodes))

    def turns(self, nodes: tuple[fx.Node, ...]) -> Turns | Affine:
        """Return what nodes, one of each turn from the first on, compute in all turns.

        Raises:
            NotOneLoop: they do not compute the same.
        """
        reading = self.readings[-1] if self.readings else None
        for level, other in enumerate(self.readings):
            for part, state in enumerate(other.states):
                if nodes == state[: len(nodes)]:
                    if other is not reading:
                        raise DependOnEachOther(self.readings, level)
                    return other.maps.part(part, len(other.states))
        for carried in self.carried:
            if nodes == carried.nodes[: len(nodes)]:
                return carried.before
        found: Turns | Affine | None = self.known.get(nodes)
        if found is None and reading is not None:
            found = reading.known.get(nodes)
        if found is None:
            self.depth += 1
            if self.depth > DEEPEST:
                raise NotOneLoop
            found = self._read(nodes)
            self.depth -= 1
            if isinstance(found, Turns):
                self.known[nodes] = found
            elif reading is not None:
                reading.known[nodes] = found
        return found

    def _read(self, nodes: tuple[fx.Node, ...]) -> Turns | Affine:
        if len({self.number(node) for node in nodes}) == 1:
            return Turns(nodes[0], is_shared=True)
        reads = [read for node in nodes if (read := read_of(node)) is not None]
        if len(reads) == len(nodes) and len({(self.number(x), dim) for x, dim, _ in reads}) == 1:
            return self._elements(reads)
        if any(node.target is not nodes[0].target for node in nodes):
            return self._carry(nodes)
        depth, readings = self.depth, len(self.readings)
        try:
            return self._compute(nodes)
        except NotOneLoop:
            if not self.retries:
                raise
            # What a state begins with may be made by the operator that makes the others.
            self.retries, self.depth = self.retries - 1, depth
            del self.readings[readings:]
            return self._carry(nodes)

    def _compute(self, nodes: tuple[fx.Node, ...]) -> Turns | Affine:
        """Return what the same operator computes in all turns."""
        is_operator = isinstance(nodes[0].target, torch._ops.OpOverload)
        if not is_operator or value_of(nodes[0]).dtype != value_of(nodes[-1]).dtype:
            raise NotOneLoop
        calls = [Call.of(node) for node in nodes]
        operands = {name: self.turns(x) for name, x in operands_of_turns(calls, self.number).items()}
        found = self._apply(calls[-1], operands)
        left = (state.after for state in self.carried if nodes[: len(state.nodes) - 1] == state.nodes[1:])
        return next(left, found)

    def _elements(self, reads: list[tuple[fx.Node, int, int]]) -> Turns:
        """Return a tensor of which turn i reads element i, with its turns in front.

        Turns that read the element behind, since the state begins with the first one, are one less: the last here is never used.
        """
        x, dim, first = reads[0]
        is_in_order = [i for *_, i in reads] == list(range(first, first + len(reads)))
        if first > 1 or not is_in_order or value_of(x).shape[dim] != self.count:
            raise NotOneLoop
        node = self.writer.insert(aten.movedim.int, x, dim, 0) if dim else x
        return Turns(self.writer.insert(aten.roll.default, node, [-1], [0]) if first else node)

    def _carry(self, nodes: tuple[fx.Node, ...]) -> Turns:
        """Return a state as it begins each turn: what it begins with, and then what the turn before makes of it."""
        for known in self.carried:
            if known.nodes == nodes[: len(known.nodes)]:  # it is written for all turns, and was proven for fewer
                Loop(self.writer, self.reader, self.number, self.count)._carry(nodes)
                self.carried.append(Carried(nodes, known.before, known.after))
                return known.before
        states, maps, step = self._step((nodes,))
        begins = [self._begin(state[0], maps.state.dtype) for state in states]
        before, left = write_recurrence(maps, step, self._joined(begins))
        for part, state in enumerate(states):
            of_part = [
                Turns(x if len(states) == 1 else self.writer.insert(aten.select.int, x, 1, part))
                for x in (before, left)
            ]
            self.carried.append(Carried(state, *of_part))
        return self.carried[-len(states)].before

    def _step(self, states: tuple[tuple[fx.Node, ...], ...]) -> tuple[tuple[tuple[fx.Node, ...], ...], Maps, Affine]:
        """Return what a turn makes of states, and of those with which they depend on each other."""
        maps = Maps.of(self.writer, self._value(states), len(states), self.count)
        level, depth = len(self.readings), self.depth
        self.readings.append(Reading(states, maps))
        try:
            steps = [self.turns(state[1:]) for state in states]
        except DependOnEachOther as found:
            del self.readings[level:]
            self.depth = depth
            if found.level < level:
                raise
            return self._step(found.states)
        self.readings.pop()
        return states, maps, maps.joined(steps)

    def _value(self, states: tuple[tuple[fx.Node, ...], ...]) -> torch.Tensor:
        """Return the fake value that states have when a turn ends; all have one shape and dtype."""
        last: torch.Tensor = value_of(states[0][-1])
        for nodes in states:
            values = [value_of(node) for node in nodes]
            are_alike = all(v.dtype == last.dtype for v in values[1:])
            are_alike &= all(v.device == last.device and same_shape(v.shape, last.shape) for v in values)
            if len(nodes) < FEWEST or not are_alike or not last.dtype.is_floating_point:
                raise NotOneLoop
            if switches_mode(nodes[0], self.writer.before):
                raise NotOneLoop
        return last

    def _begin(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Return what a state begins with, in the dtype that it has later."""
        if torch.promote_types(value_of(node).dtype, dtype) != dtype:
            raise NotOneLoop
        return node if value_of(node).dtype == dtype else self.writer.insert(aten.to.dtype, node, dtype)

    def _joined(self, begins: Sequence[fx.Node]) -> fx.Node | None:
        """Return what states that are one begin with; None if that is zeros."""
        if all(constant(self.reader, node) == 0 for node in begins):
            return None
        return begins[0] if len(begins) == 1 else self.writer.insert(aten.stack.default, list(begins))

    def _apply(self, call: Call, operands: dict[str, Turns | Affine]) -> Turns | Affine:
        """Return the result of an operator; of a map of the state, one that is a map again."""
        if call.is_tuple:
            raise NotOneLoop
        given = {name: x for name, x in operands.items() if isinstance(x, Turns)}
        if len(given) < len(operands) or not is_pointwise(call.target):
            found = self._expanded(call, operands)
            if found is not None:
                return found
        if len(given) == len(operands):
            return apply(self.writer, call, given)
        return self.readings[-1].maps.apply(call, operands, call.result)

    def _expanded(self, call: Call, operands: dict[str, Turns | Affine]) -> Turns | Affine | None:
        """Return the result of an operator that is sums and products in one call; None if it is none."""
        nodes = dict(call.operands())
        if len(call.node.all_input_nodes) > len(set(nodes.values())):
            return None  # a number among its arguments is computed
        graph = fx.Graph()
        given = {name: graph.placeholder(f"operand{i}") for i, name in enumerate(nodes)}
        known = {given[name]: operand for name, operand in operands.items()}
        args, kwargs = call.rebound(given)
        copy = graph.call_function(call.target, args, kwargs)
        for name, node in (*given.items(), ("", copy)):
            node.meta["val"] = value_of(nodes.get(name, call.node))
        result = expanded(Call.of(copy))
        if result is None:
            return None
        for part in (Call.of(node) for node in graph.nodes if node.op == "call_function" and node is not copy):
            known[part.node] = self._apply(part, {name: known[operand] for name, operand in part.operands()})
        return known[result]
