"""Operators that cut, pad and join along the tokens: most tokens keep their slots, and only their range changes."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from cpcompile.ir.operator_call import Call, expression
from cpcompile.ir.placement import FULL, Placement, Sharded
from cpcompile.rules import dims, scatter  # noqa: F401  (the rules that are extended here)
from cpcompile.rules.along_tokens import added_up, addend_of, along_tokens, before_end, holds_tokens_only, moved
from cpcompile.rules.registry import Decision, Lowering, no_rule, register
from cpcompile.rules.views import quotient

aten, cp = torch.ops.aten, torch.ops.cpcompile


def picked(call: Call, at: Sharded, start: Any, count: int, length: Any, *, squeezed: bool = False) -> Decision | None:
    """Return the decision to read `count` tokens from `start` (an expression) on: their owners send them to all ranks."""
    if not can_pick(at, start, length):
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        new = pick(writer, at, start, count, length)
        if squeezed:
            new = writer.insert(aten.squeeze.dim, new, at.dim)
        return [added_up(writer, new)]

    return Decision({"self": at}, (addend_of(call.result),), lower=lower)


def can_pick(at: Sharded, start: Any, length: Any) -> bool:
    """Tell whether the place of the first token that is picked is a number from the start or from the end."""
    first = start + at.front
    return not at.reaches_outside and (first.is_Integer or sympy.expand(expression(length) - first).is_Integer)


def pick(writer: Lowering, at: Sharded, start: Any, count: int, length: Any) -> fx.Node:
    """Write the addend of `count` tokens from `start` on."""
    first = start + at.front
    begin = int(first) if first.is_Integer else before_end(writer, int(sympy.expand(expression(length) - first)))
    arguments = (writer.call["self"], at.dim, begin, count, writer.length, *writer.axis)
    return writer.insert(cp.pick_tokens.default, *arguments)


def is_few(count: Any, length: Any) -> bool:
    """Tell whether `count` tokens are few enough to be sent to all ranks: a number that does not grow with the length."""
    return bool(count.is_Integer and count > 0 and (not isinstance(length, int) or 4 * count <= length))


def has_none(part: torch.Tensor, dim: int) -> bool:
    """Tell whether a part of the tokens has none of them: every rank has all of it, and no slots of others."""
    return bool(expression(part.shape[dim]) == 0)


def bounds(call: Call) -> tuple[sympy.Expr, sympy.Expr]:
    """Return where a slice of step 1 starts and stops, counted from the front."""
    dim, argument = call.dim("dim", "self"), call["start"]
    size, count = expression(call.shape("self")[dim]), expression(call.result.shape[dim])
    if size == count:
        return sympy.Integer(0), size
    first = place_of(argument, size)
    if first.is_Integer:
        first = max(first, sympy.Integer(0))
    return first, sympy.expand(first + count)


def place_of(argument: Any, size: sympy.Expr) -> sympy.Expr:
    """Return the place that an argument names along a dim of this size: a negative one is counted from the end."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else (argument or 0)
    place = expression(value)
    return sympy.expand(place + size if place.is_negative else place)


def sliced_off(call: Call) -> tuple[int, int] | None:
    """Return how many elements a slice leaves out at the start and at the end, or None where that is not one number."""
    front, stop = bounds(call)
    back = sympy.expand(expression(call.shape("self")[call.dim("dim", "self")]) - stop)
    if call["step"] != 1 or not (front.is_Integer and back.is_Integer) or front < 0 or back < 0:
        return None
    return int(front), int(back)


def holds_groups(call: Call, at: Sharded, length: Any) -> bool:
    """Tell whether the sharded dim has `at.inner` elements for each token, and nothing else."""
    return bool(expression(call.shape("self")[at.dim]) == expression(at.count(length)) * at.inner)


@dataclass(frozen=True, slots=True)
class SliceRule:
    """A slice along another dim leaves the tokens alone; along the tokens, most of them keep their slots, and a few are sent."""

    notation: str = "[a b] -> [a b'], when b is the tokens: a range of them, or a few that every rank gets"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        at = operands["self"]
        if at.dim != call.dim("dim", "self"):
            return Decision({"self": at}, (at,))
        off = sliced_off(call)
        decision = None
        if has_none(call.result, at.dim):
            decision = Decision({"self": at}, (FULL,), {"start": 0, "end": 0})
        elif off == (0, 0):
            decision = self._range(at, at)
        elif holds_tokens_only(call, "self", at, length) and call["step"] == 1:
            start, stop = bounds(call)
            count = sympy.expand(stop - start)
            if count.is_Integer and count > 0 and (not isinstance(length, int) or 4 * count <= length):
                decision = picked(call, at, start, int(count), length)
            elif off is not None:
                decision = self._range(at, at.with_range(at.front + off[0], at.back + off[1], at.outside))
        elif off is not None and not any(n % at.inner for n in off) and holds_groups(call, at, length):
            front, back = at.front + off[0] // at.inner, at.back + off[1] // at.inner
            decision = self._range(at, at.with_range(front, back, at.outside))
        if decision is None:
            raise no_rule(call, operands, "the slice of the tokens depends on their number", self.notation)
        return decision

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        if result.dim != call.dim("dim", "self"):
            return Decision({"self": result}, (result,))
        off = sliced_off(call)
        if off is None or off[0] > result.front or off[1] > result.back:
            return None
        return self._range(result.with_range(result.front - off[0], result.back - off[1]), result)

    def _range(self, at: Sharded, result: Sharded) -> Decision:
        return Decision({"self": at}, (result,), {"start": 0, "end": sys.maxsize})


