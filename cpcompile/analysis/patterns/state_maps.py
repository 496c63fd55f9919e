"""Maps of a state: what a turn of a loop makes of the state that it carries, if that is linear in it, plus something of its own.

    (state * k[..., None]).sum(-2)        is        k[..., None, :] @ state, without its row

Along one dim of the state elements may be mixed, by products of matrices or by products and sums; along the others they are not.
States that depend on each other are one state, with a dim in front along which they are mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.masks.operands import CONVERSIONS
from cpcompile.analysis.patterns.expansions import is_finite
from cpcompile.analysis.patterns.turns import NotOneLoop, Turns, Writer, apply
from cpcompile.ir.operator_call import Call, value_of

aten, cp = torch.ops.aten, torch.ops.cpcompile
ROW = -1  # a dim of the rows of a map that mixes
ONE = -2  # a dim of size 1 that the state does not have
SUMS = {aten.sum.dim_IntList, aten.mean.dim}


@dataclass(frozen=True, slots=True)
class Affine:
    """A value that is linear in the state, plus an offset.

    Attributes:
        dims: for each dim of the value, the dim of the state along which it runs, or `ROW`, or `ONE`.
        weight: what elements are multiplied with; None is 1. Of a map that mixes: `[..., rows, k]`, with those dims of the
            value in front that are no rows, and one row if the value has no dim of them.
        offset: of as many dims as the value, or None.
        mixed: the dim of the state along which it mixes, if it does.
    """

    dims: tuple[int, ...]
    weight: Turns | None = None
    offset: Turns | None = None
    mixed: int | None = None

    @property
    def others(self) -> list[int]:
        """The dims of the value but the rows."""
        return [i for i, label in enumerate(self.dims) if label != ROW]


@dataclass(frozen=True, slots=True)
class Maps:
    """Writes maps of one state.

    Attributes:
        state: the fake value of the state.
        count: how many turns there are.
    """

    writer: Writer
    state: torch.Tensor
    count: int

    @classmethod
    def of(cls, writer: Writer, value: torch.Tensor, parts: int, count: int) -> Maps:
        """Write maps of states that have one shape; several are one state, with a dim in front."""
        with value.fake_mode:  # type: ignore[attr-defined]
            return cls(writer, value if parts == 1 else torch.stack([value] * parts), count)

    def part(self, part: int, parts: int) -> Affine:
        """Return the map that changes nothing, or takes one of several states."""
        if parts == 1:
            return Affine(tuple(range(self.state.dim())))
        row = Turns(self.writer.insert(aten.slice.Tensor, self.eye(parts).node, 0, part, part + 1), is_shared=True)
        return Affine(tuple(range(1, self.state.dim())), self.writer.ranked(row, self.state.dim() + 1), mixed=0)

    def joined(self, steps: Sequence[Turns | Affine]) -> Affine:
        """Return the map of all states."""
        found: Affine | None = None
        for part, step in enumerate(steps):
            if not isinstance(step, Affine):
                raise NotOneLoop
            if len(steps) > 1:
                column = self.writer.insert(aten.slice.Tensor, self.eye(len(steps)).node, 1, part, part + 1)
                for _ in range(len(step.dims) - 1):
                    column = self.writer.insert(aten.unsqueeze.default, column, -1)
                step = self.scaled(self.unsqueezed(step, 0), Turns(column, is_shared=True))
            found = step if found is None else self.sum(found, step)
        assert found is not None
        return self.checked(found, self.state)

    def eye(self, size: int) -> Turns:
        """Return the matrix that changes nothing."""
        dtype, device = self.state.dtype, self.state.device
        with self.state.fake_mode:  # type: ignore[attr-defined]
            return Turns(self.writer.insert(aten.eye.default, size, dtype=dtype, device=device), is_shared=True)

    def apply(self, call: Call, operands: dict[str, Turns | Affine], like: Any) -> Affine:
        """Return what an operator makes of a map, which is one again.

        Args:
            call: one that has no expansion.
            like: the fake value of the result.
        """
        a: Any
        match call.target, [operands.get(name, call[name]) for name in list(call.arguments)[:2]]:
            case target, [Affine() as a, *_] if target in CONVERSIONS:
                found = a
            case aten.add.Tensor, [a, b]:
                found = self.sum(a, b)
            case aten.mul.Tensor, [Affine() as a, b] | [b, Affine() as a] if not isinstance(b, Affine):
                found = self.scaled(a, b)
            case aten.matmul.default, [Turns() | Affine(), Turns() | Affine()]:
                found = self.product(call, operands)
            case aten.masked_fill.Scalar, [Affine() as a, Turns() as b]:
                found = self.scaled(a, b, self.filled)
            case target, [Affine() as a, *_] if target in SUMS:
                found = self.reduced(call, a)
            case target, [Affine() as a, *_]:
                found = self.moved(call, a)
            case _:
                raise NotOneLoop
        return self.checked(found, like)

    def checked(self, a: Affine, like: Any) -> Affine:
        """Return a map of which each dim is what its label says; rows that were broadcast become as many as there are."""
        is_like_state = isinstance(like, torch.Tensor) and like.dtype == self.state.dtype
        if not is_like_state or like.device != self.state.device or like.dim() != len(a.dims):
            raise NotOneLoop
        for size, label in zip(like.shape, a.dims, strict=True):
            if label != ROW and str(size) != str(1 if label == ONE else self.state.shape[label]):
                raise NotOneLoop
        if ROW not in a.dims or a.weight is None:
            return a
        rows = like.shape[a.dims.index(ROW)]
        have = value_of(a.weight.node).shape[-2]
        if str(rows) == str(have):
            return a
        if have != 1 or not isinstance(rows, int):
            raise NotOneLoop
        sizes = [*[-1] * (value_of(a.weight.node).dim() - 2), rows, -1]
        return replace(
            a, weight=Turns(self.writer.insert(aten.expand.default, a.weight.node, sizes), a.weight.is_shared)
        )

    def number(self, value: float, dims: int | None = None) -> Turns:
        """Return a number as the weight of a state, or as a tensor of so many dims."""
        dtype, device = self.state.dtype, self.state.device
        sizes = [1] * (self.state.dim() if dims is None else dims)
        with self.state.fake_mode:  # type: ignore[attr-defined]
            one = self.writer.insert(aten.full.default, sizes, value, dtype=dtype, device=device)
        return Turns(one, is_shared=True)

    def times(self, a: Any, b: Turns | float) -> Turns:
        """Multiply elements."""
        if not isinstance(a, Turns):
            raise NotOneLoop
        return self.writer.elementwise(aten.mul.Tensor, a, b)

    def filled(self, a: Any, mask: Any) -> Turns:
        """Fill elements with zeros."""
        if not isinstance(a, Turns):
            raise NotOneLoop
        return self.writer.elementwise(aten.masked_fill.Scalar, a, mask, 0)

    def scaled(self, a: Affine, b: Any, times: Callable[[Any, Any], Turns] | None = None) -> Affine:
        """Return a map times a number, or a tensor that broadcasts to its value.

        Args:
            times: what takes the place of the product of elements.
        """
        is_product, times = times is None, times or self.times
        if not isinstance(b, Turns):
            if not is_finite(b):
                raise NotOneLoop  # the product of a sum with it is not the sum of products: infinity minus infinity
            offset = None if a.offset is None else times(a.offset, b)
            return replace(a, weight=times(a.weight or self.number(1), b), offset=offset)
        a = self.with_rows_of(a, b)
        offset = None if a.offset is None else times(a.offset, b)
        if a.mixed is None:
            weight = b if is_product and a.weight is None else times(a.weight or self.number(1), b)
            return replace(a, weight=weight, offset=offset)
        b, last = self.writer.ranked(b, len(a.dims)), len(a.dims) - 1
        if ROW in a.dims:
            b = self.writer.of_turns(aten.movedim.int, b, a.dims.index(ROW), last)
        else:
            b = self.writer.of_turns(aten.unsqueeze.default, b, last + 1)
        columns = Turns(self.writer.insert(aten.unsqueeze.default, b.node, -1), b.is_shared)
        return replace(a, weight=times(a.weight, columns), offset=offset)

    def sum(self, x: Any, y: Any) -> Affine:
        """Return the sum of a map and another, or a tensor that broadcasts to its value."""
        a: Affine
        a, b = (x, y) if isinstance(x, Affine) else (y, x)
        if isinstance(b, int | float):
            b = self.number(b, len(a.dims))
        if isinstance(b, Turns):
            a = self.with_rows_of(a, b)
            b = self.writer.ranked(b, len(a.dims))
            return replace(a, offset=b if a.offset is None else self.writer.elementwise(aten.add.Tensor, a.offset, b))
        if not isinstance(b, Affine) or len(a.dims) != len(b.dims):
            raise NotOneLoop
        for mixed in {each.mixed for each in (a, b) if each.mixed is not None}:
            a, b = self.mixing(a, mixed), self.mixing(b, mixed)
        for i, labels in enumerate(zip(a.dims, b.dims, strict=True)):
            a = self.with_row(a, i) if labels == (ONE, ROW) else a
            b = self.with_row(b, i) if labels == (ROW, ONE) else b
        if a.dims != b.dims:
            raise NotOneLoop
        offsets = [each.offset for each in (a, b) if each.offset is not None]
        offset = self.writer.elementwise(aten.add.Tensor, *offsets) if len(offsets) == 2 else next(iter(offsets), None)
        weights = [each.weight or self.number(1) for each in (a, b)]
        return replace(a, weight=self.writer.elementwise(aten.add.Tensor, *weights), offset=offset)

    def with_rows_of(self, a: Affine, b: Turns) -> Affine:
        """Return a map that has rows where a tensor, with which it is combined, has more than one."""
        if b.dims > len(a.dims):
            raise NotOneLoop
        for i, size in enumerate(b.shape, len(a.dims) - b.dims):
            if a.dims[i] == ONE and str(size) != "1":
                a = self.with_row(a, i)
        return a

    def with_row(self, a: Affine, dim: int) -> Affine:
        """Return a map whose one row is along a dim of its value that has one element."""
        if a.mixed is None or ROW in a.dims or a.dims[dim] != ONE or a.weight is None:
            raise NotOneLoop
        weight = self.writer.of_turns(aten.squeeze.dim, a.weight, dim)
        return replace(a, dims=(*a.dims[:dim], ROW, *a.dims[dim + 1 :]), weight=weight)

    def mixing(self, a: Affine, dim: int) -> Affine:
        """Return a map as one that mixes along a dim of the state: what multiplies elements is a diagonal."""
        if a.mixed == dim:
            return a
        size = self.state.shape[dim]
        if a.mixed is not None or dim not in a.dims or not isinstance(size, int):
            raise NotOneLoop
        at, weight = a.dims.index(dim), self.eye(size)
        if a.weight is not None:
            rows = self.writer.of_turns(
                aten.movedim.int, self.writer.ranked(a.weight, len(a.dims)), at, len(a.dims) - 1
            )
            weight = self.times(
                Turns(self.writer.insert(aten.unsqueeze.default, rows.node, -1), rows.is_shared), weight
            )
        weight = self.writer.ranked(weight, len(a.dims) + 1)
        return replace(a, dims=(*a.dims[:at], ROW, *a.dims[at + 1 :]), weight=weight, mixed=dim)

    def contracted(self, a: Affine, dim: int) -> Affine:
        """Return a map whose rows are along a dim of the value, over which it is summed."""
        label = a.dims[dim]
        if label == ONE:
            return self.with_row(a, dim)
        return a if label == ROW else self.mixing(a, label)

    def expanded(self, a: Affine, like: Any) -> Turns | None:
        """Return the offset in the shape of the value."""
        return None if a.offset is None else Turns(self.writer.each(a.offset, self.count, like.shape))

    def reduced(self, call: Call, a: Affine) -> Affine:
        """Return the sum or the mean along a dim."""
        dims, is_kept = [d % len(a.dims) for d in call["dim"] or ()], bool(call["keepdim"])
        if len(dims) != 1 or a.dims[dims[0]] == ONE or call["dtype"] is not None:
            raise NotOneLoop
        a, offset = self.contracted(a, dims[0]), self.expanded(a, call.tensor("self"))
        assert a.weight is not None
        weight = Turns(self.writer.insert(call.target, a.weight.node, [-2], True), a.weight.is_shared)
        kept = a.dims if is_kept else (*a.dims[: dims[0]], *a.dims[dims[0] + 1 :])
        return Affine(kept, weight, None if offset is None else apply(self.writer, call, {"self": offset}), a.mixed)

    def product(self, call: Call, operands: dict[str, Turns | Affine]) -> Affine:
        """Return a matrix times a map, or a map times a matrix."""
        (first, a), (second, b) = operands.items()
        if isinstance(a, Turns) == isinstance(b, Turns):
            raise NotOneLoop
        name, at = (
            (second, len(call.shape(second)) - 2) if isinstance(a, Turns) else (first, len(call.shape(first)) - 1)
        )
        matrix, given = (a, b) if isinstance(a, Turns) else (b, a)
        assert isinstance(matrix, Turns) and isinstance(given, Affine)
        if not 2 <= matrix.dims <= len(given.dims):
            raise NotOneLoop
        offset = self.expanded(given, call.tensor(name))
        if offset is not None:
            pair = {n: x if isinstance(x, Turns) else offset for n, x in operands.items()}
            offset = apply(self.writer, call, pair)
        given = self.contracted(given, at)
        if any(
            given.dims[i] == ONE and str(size) != "1"
            for i, size in enumerate(matrix.shape[:-2], len(given.dims) - matrix.dims)
        ):
            raise NotOneLoop
        rows = self.writer.ranked(matrix, len(given.dims))
        if given is not b and matrix is b:
            rows = Turns(self.writer.insert(aten.transpose.int, rows.node, -2, -1), rows.is_shared)
        rows = Turns(self.writer.insert(aten.unsqueeze.default, rows.node, -3), rows.is_shared)
        assert given.weight is not None
        return replace(given, weight=self.writer.elementwise(aten.matmul.default, rows, given.weight), offset=offset)

    def moved(self, call: Call, a: Affine) -> Affine:
        """Return a map whose value has its dims in another order, or dims of size 1 more or less."""
        order: Sequence[int] = list(range(len(a.dims)))
        match call.target:
            case aten.transpose.int | aten.swapaxes.default | aten.mT.default:
                names = list(call.arguments)[1:]
                i, j = (int(call[n]) % len(order) for n in names) if names else (len(order) - 2, len(order) - 1)
                order = [j if x == i else i if x == j else x for x in order]
            case aten.permute.default:
                order = [int(d) % len(order) for d in call["dims"]]
            case aten.unsqueeze.default:
                return self.unsqueezed(a, int(call["dim"]) % (len(order) + 1))
            case aten.squeeze.dim:
                return self._squeezed(call, a, int(call["dim"]) % len(order))
            case _:
                raise NotOneLoop
        offset = None if a.offset is None else self.writer.permuted(a.offset, order)
        weight = a.weight and self.writer.ranked(a.weight, len(order) if a.mixed is None else self._rank(a))
        if weight is not None:
            of_others = order if a.mixed is None else [a.others.index(x) for x in order if x in a.others]
            weight = self.writer.permuted(weight, [*of_others, *range(len(of_others), weight.dims)])
        return Affine(tuple(a.dims[x] for x in order), weight, offset, a.mixed)

    def _rank(self, a: Affine) -> int:
        return len(a.others) + (0 if a.mixed is None else 2)

    def unsqueezed(self, a: Affine, dim: int) -> Affine:
        """Return a map with a dim of size 1 more."""
        offset = a.offset and self.writer.of_turns(aten.unsqueeze.default, a.offset, dim)
        at = dim if a.mixed is None else sum(i < dim for i in a.others)
        weight = a.weight and self.writer.ranked(a.weight, self._rank(a))
        weight = weight and self.writer.of_turns(aten.unsqueeze.default, weight, at)
        return Affine((*a.dims[:dim], ONE, *a.dims[dim:]), weight, offset, a.mixed)

    def _squeezed(self, call: Call, a: Affine, dim: int) -> Affine:
        if a.dims[dim] not in (ONE, ROW) or str(call.shape("self")[dim]) != "1":
            raise NotOneLoop
        offset = a.offset and self.writer.of_turns(aten.squeeze.dim, a.offset, dim)
        weight = a.weight and self.writer.ranked(a.weight, self._rank(a))
        if a.dims[dim] == ONE:
            at = dim if a.mixed is None else a.others.index(dim)
            weight = weight and self.writer.of_turns(aten.squeeze.dim, weight, at)
        return Affine((*a.dims[:dim], *a.dims[dim + 1 :]), weight, offset, a.mixed)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Dims of a state as a recurrence wants them: the one that is mixed last but one, and last one for which all have one matrix.

    Attributes:
        order: the dims of the state in their new order.
        has_column: whether the last one is a dim of the state; otherwise it is one of size 1.
    """

    writer: Writer
    order: Sequence[int]
    has_column: bool = True

    def of(self, x: fx.Node) -> fx.Node:
        """Arrange `[turns, *state]`."""
        if list(self.order) != sorted(self.order):
            x = self.writer.insert(aten.permute.default, x, [0, *(dim + 1 for dim in self.order)])
        return x if self.has_column else self.writer.insert(aten.unsqueeze.default, x, -1)

    def undone(self, x: fx.Node) -> fx.Node:
        """Return `[turns, *state]`."""
        x = x if self.has_column else self.writer.insert(aten.squeeze.dim, x, -1)
        if list(self.order) == sorted(self.order):
            return x
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self.writer.insert(aten.permute.default, x, [0, *(dim + 1 for dim in back)])


