"""Read: what the nodes of a graph compute becomes expressions, by one rule for each operator.

A node without a rule is a `Load` of itself when it holds integers or booleans, and unreadable when it holds floating-point
numbers. Nothing is guessed: a case that a rule does not cover raises `Unreadable`, and the node counts as one without a rule.
The rules are entered in `RULES` by the family modules, which `cpcompile.analysis.masks` imports.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.expression import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Affine,
    All,
    Any_,
    Choice,
    Compare,
    Expression,
    Load,
    Number,
    Quotient,
    Size,
    Truth,
    affine,
    coordinate,
)
from cpcompile.analysis.masks.held_tensors import SlopedTable, held
from cpcompile.analysis.masks.simplify import shifted, substitute
from cpcompile.ir.operator_call import Call, is_tensor, value_of


class Unreadable(Exception):
    """A rule does not cover the case."""


Rule = Callable[["Reader", Call], Expression]
ItemRule = Callable[["Reader", Call, int], Expression]
AnyRule = TypeVar("AnyRule", Rule, ItemRule)
RULES: dict[Any, Rule] = {}
# The rules of operators with several results, for one of them.
ITEM_RULES: dict[Any, ItemRule] = {}


def reads(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule for these operators."""
    return _entered(RULES, targets)


def reads_item(*targets: Any) -> Callable[[ItemRule], ItemRule]:
    """Register the rule for one result of these operators."""
    return _entered(ITEM_RULES, targets)


def _entered(rules: dict[Any, AnyRule], targets: tuple[Any, ...]) -> Callable[[AnyRule], AnyRule]:
    def register(rule: AnyRule) -> AnyRule:
        for target in targets:
            assert target not in rules, target
            rules[target] = rule
        return rule

    return register


def is_size_one(size: Any) -> bool:
    """Tell whether a size is known to be 1."""
    return statically_known_true(size == 1)


def is_index(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds integers or booleans."""
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


class Reader:
    """Reads the nodes of one graph, each once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
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
        if node.target is operator.getitem and node.args[0].target in ITEM_RULES:  # type: ignore[union-attr]
            return [n for n in node.args[0].all_input_nodes if is_tensor(n)]  # type: ignore[union-attr]
        return [n for n in node.all_input_nodes if is_tensor(n)] if node.target in RULES else []

    def evaluate(self, node: fx.Node) -> Expression | None:
        """Apply the rule for `node`, whose sources are read."""
        tensor = value_of(node)
        if not isinstance(tensor, torch.Tensor):
            return None
        rule = RULES.get(node.target)
        try:
            if node.op == "get_attr":
                return pinned(attribute(self.gm, node), tensor)
            of_buffer: Expression | SlopedTable | None = held(node)
            if of_buffer is not None and not isinstance(of_buffer, SlopedTable):
                return of_buffer
            if rule is not None:
                value = pinned(rule(self, Call.of(node)), tensor)
                return pinned(loaded(node, tensor), tensor) if is_of_vectors(value, tensor) else value
            if node.target is operator.getitem and node.args[0].target in ITEM_RULES:  # type: ignore[union-attr]
                call = Call.of(node.args[0])  # type: ignore[arg-type]
                return pinned(ITEM_RULES[call.target](self, call, node.args[1]), tensor)  # type: ignore[arg-type]
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


def is_of_vectors(value: Expression, tensor: torch.Tensor) -> bool:
    """Tell whether an integer of each token is chosen from others: it is one value more, not a mask that they make."""
    if not isinstance(value, Choice):
        return False
    found = list(loads(value))
    own = [ZERO if is_size_one(size) else coordinate(dim) for dim, size in enumerate(tensor.shape)]
    is_own = all(list(load.indices) == own and value_of(load.node).shape == tensor.shape for load in found)
    return is_own and any(any(isinstance(atom, Load) for atom, _ in leaf.terms) for leaf in leaves(value))


def leaves(value: Expression) -> Iterator[Affine]:
    """Yield the integers that a value may be."""
    match value:
        case Affine():
            yield value
        case Choice(_, yes, no):
            yield from leaves(yes)
            yield from leaves(no)


def loads(value: Expression) -> Iterator[Load]:
    """Yield the loads in an expression."""
    match value:
        case Affine(_, terms):
            for atom, _ in terms:
                if isinstance(atom, Load):
                    yield atom
                elif isinstance(atom, Quotient):
                    yield from loads(atom.value)
        case Compare(_, number):
            yield from loads(number)
        case Truth(load):
            yield load
        case All(parts) | Any_(parts):
            for part in parts:
                yield from loads(part)
        case Choice(condition, yes, no):
            for member in (condition, yes, no):
                yield from loads(member)


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
