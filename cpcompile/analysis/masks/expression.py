"""Expressions: what a tensor holds at each place, written over the coordinates of the place.

`arange(n)[:, None] >= arange(n)` holds `Compare("le", d1 - d0)` at (d0, d1): integers are affine in coordinates and loads,
booleans are conjunctions and disjunctions of comparisons, and a `Choice` is a value that a boolean decides. A coordinate along
a dim of size 1 is always the constant 0. Comparisons, booleans and choices are made by the functions of `simplify.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True, slots=True)
class Coordinate:
    """The index along a dim, from 0."""

    dim: int


@dataclass(frozen=True, slots=True)
class Size:
    """A symbolic size, by its sympy expression."""

    symbol: Any


@dataclass(frozen=True, slots=True)
class Load:
    """The element of a tensor that is not read further, an integer or a boolean."""

    node: fx.Node
    indices: tuple[Affine, ...]


@dataclass(frozen=True, slots=True)
class Quotient:
    """An integer over a positive number, rounded down."""

    value: Affine
    divisor: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """The product of a floating-point element and an integer."""

    load: Load
    factor: Coordinate | Size | Load | Quotient


Atom = Coordinate | Size | Load | Quotient | Scaled


@dataclass(frozen=True, slots=True)
class Affine:
    """An integer: a constant and atoms with coefficients."""

    constant: int = 0
    terms: frozenset[tuple[Atom, int]] = frozenset()

    def __add__(self, other: Affine) -> Affine:
        coefficients = dict(self.terms)
        for atom, coefficient in other.terms:
            coefficients[atom] = coefficients.get(atom, 0) + coefficient
        terms = frozenset((atom, c) for atom, c in coefficients.items() if c)
        return Affine(self.constant + other.constant, terms)

    def __mul__(self, factor: int) -> Affine:
        return Affine(self.constant * factor, frozenset((atom, c * factor) for atom, c in self.terms if factor))

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine) -> Affine:
        return self + -other


@dataclass(frozen=True, slots=True)
class Number:
    """A floating-point constant."""

    value: float


@dataclass(frozen=True, slots=True)
class Compare:
    """`value <= 0`, `value == 0` or `value != 0`."""

    kind: str
    value: Affine


@dataclass(frozen=True, slots=True)
class Truth:
    """A boolean that is loaded, or its negation."""

    load: Load
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class All:
    """True where every part is; `TRUE` has none."""

    parts: frozenset[Boolean] = frozenset()


@dataclass(frozen=True, slots=True)
class Any_:
    """True where some part is; `FALSE` has none."""

    parts: frozenset[Boolean] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """`yes` where the condition holds, `no` elsewhere."""

    condition: Boolean
    yes: Value
    no: Value


Boolean = Compare | Truth | All | Any_
Value = Affine | Number | Choice
Expression = Boolean | Value

TRUE = All()
FALSE = Any_()
ZERO = Affine(0)
ONE = Affine(1)


def affine(atom: Atom) -> Affine:
    """Return the atom as an integer."""
    return Affine(0, frozenset({(atom, 1)}))


def coordinate(dim: int) -> Affine:
    """Return the index along `dim`."""
    return affine(Coordinate(dim))


def quotient(value: Affine, divisor: int) -> Affine:
    """Return the value over a positive number, rounded down; what the number divides is taken out."""
    out = Affine(value.constant // divisor, frozenset((a, c // divisor) for a, c in value.terms if c % divisor == 0))
    rest = value - out * divisor
    return out + affine(Quotient(rest, divisor)) if rest.terms else out


def scaled(load: Load, value: Affine) -> Affine:
    """Return the product of a floating-point element and an integer."""
    total = affine(load) * value.constant
    for atom, coefficient in value.terms:
        assert not isinstance(atom, Scaled)
        total += affine(Scaled(load, atom)) * coefficient
    return total


def least(value: Affine) -> int | None:
    """Return a lower bound, or None: coordinates and sizes are at least 0, loads are unbounded."""
    if not all(coefficient > 0 and is_natural_atom(atom) for atom, coefficient in value.terms):
        return None
    return value.constant


def is_natural_atom(atom: Atom) -> bool:
    """Tell whether an atom cannot be negative."""
    match atom:
        case Coordinate():
            return True
        case Size(symbol):
            return bool(symbol.is_nonnegative)
        case Quotient(value, _):
            return is_natural(value)
    return False


def is_natural(value: Affine) -> bool:
    """Tell whether an integer cannot be negative."""
    bound = least(value)
    return bound is not None and bound >= 0


def is_float(atom: Atom) -> bool:
    """Tell whether an atom is a floating-point element."""
    return isinstance(atom, Load) and bool(atom.node.meta["val"].dtype.is_floating_point)


def is_boolean(value: Expression) -> bool:
    """Tell whether the expression is a boolean."""
    return isinstance(value, Compare | Truth | All | Any_)