def write_recurrence(maps: Maps, step: Affine, begin: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    """Return the states with which turns begin, and those that they leave: `[turns, *state]` both.

    Args:
        step: the map of a turn.
        begin: the state before the first turn, or None for zeros.

    Raises:
        NotOneLoop: the map has other dims than the state, or adds nothing.
    """
    writer, rank = maps.writer, maps.state.dim()
    if step.offset is None or [step.mixed if x == ROW else x for x in step.dims] != list(range(rank)):
        raise NotOneLoop
    factor, arrangement = _factor(maps, step)
    given = arrangement.of(writer.each(step.offset, maps.count, maps.state.shape))
    if {value_of(x).dtype for x in (factor, given)} != {maps.state.dtype}:
        raise NotOneLoop
    by_matrix = step.mixed is not None
    if begin is not None:
        begin = writer.insert(aten.unsqueeze.default, begin, 0)
        first = writer.insert(aten.slice.Tensor, factor, 0, 0, 1)
        passed = writer.insert(aten.matmul.default if by_matrix else aten.mul.Tensor, first, arrangement.of(begin))
        given = writer.insert(aten.add.Tensor, given, _in_first_turn(maps, passed))
    left = arrangement.undone(writer.insert(cp.recurrence.default, factor, given, 0, by_matrix))
    before = writer.insert(aten.constant_pad_nd.default, left, [0, 0] * rank + [1, -1])
    if begin is not None:
        before = writer.insert(aten.add.Tensor, before, _in_first_turn(maps, begin))
    return before, left


def _factor(maps: Maps, step: Affine) -> tuple[fx.Node, Arrangement]:
    """Return the factors of all turns, and how states have to be arranged for them."""
    writer, rank = maps.writer, maps.state.dim()
    if step.mixed is None:
        weight = step.weight or maps.number(1)
        return writer.each(weight, maps.count, (*[1] * (rank - weight.dims), *weight.shape)), Arrangement(
            writer, range(rank)
        )
    assert step.weight is not None
    weight, others = step.weight, [x for x in range(rank) if x != step.mixed]
    shared = [i for i, size in enumerate(weight.shape[:-2]) if str(size) == "1"]
    columns = []
    if shared:
        weight = writer.of_turns(aten.squeeze.dim, weight, shared[-1])
        columns = [others.pop(shared[-1])]
    factor = writer.each(weight, maps.count, weight.shape)
    return factor, Arrangement(writer, [*others, step.mixed, *columns], has_column=bool(columns))


def _in_first_turn(maps: Maps, x: fx.Node) -> fx.Node:
    """Return something in the first turn, and zeros in the others."""
    writer = maps.writer
    with maps.state.fake_mode:  # type: ignore[attr-defined]
        turns = writer.insert(aten.arange.default, maps.count, device=maps.state.device)
    is_first = writer.insert(aten.eq.Scalar, turns, 0)
    for _ in range(value_of(x).dim() - 1):
        is_first = writer.insert(aten.unsqueeze.default, is_first, -1)
    return writer.insert(aten.where.ScalarOther, is_first, x, 0.0)
