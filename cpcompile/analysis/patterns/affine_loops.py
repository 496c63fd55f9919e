"""Affine loops: an unrolled loop that carries a state, of which each turn makes a linear map of it plus something of its own.

    state = state * g[i] + k[i]^T @ (u[i] - w[i] @ state)        is        state = (g[i] - k[i]^T @ w[i]) @ state + k[i]^T @ u[i]

What a turn computes beside the state is computed for all turns at once, and so is what reads it: the states before all turns are
one recurrence. Gated delta rules, linear attention and state spaces that loop over chunks or tokens are such loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.masks.operands import CONVERSIONS
from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.patterns.nodes import same_shape, switches_mode
from cpcompile.analysis.patterns.turns import NotOneLoop, Turns, Writer, apply, operands_of_turns, read_of
from cpcompile.ir.operator_call import Call, value_of

aten, cp = torch.ops.aten, torch.ops.cpcompile
FEWEST = 3  # turns: two of them have to be compared to know what changes
DEEPEST = 100  # operators behind one another in a turn


@dataclass(frozen=True, slots=True)
class Affine:
    """`weight * state + offset`, or `weight @ state + offset`; no weight is 1, no offset 0."""

    weight: Turns | None = None
    offset: Turns | None = None
    by_matrix: bool = False


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


def loop_for_all_turns(node: fx.Node, reader: Reader, number: Callable[[fx.Node], int]) -> fx.Node | None:
    """Return what joins the results of turns, written for all turns at once; None if this is no affine loop.

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
        return joined
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
        state: the nodes of the state of which maps are being read, if any are.
        maps: those that are known.
        depth: how many operators are being read, each an operand of the one before.
    """

    writer: Writer
    reader: Reader
    number: Callable[[fx.Node], int]
    count: int
    known: dict[tuple[fx.Node, ...], Turns] = field(default_factory=dict)
    carried: list[Carried] = field(default_factory=list)
    state: tuple[fx.Node, ...] = ()
    maps: dict[tuple[fx.Node, ...], Affine] = field(default_factory=dict)
    depth: int = 0

    def turns(self, nodes: tuple[fx.Node, ...]) -> Turns | Affine:
        """Return what nodes, one of each turn from the first on, compute in all turns.

        Raises:
            NotOneLoop: they do not compute the same.
        """
        if nodes == self.state[: len(nodes)]:
            return Affine()
        for state in self.carried:
            if nodes == state.nodes[: len(nodes)]:
                return state.before
        found: Turns | Affine | None = self.known.get(nodes) or self.maps.get(nodes)
        if found is None:
            self.depth += 1
            if self.depth > DEEPEST:
                raise NotOneLoop
            found = self._read(nodes)
            self.depth -= 1
            if isinstance(found, Turns):
                self.known[nodes] = found
            else:
                self.maps[nodes] = found
        return found

    def _read(self, nodes: tuple[fx.Node, ...]) -> Turns | Affine:
        if len({self.number(node) for node in nodes}) == 1:
            return Turns(nodes[0], is_shared=True)
        reads = [read for node in nodes if (read := read_of(node)) is not None]
        if len(reads) == len(nodes) and len({(self.number(x), dim) for x, dim, _ in reads}) == 1:
            return self._elements(reads)
        if any(node.target is not nodes[0].target for node in nodes):
            return self._carry(nodes)
        if not isinstance(nodes[0].target, torch._ops.OpOverload):
            raise NotOneLoop
        calls = [Call.of(node) for node in nodes]
        operands = {name: self.turns(x) for name, x in operands_of_turns(calls, self.number).items()}
        found = self._apply(calls[0], operands)
        left = (state.after for state in self.carried if nodes[: len(state.nodes) - 1] == state.nodes[1:])
        return next(left, found)

    def _elements(self, reads: list[tuple[fx.Node, int, int]]) -> Turns:
        """Return a tensor of which turn i reads element i, with its turns in front."""
        x, dim, _ = reads[0]
        if [i for *_, i in reads] != list(range(len(reads))) or value_of(x).shape[dim] != self.count:
            raise NotOneLoop
        return Turns(self.writer.insert(aten.movedim.int, x, dim, 0) if dim else x)

    def _carry(self, nodes: tuple[fx.Node, ...]) -> Turns:
        """Return a state as it begins each turn: it is zeros first, and then what the turn before makes of it."""
        values = [value_of(node) for node in nodes]
        are_alike = all(v.dtype == values[0].dtype and same_shape(v.shape, values[0].shape) for v in values[1:])
        if self.state or len(nodes) < FEWEST or not are_alike or not values[0].dtype.is_floating_point:
            raise NotOneLoop
        if constant(self.reader, nodes[0]) != 0 or switches_mode(nodes[0], self.writer.before):
            raise NotOneLoop
        self.state = nodes
        try:
            step = self.turns(nodes[1:])
        finally:
            self.state, self.maps = (), {}
        if not isinstance(step, Affine) or step.offset is None:
            raise NotOneLoop
        shape, rank = values[0].shape, values[0].dim()
        given = self.writer.each(step.offset, self.count, shape)
        weight = step.weight or self._number(1, nodes[0])
        of_weight = value_of(weight.node).shape[-weight.dims :] if weight.dims else ()
        factor = self.writer.each(weight, self.count, (*[1] * (rank - weight.dims), *of_weight))
        if {value_of(x).dtype for x in (factor, given)} != {values[0].dtype}:
            raise NotOneLoop
        left = self.writer.insert(cp.recurrence.default, factor, given, 0, step.by_matrix)
        before = self.writer.insert(aten.constant_pad_nd.default, left, [0, 0] * rank + [1, -1])
        self.carried.append(Carried(nodes, Turns(before), Turns(left)))
        return Turns(before)

    def _number(self, value: float, like: fx.Node) -> Turns:
        """Return a number as the weight of a state."""
        tensor = value_of(like)
        with tensor.fake_mode:
            number = self.writer.insert(
                aten.full.default, [1] * tensor.dim(), value, dtype=tensor.dtype, device=tensor.device
            )
        return Turns(number, is_shared=True)

    def _apply(self, call: Call, operands: dict[str, Turns | Affine]) -> Turns | Affine:
        """Return the result of an operator; of a map of the state, one that is a map again."""
        if call.is_tuple:
            raise NotOneLoop
        given = {name: x for name, x in operands.items() if isinstance(x, Turns)}
        if len(given) == len(operands):
            return apply(self.writer, call, given)
        if call.target in CONVERSIONS and isinstance(operands["self"], Affine) and self._is_like_state(call.node):
            return operands["self"]
        match call.target, [operands.get(name, call[name]) for name in list(call.arguments)[:2]]:
            case aten.add.Tensor, [a, b] if call["alpha"] == 1:
                return self._sum(a, b)
            case aten.sub.Tensor, [a, b] if call["alpha"] == 1:
                return self._sum(a, self._scaled(b, -1) if isinstance(b, Affine) else self._times(b, -1))
            case aten.mul.Tensor, [Affine() as a, b] | [b, Affine() as a] if not isinstance(b, Affine):
                return self._scaled(a, b)
            case aten.neg.default, [Affine() as a, *_]:
                return self._scaled(a, -1)
            case aten.matmul.default, [Turns() as a, Affine() as b]:
                return self._product(a, b)
        raise NotOneLoop

    def _is_like_state(self, node: fx.Node) -> bool:
        """Tell whether a node has the dtype and the device of the state."""
        value, state = value_of(node), value_of(self.state[0])
        return bool(value.dtype == state.dtype and value.device == state.device)

    def _times(self, a: Any, b: Turns | float) -> Turns:
        if not isinstance(a, Turns):
            raise NotOneLoop
        return self.writer.elementwise(aten.mul.Tensor, a, b)

    def _scaled(self, a: Affine, b: Turns | float) -> Affine:
        """Return a map times a number, or something with one for each row of a state, or for each element."""
        if a.by_matrix and isinstance(b, Turns) and not has_one_column(b):
            raise NotOneLoop
        offset = None if a.offset is None else self._times(a.offset, b)
        if a.weight is None and isinstance(b, Turns):
            return Affine(b, offset)
        return Affine(self._times(a.weight or self._number(1, self.state[0]), b), offset, a.by_matrix)

    def _sum(self, a: Any, b: Any) -> Affine:
        """Return the sum of a map and another, or something that is none."""
        a, b = (a, b) if isinstance(a, Affine) else (b, a)
        if not isinstance(b, Affine | Turns):
            raise NotOneLoop
        offsets = [x for x in (a.offset, b.offset if isinstance(b, Affine) else b) if x is not None]
        offset = self.writer.elementwise(aten.add.Tensor, *offsets) if len(offsets) == 2 else next(iter(offsets), None)
        if isinstance(b, Turns):
            return Affine(a.weight, offset, a.by_matrix)
        by_matrix = a.by_matrix or b.by_matrix
        weights = [self._matrix(x) if by_matrix else x.weight or self._number(1, self.state[0]) for x in (a, b)]
        return Affine(self.writer.elementwise(aten.add.Tensor, *weights), offset, by_matrix)

    def _product(self, a: Turns, b: Affine) -> Affine:
        """Return a matrix times a map."""
        weight = a if b.weight is None else self.writer.product(a, self._matrix(b))
        return Affine(weight, None if b.offset is None else self.writer.product(a, b.offset), by_matrix=True)

    def _matrix(self, a: Affine) -> Turns:
        """Return the weight of a map as a matrix: what is one number for each row of a state is a diagonal."""
        tensor = value_of(self.state[0])
        if a.by_matrix and a.weight is not None:
            return a.weight
        has_rows = tensor.dim() > 1 and isinstance(tensor.shape[-2], int)
        if not has_rows or (a.weight is not None and not has_one_column(a.weight)):
            raise NotOneLoop
        with tensor.fake_mode:
            eye = self.writer.insert(aten.eye.default, tensor.shape[-2], dtype=tensor.dtype, device=tensor.device)
        one = Turns(eye, is_shared=True)
        return one if a.weight is None else self._times(a.weight, one)


def has_one_column(x: Turns) -> bool:
    """Tell whether a tensor broadcasts along the last dim."""
    return x.dims == 0 or bool(value_of(x.node).shape[-1] == 1)
