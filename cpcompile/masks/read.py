"""Read: what the nodes of a graph compute becomes expressions, by one rule for each operator.

A node without a rule is a `Load` of itself when it holds integers or booleans, and unreadable when it holds floating-point
numbers. Nothing is guessed: a case that a rule does not cover raises `Unreadable`, and the node counts as one without a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.call import Call, is_tensor, value_of
from cpcompile.masks.expression import (
    COMPARISONS,
    FALSE,
    FLOAT_COMPARISONS,
    ONE,
    TRUE,
    ZERO,
    Affine,
    Boolean,
    Expression,
    Load,
    Number,
    Size,
    Truth,
    Value,
    affine,
    as_boolean,
    as_value,
    both,
    choose,
    compare,
    coordinate,
    either,
    is_natural,
    map_leaves,
    negated,
    shifted,
    substitute,
)

aten = torch.ops.aten

# Index arithmetic in a narrower type can wrap around.
_INDEX_DTYPES = (torch.int64, torch.int32)


class Unreadable(Exception):
    """A rule does not cover the case."""


Rule = Callable[["Reader", Call], Expression]
RULES: dict[Any, Rule] = {}


def reads(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule for these operators."""

    def register(rule: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, target
            RULES[target] = rule
        return rule

    return register


def is_size_one(size: Any) -> bool:
    """Tell whether a size is known to be 1."""
    return statically_known_true(size == 1)


def is_index(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds integers or booleans."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def rounded(value: float, dtype: torch.dtype) -> Number:
    """Return the constant as `dtype` holds it."""
    return Number(float(torch.tensor(value, dtype=torch.float64).to(dtype)))


class Reader:
    """Reads the nodes of one graph, each once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.written = set(written_storages(gm))
        self.expressions: dict[fx.Node, Expression | None] = {}

    def read(self, node: fx.Node) -> Expression | None:
        """Return what `node` holds over its own coordinates, or None for what is not an expression."""
        stack = [node]
        while stack:
            top = stack[-1]
            waiting = [] if top in self.expressions else [n for n in self.sources(top) if n not in self.expressions]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in self.expressions:
                self.expressions[top] = self.evaluate(top)
        return self.expressions[node]

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that the rule for `node` reads."""
        return [n for n in node.all_input_nodes if is_tensor(n)] if node.target in RULES else []

    def evaluate(self, node: fx.Node) -> Expression | None:
        """Apply the rule for `node`, whose sources are read."""
        tensor = value_of(node)
        if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage()._cdata in self.written:
            return None
        rule = RULES.get(node.target)
        try:
            if node.op == "get_attr":
                return pinned(attribute(self.gm, node), tensor)
            if rule is not None:
                return pinned(rule(self, Call.of(node)), tensor)
        except Unreadable:
            pass
        return pinned(loaded(node, tensor), tensor) if is_index(tensor) else None

    def operand(self, argument: Any, rank: int | None = None) -> Expression:
        """Return the expression of an argument, a tensor or a number, broadcast to `rank` dims if given."""
        if is_tensor(argument):
            value = self.expressions[argument]
            if value is None:
                raise Unreadable
            return value if rank is None else shifted(value, rank - value_of(argument).dim())
        return scalar(argument)


def written_storages(gm: fx.GraphModule) -> Iterator[int]:
    """Yield the storages that some operator writes to: what they hold depends on the time."""
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            call = Call.of(node)
            for argument in node.target._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for _, operand in Call(node, {argument.name: call[argument.name]}).operands():
                        yield value_of(operand).untyped_storage()._cdata


def loaded(node: fx.Node, tensor: torch.Tensor) -> Expression:
    """Return the elements of a tensor that is not read further."""
    load = Load(node, tuple(coordinate(dim) for dim in range(tensor.dim())))
    return Truth(load) if tensor.dtype is torch.bool else affine(load)


def pinned(value: Expression, tensor: torch.Tensor) -> Expression:
    """Return the expression with 0 for the coordinates along dims of size 1."""
    ones = {dim: ZERO for dim, size in enumerate(tensor.shape) if is_size_one(size)}
    return substitute(value, ones) if ones else value


def attribute(gm: fx.GraphModule, node: fx.Node) -> Expression:
    """Return a constant of the trace that has one element."""
    value = getattr(gm, str(node.target), None)
    if type(value) is not torch.Tensor or value.numel() != 1:
        raise Unreadable
    return scalar(value.item())


def scalar(argument: Any) -> Expression:
    """Return a number of the graph: a Python number, or a node that computes a symbolic size."""
    value = value_of(argument) if isinstance(argument, fx.Node) else argument
    if isinstance(value, bool):
        return TRUE if value else FALSE
    if isinstance(value, int):
        return Affine(value)
    if isinstance(value, float):
        return Number(value)
    if isinstance(value, torch.SymInt):
        return size_of(value)
    raise Unreadable


def size_of(size: Any) -> Affine:
    """Return a size as an integer over symbols."""
    if isinstance(size, int):
        return Affine(size)
    total = ZERO
    for symbol, coefficient in size.node.expr.as_coefficients_dict().items():
        if not coefficient.is_Integer:
            raise Unreadable
        total += (ONE if symbol == 1 else affine(Size(symbol))) * int(coefficient)
    return total


def convert(value: Expression, dtype: torch.dtype) -> Expression:
    """Return the expression as `dtype`."""
    if dtype is torch.bool:
        return as_boolean(value)

    def leaf(number: Value) -> Value:
        if dtype.is_floating_point:
            if isinstance(number, Affine):
                if number.terms:
                    raise Unreadable
                number = Number(float(number.constant))
            assert isinstance(number, Number)
            return rounded(number.value, dtype)
        if isinstance(number, Number):
            number = Affine(integer(number.value))
        if isinstance(number, Affine) and number.terms and dtype not in _INDEX_DTYPES:
            raise Unreadable
        return number

    return map_leaves(leaf, as_value(value))


def integer(value: float) -> int:
    """Return a floating-point number that is an integer as one."""
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        raise Unreadable
    return int(value)


def result_of(call: Call) -> torch.Tensor:
    """Return the fake result, a tensor."""
    assert isinstance(call.result, torch.Tensor)
    return call.result


@reads(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(reader: Reader, call: Call) -> Expression:
    if result_of(call).dtype not in _INDEX_DTYPES:
        raise Unreadable
    start = number_of(reader, call.arguments.get("start", 0))
    step = call.arguments.get("step", 1)
    if not isinstance(step, int):
        raise Unreadable
    return start + coordinate(0) * step


def number_of(reader: Reader, argument: Any) -> Affine:
    """Return an integer argument."""
    value = reader.operand(argument)
    if not isinstance(value, Affine):
        raise Unreadable
    return value


@reads(
    aten.ones.default,
    aten.new_ones.default,
    aten.ones_like.default,
)
def ones(reader: Reader, call: Call) -> Expression:
    return convert(ONE, result_of(call).dtype)


@reads(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def zeros(reader: Reader, call: Call) -> Expression:
    return convert(ZERO, result_of(call).dtype)


@reads(aten.full.default, aten.new_full.default, aten.full_like.default)
def full(reader: Reader, call: Call) -> Expression:
    return convert(reader.operand(call["fill_value"]), result_of(call).dtype)


@reads(aten.scalar_tensor.default)
def scalar_tensor(reader: Reader, call: Call) -> Expression:
    return convert(reader.operand(call["s"]), result_of(call).dtype)


@reads(
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
def conversion(reader: Reader, call: Call) -> Expression:
    return convert(reader.operand(next(call.operands())[1]), result_of(call).dtype)


@reads(
    *(
        getattr(packet, overload)
        for name in COMPARISONS
        for packet in (getattr(aten, name),)
        for overload in ("Tensor", "Scalar")
    )
)
def comparison(reader: Reader, call: Call) -> Expression:
    name = call.target._schema.name.partition("::")[2]

    def leaf(a: Value, b: Value) -> Boolean:
        if isinstance(a, Number) and isinstance(b, Number):
            return TRUE if FLOAT_COMPARISONS[name](a.value, b.value) else FALSE
        return COMPARISONS[name](exact(a), exact(b))

    return map_leaves(leaf, *(as_value(operand) for operand in operands(reader, call)))


def exact(value: Value) -> Affine:
    """Return a number that is an integer as one."""
    if isinstance(value, Number):
        return Affine(integer(value.value))
    assert isinstance(value, Affine)
    return value


def operands(reader: Reader, call: Call) -> list[Expression]:
    """Return the two operands of a pointwise operator."""
    rank = result_of(call).dim()
    return [reader.operand(call[name], rank) for name in list(call.arguments)[:2]]


@reads(
    aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Scalar, aten.bitwise_and.Scalar
)
def conjunction(reader: Reader, call: Call) -> Expression:
    return both(*booleans(reader, call))


@reads(aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Scalar, aten.bitwise_or.Scalar)
def disjunction(reader: Reader, call: Call) -> Expression:
    return either(*booleans(reader, call))


@reads(aten.__xor__.Tensor, aten.bitwise_xor.Tensor, aten.logical_xor.default)
def exclusive(reader: Reader, call: Call) -> Expression:
    a, b = booleans(reader, call)
    return either(both(a, negated(b)), both(negated(a), b))


def booleans(reader: Reader, call: Call) -> list[Boolean]:
    """Return the two operands of a logical operator, as booleans."""
    if result_of(call).dtype is not torch.bool:
        raise Unreadable
    return [as_boolean(operand) for operand in operands(reader, call)]


@reads(aten.logical_not.default, aten.bitwise_not.default)
def negation(reader: Reader, call: Call) -> Expression:
    if result_of(call).dtype is not torch.bool:
        raise Unreadable
    return negated(as_boolean(reader.operand(call["self"])))


def arithmetic(
    reader: Reader, call: Call, integers: Callable[[Affine, Affine], Affine], floats: Callable[[float, float], float]
) -> Expression:
    """Apply a binary operator to the leaves of both operands."""
    dtype = result_of(call).dtype
    if not dtype.is_floating_point and dtype not in _INDEX_DTYPES:
        raise Unreadable

    def leaf(a: Value, b: Value) -> Value:
        if isinstance(a, Affine) and isinstance(b, Affine):
            return integers(a, b)
        assert isinstance(a, Number) and isinstance(b, Number)
        return rounded(floats(a.value, b.value), dtype)

    return map_leaves(leaf, *(as_value(convert(operand, dtype)) for operand in operands(reader, call)))


@reads(aten.add.Tensor, aten.add.Scalar)
def add(reader: Reader, call: Call) -> Expression:
    if call["alpha"] != 1:
        raise Unreadable
    if result_of(call).dtype is torch.bool:
        return either(*booleans(reader, call))
    return arithmetic(reader, call, lambda a, b: a + b, lambda a, b: a + b)


@reads(aten.sub.Tensor, aten.sub.Scalar)
def sub(reader: Reader, call: Call) -> Expression:
    if call["alpha"] != 1:
        raise Unreadable
    return arithmetic(reader, call, lambda a, b: a - b, lambda a, b: a - b)


@reads(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(reader: Reader, call: Call) -> Expression:
    if call["alpha"] != 1:
        raise Unreadable
    return arithmetic(reader, call, lambda a, b: b - a, lambda a, b: b - a)


@reads(aten.mul.Tensor, aten.mul.Scalar)
def mul(reader: Reader, call: Call) -> Expression:
    if result_of(call).dtype is torch.bool:
        return both(*booleans(reader, call))
    return arithmetic(reader, call, product, lambda a, b: a * b)


def product(a: Affine, b: Affine) -> Affine:
    """Return the product, of which one factor is a constant."""
    if a.terms and b.terms:
        raise Unreadable
    return a * b.constant if a.terms else b * a.constant


@reads(aten.neg.default)
def neg(reader: Reader, call: Call) -> Expression:
    def leaf(value: Value) -> Value:
        if isinstance(value, Number):
            return Number(-value.value)
        assert isinstance(value, Affine)
        return -value

    if is_index(result_of(call)) and result_of(call).dtype not in _INDEX_DTYPES:
        raise Unreadable
    return map_leaves(leaf, as_value(reader.operand(call["self"])))


@reads(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    condition, yes, no = (reader.operand(call[name], result.dim()) for name in ("condition", "self", "other"))
    return choose(as_boolean(condition), convert(yes, result.dtype), convert(no, result.dtype))


@reads(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    rest, condition, fill = (reader.operand(call[name], result.dim()) for name in ("self", "mask", "value"))
    return choose(as_boolean(condition), convert(fill, result.dtype), rest)


@reads(aten.tril.default, aten.triu.default)
def triangle(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    above = coordinate(result.dim() - 1) - coordinate(result.dim() - 2) - number_of(reader, call["diagonal"])
    kept = compare("le", above if call.target is aten.tril.default else -above)
    return choose(kept, reader.operand(call["self"]), convert(ZERO, result.dtype))


@reads(
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def regroup(reader: Reader, call: Call) -> Expression:
    """Dims of size 1 come and go; merging or splitting others is not read."""
    _, source = next(call.operands())
    old, new = (wide_dims(value_of(node)) for node in (source, call.node))
    if len(old) != len(new) or not all(statically_known_true(a == b) for (_, a), (_, b) in zip(old, new, strict=True)):
        raise Unreadable
    moves = {dim: coordinate(to) for (dim, _), (to, _) in zip(old, new, strict=True)}
    return substitute(reader.operand(source), moves)


def wide_dims(tensor: torch.Tensor) -> list[tuple[int, Any]]:
    """Return (dim, size) of the dims that are not known to have size 1."""
    return [(dim, size) for dim, size in enumerate(tensor.shape) if not is_size_one(size)]


@reads(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(reader: Reader, call: Call) -> Expression:
    return reader.operand(call["self"], result_of(call).dim())


@reads(aten.permute.default, aten.transpose.int, aten.t.default)
def permute(reader: Reader, call: Call) -> Expression:
    rank = result_of(call).dim()
    order = list(range(rank))
    if "dims" in call:
        order = [dim % rank for dim in call["dims"]]
    elif rank > 1:
        first, second = (call.dim("dim0", "self"), call.dim("dim1", "self")) if "dim0" in call else (0, 1)
        order[first], order[second] = second, first
    return substitute(reader.operand(call["self"]), {old: coordinate(new) for new, old in enumerate(order)})


@reads(aten.slice.Tensor)
def slice_(reader: Reader, call: Call) -> Expression:
    dim = call.dim("dim", "self")
    start = from_front(reader, call["start"] or 0, call.shape("self")[dim])
    return substitute(reader.operand(call["self"]), {dim: start + coordinate(dim) * call["step"]})


def from_front(reader: Reader, index: Any, size: Any) -> Affine:
    """Return the start of a slice, counted from the front."""
    if isinstance(index, int) and isinstance(size, int):
        return Affine(index if index >= 0 else max(index + size, 0))
    start = number_of(reader, index)
    if not is_natural(start):
        raise Unreadable
    return start


@reads(aten.select.int)
def select(reader: Reader, call: Call) -> Expression:
    dim, size = call.dim("dim", "self"), call.shape("self")[call.dim("dim", "self")]
    index = number_of(reader, call["index"])
    if isinstance(call["index"], int) and call["index"] < 0:
        index += size_of(size)
    moves = {d: coordinate(d - 1) for d in range(dim + 1, len(call.shape("self")))}
    return substitute(reader.operand(call["self"]), {**moves, dim: index})


@reads(aten.index.Tensor)
def index(reader: Reader, call: Call) -> Expression:
    """Neighbouring dims are indexed by integers that cannot be negative."""
    indices = [i for i in call["indices"] if i is not None]
    first = next(dim for dim, i in enumerate(call["indices"]) if i is not None)
    if call["indices"][first : first + len(indices)] != indices or not all(is_readable_index(i) for i in indices):
        raise Unreadable
    rank = max(value_of(i).dim() for i in indices)
    moves = {}
    for dim, i in enumerate(indices, first):
        value = reader.operand(i, rank)
        if not isinstance(value, Affine) or not is_natural(value):
            raise Unreadable
        moves[dim] = as_affine(shifted(value, first))
    for dim in range(first + len(indices), len(call.shape("self"))):
        moves[dim] = coordinate(dim - len(indices) + rank)
    return substitute(reader.operand(call["self"]), moves)


def is_readable_index(node: fx.Node) -> bool:
    """Tell whether a tensor indexes by integers; booleans select."""
    return value_of(node).dtype in _INDEX_DTYPES


def as_affine(value: Expression) -> Affine:
    """Return an integer."""
    assert isinstance(value, Affine)
    return value


@reads(aten.cat.default)
def cat(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    dim = call["dim"] % result.dim()
    return joined([(reader.operand(t), value_of(t).shape[dim]) for t in call["tensors"]], dim, result.dtype)


def joined(pieces: Sequence[tuple[Expression, Any]], dim: int, dtype: torch.dtype) -> Expression:
    """Return pieces with their sizes, one after the other along `dim`."""
    (first, size), *rest = pieces
    first = convert(first, dtype)
    if not rest:
        return first
    beyond = coordinate(dim) - size_of(size)
    others = substitute(joined(rest, dim, dtype), {dim: beyond})
    return choose(compare("le", beyond + ONE), first, others)


@reads(aten.pad.default, aten.constant_pad_nd.default)
def pad(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    value = reader.operand(call["self"])
    fill = convert(reader.operand(call["value"] or 0), result.dtype)
    if "mode" in call and call["mode"] != "constant":
        raise Unreadable
    for i in range(0, len(call["pad"]), 2):
        dim = result.dim() - 1 - i // 2
        before, after = (number_of(reader, amount) for amount in call["pad"][i : i + 2])
        if not (is_natural(before) and is_natural(after)):
            raise Unreadable
        inner = coordinate(dim) - before
        beyond = inner + ONE - size_of(call.shape("self")[dim])
        inside = both(*(compare("le", part) for part, amount in ((-inner, before), (beyond, after)) if amount != ZERO))
        value = choose(inside, substitute(value, {dim: inner}), fill)
    return value


@reads(aten.diff.default)
def diff(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    dim = call.dim("dim", "self")
    if call["n"] != 1 or result.dtype not in _INDEX_DTYPES:
        raise Unreadable
    tensors = [t for t in (call["prepend"], call["self"], call["append"]) if t is not None]
    pieces = [(reader.operand(t), value_of(t).shape[dim]) for t in tensors]
    whole = joined(pieces, dim, result.dtype)
    later = substitute(whole, {dim: coordinate(dim) + ONE})
    return map_leaves(lambda a, b: exact(a) - exact(b), as_value(later), as_value(whole))


@reads(aten.cumsum.default)
def cumsum(reader: Reader, call: Call) -> Expression:
    """The running sum of a constant; any other is loaded."""
    value = as_value(reader.operand(call["self"]))
    if not isinstance(value, Affine) or value.terms or result_of(call).dtype not in _INDEX_DTYPES:
        raise Unreadable
    return (coordinate(call.dim("dim", "self")) + ONE) * value.constant


def constant(reader: Reader, argument: Any) -> float | None:
    """Return the number that an argument is known to be: a Python number, or a tensor filled with one."""
    value = argument
    if isinstance(argument, fx.Node):
        if not is_tensor(argument):
            return None
        value = reader.read(argument)
    match value:
        case int() | float():
            return float(value)
        case Affine(number, terms) if not terms:
            return float(number)
        case Number(number):
            return number
    return None