register(SliceRule(), aten.slice.Tensor)


@along_tokens(
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.narrow.default,
)
def split(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """a range of the tokens for each part, or a few that every rank gets; of merged dims all tokens of some rows"""
    at = operands["self"]
    if not holds_tokens_only(call, "self", at, length):
        return split_rows(call, at, length)
    if at.reaches_outside or not holds_tokens_only(call, "self", at, length):
        return None
    size, start = expression(call.shape("self")[at.dim]), sympy.Integer(0)
    if "start" in call:
        given = call["start"].meta["val"] if isinstance(call["start"], fx.Node) else call["start"]
        start = expression(given) + (size if isinstance(given, int) and given < 0 else 0)
    placements: list[Placement] = []
    starts: list[Any] = []
    for part in call.results:
        count = expression(part.shape[at.dim])
        back = sympy.expand(size - start - count)
        starts.append(start)
        if has_none(part, at.dim):
            placements.append(FULL)
        elif is_few(count, length) and can_pick(at, start, length):
            placements.append(addend_of(part))
        elif start.is_Integer and back.is_Integer:
            placements.append(at.with_range(at.front + int(start), at.back + int(back)))
        else:
            return None
        start = sympy.expand(start + count)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        nodes = []
        for part, first, placement in zip(call.results, starts, placements, strict=True):
            if isinstance(placement, Sharded):
                nodes.append(writer.insert(aten.alias.default, writer.call["self"]))
            elif has_none(part, at.dim):
                nodes.append(writer.insert(aten.slice.Tensor, writer.call["self"], at.dim, 0, 0))
            else:
                nodes.append(added_up(writer, pick(writer, at, first, int(part.shape[at.dim]), length)))
        return nodes

    return Decision({"self": at}, tuple(placements), lower=lower)


def split_rows(call: Call, at: Sharded, length: Any) -> Decision | None:
    """Return the decision to split a dim `outer * tokens * inner` between its outer rows, each of which has all tokens."""
    if at.reaches_outside:
        return None
    row = sympy.expand(expression(at.count(length)) * at.inner)
    sizes = [quotient(expression(part.shape[at.dim]), row) for part in call.results]
    start = quotient(bounds(call)[0], row) if "start" in call else sympy.Integer(0)
    counts = [int(size) for size in sizes if size is not None and size.is_Integer]
    if start is None or not start.is_Integer or len(counts) < len(sizes):
        return None
    first = int(start)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        nodes, begin = [], first
        for count in counts:
            stop = begin + count
            ends = (slots(writer, at.inner * rows) for rows in (begin, stop))
            nodes.append(writer.insert(aten.slice.Tensor, writer.call["self"], at.dim, *ends))
            begin = stop
        return nodes

    return Decision({"self": at}, (at,) * len(counts), lower=lower)


def slots(writer: Lowering, count: int) -> fx.Node | int:
    """Return the graph argument for the slots of a rank, `count` times."""
    if count == 0:
        return 0
    return count * writer.local if isinstance(writer.local, int) else writer.insert(operator.mul, writer.local, count)


def constant_value(node: fx.Node) -> float | None:
    """Return the number that fills a tensor, if it is known."""
    fills = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "new_ones": 1.0, "ones_like": 1.0}
    passes_on = {"expand", "to", "clone", "unsqueeze", "view", "reshape", "contiguous", "alias", "detach", "slice"}
    while isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.partition("::")[2]
        if name in fills:
            return fills[name]
        if name in ("full", "new_full", "full_like"):
            value = Call.of(node)["fill_value"]
            return float(value) if isinstance(value, int | float) else None
        if name not in passes_on or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return None


