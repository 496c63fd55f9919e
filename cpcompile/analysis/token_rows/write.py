"""Write: the graph of a region for some tokens, operator by operator."""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.gradient_flow import unrecorded
from cpcompile.analysis.token_rows.region import NotByRowsError, RowRegion, Rows, static
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_SAME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.self,
}
_VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
# Operators on one of the inner dims, their argument `dim`.
_ALONG = {
    aten.log_softmax.int,
    aten.softmax.int,
    aten._log_softmax.default,
    aten._softmax.default,
    aten.slice.Tensor,
    aten.gather.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.logsumexp.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.argmax.default,
}
# Products of rows with a weight, by the name of the rows.
PRODUCTS = {
    aten.linear.default: "input",
    aten.addmm.default: "mat1",
    aten.mm.default: "self",
    aten.matmul.default: "self",
}
_PIECES = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_chunk.default}
_LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default}
_NONE, _SUM = 0, 2  # at::Reduction


class Writer:
    """Writes the graph for some tokens, operator by operator."""

    def __init__(self, source: fx.Node, is_constant: Callable[[fx.Node], bool]) -> None:
        shape = tuple(value_of(source).shape)
        self.region = RowRegion(source, {source: Rows(shape[:-1], static(shape[-1:]))})
        self.is_constant = is_constant
        self.rows, self.graph, self.made = self.region.rows, self.region.graph, self.region.made
        self.made[source] = self.graph.placeholder("value")
        self.region.unrecorded = unrecorded(source.graph)
        if source in self.region.unrecorded:
            raise NotByRowsError

    def has_rows(self, node: fx.Node) -> bool:
        """Write an operator, if it can be, and tell whether it computes rows."""
        if node.op == "call_function" and node.target not in PRODUCTS:
            with contextlib.suppress(NotByRowsError):
                self.add(node)
        return self.rows.get(node) is not None

    def add(self, node: fx.Node) -> None:
        """Write an operator.

        Raises:
            NotByRowsError: it does not compute rows from rows, or where gradients are off.
        """
        if node in self.region.unrecorded:
            raise NotByRowsError
        if node.target is operator.getitem and node.args[0] in self.rows:
            parent, index = node.args
            of = self._of(parent)  # type: ignore[arg-type]
            self.made[node] = self.graph.call_function(operator.getitem, (self.made[parent], index))  # type: ignore[index]
            self.rows[node] = of.of_inner(value_of(node).shape[len(of.lead) :])
        elif isinstance(node.target, torch._ops.OpOverload):
            self.rows[node] = self._write(Call.of(node))
        else:
            raise NotByRowsError

    def _write(self, call: Call) -> Rows | None:
        target = call.target
        if target in PRODUCTS:
            return self._product(call)
        if target in _PIECES:
            return self._pieces(call)
        if not is_tensor(call.node):
            raise NotByRowsError
        if target in _VIEWS:
            return self._view(call)
        if target in _ALONG:
            return self._along(call)
        if target in _LOSSES:
            return self._loss(call)
        if target is aten.sum.default:
            self._emit(call, {"self": self._inside(call["self"])})
            return None
        is_pointwise = torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
        if (is_pointwise or target in _SAME) and not target._schema.is_mutable:
            return self._pointwise(call)
        raise NotByRowsError

    def _emit(self, call: Call, changes: dict[str, Any]) -> None:
        args, kwargs = call.rebound(changes)
        self.made[call.node] = self.graph.call_function(call.target, args, kwargs)

    def _inside(self, node: Any) -> fx.Node:
        """Return what stands for the rows of a node."""
        if not isinstance(node, fx.Node) or self.rows.get(node) is None:
            raise NotByRowsError
        return self.made[node]

    def _of(self, node: fx.Node) -> Rows:
        rows = self.rows.get(node)
        if rows is None:
            raise NotByRowsError
        return rows

    def _given(self, node: fx.Node, num_lead: int = 0) -> fx.Node:
        """Return what stands for a value from elsewhere, the first dims of which may be those of the tokens."""
        if (
            node in self.rows
            or not self.is_constant(node)
            or self.region.num_lead.setdefault(node, num_lead) != num_lead
        ):
            raise NotByRowsError
        given = self.region.given_rows if num_lead else self.region.given_others
        if node not in given:
            given[node] = self.graph.placeholder("given")
        return given[node]

    def _operand(self, node: fx.Node, lead: tuple[Any, ...], num_inner: int) -> tuple[fx.Node, int]:
        """Return what stands for an operand that is broadcast to rows, and how many inner dims it has."""
        if node in self.rows:
            of = self._of(node)
            if not same(of.lead, lead):
                raise NotByRowsError
            return self.made[node], len(of.inner)
        shape = tuple(value_of(node).shape)
        if len(shape) <= num_inner:
            return self._given(node), len(shape)
        before, inner = shape[: len(shape) - num_inner], static(shape[len(shape) - num_inner :])
        if same(before, lead):
            return self._given(node, len(lead)), num_inner
        if all(size == 1 for size in static(before)):
            made = self._given(node)
            return self.graph.call_function(aten.reshape.default, (made, list(inner))), num_inner
        raise NotByRowsError

    def _pointwise(self, call: Call) -> Rows:
        known = [self._of(x) for _, x in call.operands() if x in self.rows]
        shape = tuple(call.result.shape)
        lead = known[0].lead
        num_inner = len(shape) - len(lead)
        if num_inner < 0 or not same(shape[: len(lead)], lead):
            raise NotByRowsError
        changes = {}
        for name, node in call.operands():
            made, has = self._operand(node, lead, num_inner)
            if node in self.rows and has != num_inner:
                raise NotByRowsError  # its tokens would meet another dim
            changes[name] = made
        self._emit(call, changes)
        return known[0].of_inner(shape[len(lead) :])

    def _view(self, call: Call) -> Rows:
        of, shape = self._of(call["self"]), tuple(call.result.shape)
        size, num_inner = math.prod(of.inner), 0
        while of.inner and math.prod(static(shape[len(shape) - num_inner :])) != size:
            num_inner += 1
            if num_inner > len(shape):
                raise NotByRowsError
        inner = static(shape[len(shape) - num_inner :])
        made = self._inside(call["self"])
        self.made[call.node] = self.graph.call_function(aten.reshape.default, (made, [-1, *inner]))
        num_lead = len(shape) - num_inner
        if num_lead == 1:
            return Rows(shape[:1], inner, (-1,))
        if "size" not in call and "shape" not in call:
            raise NotByRowsError
        return Rows(shape[:num_lead], inner, tuple(call["size" if "size" in call else "shape"][:num_lead]))

    def _along(self, call: Call) -> Rows:
        of, result = self._of(call["self"]), tuple(call.result.shape)
        if call.target is aten.slice.Tensor and takes_all(
            call
        ):  # of the tokens of a rank: the lengths are those of the whole
            self.made[call.node] = self._inside(call["self"])
            return replace(of, lead=result[: len(of.lead)])
        rank = len(of.lead) + len(of.inner) + (call.target is aten.unsqueeze.default)
        dims = call["dim"] if isinstance(call["dim"], list | tuple) else [call["dim"]]
        if not dims or None in dims or min(int(d) % rank for d in dims) < len(of.lead):
            raise NotByRowsError
        moved = [int(d) % rank - len(of.lead) + 1 for d in dims]
        changes: dict[str, Any] = {"self": self._inside(call["self"])}
        changes["dim"] = moved if isinstance(call["dim"], list | tuple) else moved[0]
        for name, node in call.operands():
            if name != "self":  # the index of a gather
                changes[name], has = self._operand(node, of.lead, len(of.inner))
                if has != len(of.inner):
                    raise NotByRowsError
        self._emit(call, changes)
        return of.of_inner(result[len(of.lead) :])

    def _product(self, call: Call) -> Rows:
        """Write a product of rows with a weight."""
        name = PRODUCTS[call.target]
        of = self._of(call[name])
        others = {key: x for key, x in call.operands() if key != name}
        if len(of.inner) != 1 or any(x in self.rows or value_of(x).dim() > 2 for x in others.values()):
            raise NotByRowsError
        self._emit(call, {name: self.made[call[name]], **{key: self._given(x) for key, x in others.items()}})
        return of.of_inner(tuple(call.result.shape)[len(of.lead) :])

    def _pieces(self, call: Call) -> Rows:
        of = self._of(call["self"])
        dim = int(call["dim"]) % (len(of.lead) + len(of.inner))
        if dim < len(of.lead):
            raise NotByRowsError
        self._emit(call, {"self": self.made[call["self"]], "dim": dim - len(of.lead) + 1})
        return of

    def _loss(self, call: Call) -> Rows | None:
        of = self._of(call["self"])
        if len(of.lead) != 1 or len(of.inner) != 1 or call["reduction"] not in (_NONE, _SUM):
            raise NotByRowsError
        rank = len(call.shape("target")) - 1
        target, _ = self._operand(call["target"], of.lead, rank)
        changes = {"self": self._inside(call["self"]), "target": target}
        if call["weight"] is not None:
            changes["weight"] = self._given(call["weight"])
        self._emit(call, changes)
        return of.of_inner(()) if call["reduction"] == _NONE else None


def takes_all(call: Call) -> bool:
    """Tell whether a slice is the whole operand."""
    return call["start"] in (None, 0) and call["end"] in (None, sys.maxsize) and call["step"] == 1


def same(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Tell whether sizes are known to be equal."""
    return len(sizes) == len(others) and all(map(_is_same, sizes, others))


def _is_same(size: Any, other: Any) -> bool:
    if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(size.node.expr == other.node.expr)
    return isinstance(size, int) and isinstance(other, int) and size == other