@along_tokens(aten.constant_pad_nd.default, aten.pad.default)
def pad(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """more tokens in the range, all of one value"""
    at, amounts = operands["self"], list(call["pad"])
    if call.arguments.get("mode", "constant") != "constant" or not holds_tokens_only(call, "self", at, length):
        return None
    entry = 2 * (len(call.shape("self")) - 1 - at.dim)
    front, back = amounts[entry : entry + 2]
    value = float(call["value"] or 0.0)
    if not (isinstance(front, int) and isinstance(back, int)) or (at.reaches_outside and at.outside != value):
        return None
    amounts[entry : entry + 2] = [0, 0]
    result = at.with_range(at.front - front, at.back - back, value)
    takes_slots = (at.front > 0 and front > 0) or (at.back > 0 and back > 0)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        if any(amounts):
            return [writer.insert(aten.constant_pad_nd.default, writer.call["self"], amounts, value)]
        return [writer.insert(aten.alias.default, writer.call["self"])]

    return Decision({"self": at}, (result,), padding={"self": value} if takes_slots else {}, lower=lower)


@along_tokens(aten.slice_scatter.default)
def slice_scatter(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank writes those of its own tokens that are in the range"""
    at, dim = operands.get("self"), call.dim("dim", "self")
    if at is None or at.dim != dim or call["step"] != 1 or at.reaches_outside:
        return None
    if not holds_tokens_only(call, "self", at, length):
        return None
    size = expression(call.shape("self")[dim])
    start = place_of(call["start"], size)
    rest = sympy.expand(size - start - expression(call.shape("src")[dim]))
    if not (start.is_Integer and rest.is_Integer):
        return None
    source = at.with_range(at.front + int(start), at.back + int(rest))

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = writer.call["self"]
        position = writer.insert(cp.positions.default, x, writer.length, *writer.axis)
        is_behind = writer.insert(aten.ge.Scalar, position, source.front)
        is_before = writer.insert(aten.lt.Scalar, position, before_end(writer, source.back))
        is_inside = writer.insert(aten.logical_and.default, is_behind, is_before)
        is_inside = writer.insert(aten.view.default, is_inside, [-1, *[1] * (call.result.dim() - dim - 1)])
        return [writer.insert(aten.where.self, is_inside, writer.call["src"], x)]

    return Decision({"self": at, "src": source}, (at,), lower=lower)


@along_tokens(aten.repeat.default)
def repeat(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank repeats its own tokens: the copies are an outer factor of the dim"""
    at = operands["self"]
    return Decision({"self": at}, (replace(at, dim=at.dim + call.result.dim() - len(call.shape("self"))),))


@along_tokens(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank joins its own tokens of all operands; or a few tokens that every rank has go to their slots"""
    dim = int(call["dim"]) % call.result.dim()
    joined = [name for name, _ in call.operands() if call.result.dim() == 1 or call.shape(name) != (0,)]
    places = {operands.get(name) for name in joined}
    if len(places) == 1 and dim == operands[joined[0]].dim:
        return Decision(dict.fromkeys(joined, operands[joined[0]]), (operands[joined[0]],))
    if len(operands) != 1 or len({call.tensor(name).dtype for name in joined}) > 1:
        return None
    ((name, at),) = operands.items()
    sizes = {other: call.shape(other)[dim] for other in joined if other != name}
    is_few = all(isinstance(size, int) for size in sizes.values())
    if at.dim != dim or not is_few or not holds_tokens_only(call, name, at, length):
        return None
    first = joined.index(name)
    before, after = ([o for o in side if sizes[o]] for side in (joined[:first], joined[first + 1 :]))
    front = at.front - sum(sizes[other] for other in before)
    back = at.back - sum(sizes[other] for other in after)
    wanted: dict[str, Placement] = {**dict.fromkeys(joined, FULL), name: at}
    if front + back < 0 or at.reaches_outside:
        return padded(call, at, name, [*before, *after], wanted, front, back)
    start = front if front >= 0 and back >= 0 else min(max(front, 0), front + back)
    result = at.with_range(start, front + back - start)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        parts = dict(Call.operands(writer.call))
        x = parts[name]
        if start != front:
            x = moved(writer, x, at, front - start)
        place = start
        for other in before:
            x = writer.insert(cp.put_tokens.default, x, parts[other], dim, place, writer.length, *writer.axis)
            place += sizes[other]
        place = result.back + sum(sizes[other] for other in after)
        for other in after:
            begin = before_end(writer, place)
            x = writer.insert(cp.put_tokens.default, x, parts[other], dim, begin, writer.length, *writer.axis)
            place -= sizes[other]
        return [x if before or after else writer.insert(aten.alias.default, x)]

    return Decision(wanted, (result,), lower=lower)


def padded(
    call: Call, at: Sharded, name: str, others: Sequence[str], wanted: dict[str, Placement], front: int, back: int
) -> Decision | None:
    """Return the decision for a join that is longer than the sequence: what is joined must all be one number."""
    nodes = dict(call.operands())
    values = {constant_value(nodes[other]) for other in others}
    if at.reaches_outside:
        values.add(at.outside)
    (value, *rest) = values
    if value is None or rest:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        return [writer.insert(aten.alias.default, dict(writer.call.operands())[name])]

    return Decision(wanted, (at.with_range(front, back, value),), padding={name: value}, lower=lower)
