"""Simplify: build and rewrite comparisons, booleans and choices so that two spellings of one mask end as one expression."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from cpcompile.analysis.masks.expression import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Affine,
    All,
    Any_,
    Atom,
    Boolean,
    Choice,
    Compare,
    Coordinate,
    Expression,
    Load,
    Number,
    Quotient,
    Scaled,
    Truth,
    Value,
    affine,
    coordinate,
    is_boolean,
    is_float,
    least,
    quotient,
    scaled,
)


def compare(kind: str, value: Affine) -> Boolean:
    """Return the comparison of `value` with 0, in lowest terms, as a constant where it is one."""
    divisor = math.gcd(*(factor for _, factor in value.terms))
    if divisor > 1 and not any(isinstance(atom, Scaled) or is_float(atom) for atom, _ in value.terms):
        if kind != "le" and value.constant % divisor:
            return FALSE if kind == "eq" else TRUE
        terms = frozenset((atom, factor // divisor) for atom, factor in value.terms)
        value = Affine(-(-value.constant // divisor), terms)
    low, high = least(value), least(-value)
    match kind:
        case "le":
            if high is not None and high >= 0:
                return TRUE
            if low is not None and low > 0:
                return FALSE
        case "eq" | "ne":
            if not value.terms and value.constant == 0:
                return TRUE if kind == "eq" else FALSE
            if (low is not None and low > 0) or (high is not None and high > 0):
                return FALSE if kind == "eq" else TRUE
            value = min(value, -value, key=sort_key)
    return Compare(kind, value)


def sort_key(value: Affine) -> tuple[Any, ...]:
    """Return a key that picks one of a value and its negative."""
    return (sorted((str(atom), c) for atom, c in value.terms), value.constant)


def both(*parts: Boolean) -> Boolean:
    """Return the conjunction, flat and without repetitions."""
    flat: set[Boolean] = set()
    for part in parts:
        if part == FALSE:
            return FALSE
        flat |= part.parts if isinstance(part, All) else {part}
    flat = tightest(flat)
    if FALSE in flat or any(negated(part) in flat for part in flat):
        return FALSE
    return next(iter(flat)) if len(flat) == 1 else All(frozenset(flat))


def tightest(parts: set[Boolean]) -> set[Boolean]:
    """Return a conjunction without bounds that others imply; two bounds that meet, or a bound without its end, are one part."""
    bounds: dict[frozenset[tuple[Atom, int]], int] = {}
    rest: set[Boolean] = set()
    for part in parts:
        if isinstance(part, Compare) and part.kind == "le":
            value = part.value
            bounds[value.terms] = max(value.constant, bounds.get(value.terms, value.constant))
        else:
            rest.add(part)
    for part in [part for part in rest if isinstance(part, Compare) and part.kind == "ne"]:
        for value in (part.value, -part.value):
            if bounds.get(value.terms) == value.constant:
                bounds[value.terms] += 1
                rest.discard(part)
    found = {terms: Affine(constant, terms) for terms, constant in bounds.items()}
    meeting = [value for value in found.values() if found.get((-value).terms) == -value]
    rest |= {compare("eq", value) for value in meeting}
    return rest | {compare("le", value) for value in found.values() if value not in meeting}


def either(*parts: Boolean) -> Boolean:
    """Return the disjunction, flat and without repetitions."""
    return negated(both(*(negated(part) for part in parts)))


def negated(value: Boolean) -> Boolean:
    """Return the negation, pushed down to the comparisons and loads."""
    match value:
        case Compare("le", number):
            return compare("le", ONE - number)
        case Compare(kind, number):
            return Compare("ne" if kind == "eq" else "eq", number)
        case Truth(load, is_negated):
            return Truth(load, not is_negated)
        case All(parts):
            return disjunction({negated(part) for part in parts})
        case Any_(parts):
            return both(*(negated(part) for part in parts))


def disjunction(parts: set[Boolean]) -> Boolean:
    """Return the disjunction of negated conjuncts, none of which is a constant."""
    flat: set[Boolean] = set()
    for part in parts:
        flat |= part.parts if isinstance(part, Any_) else {part}
    return next(iter(flat)) if len(flat) == 1 else Any_(frozenset(flat))


def choice(condition: Boolean, yes: Value, no: Value) -> Value:
    """Return the value that the condition picks."""
    yes, no = as_value(given(condition, yes)), as_value(given(negated(condition), no))
    if condition == TRUE or yes == no:
        return yes
    if condition == FALSE:
        return no
    if isinstance(yes, Choice) and no in (yes.yes, yes.no):
        inner = yes.condition if no == yes.no else negated(yes.condition)
        return choice(both(condition, inner), yes.yes if no == yes.no else yes.no, no)
    if isinstance(no, Choice) and yes in (no.yes, no.no):
        return choice(negated(condition), no, yes)
    return Choice(condition, yes, no)


def choose(condition: Boolean, yes: Expression, no: Expression) -> Expression:
    """Return what the condition picks; a number and a boolean give a number."""
    if not (is_boolean(yes) and is_boolean(no)):
        return choice(condition, as_value(yes), as_value(no))
    otherwise = negated(condition)
    yes, no = as_boolean(given(condition, yes)), as_boolean(given(otherwise, no))
    return yes if yes == no else either(both(condition, yes), both(otherwise, no))


def given(condition: Boolean, value: Expression) -> Expression:
    """Return the expression where the condition holds: one like `index < 1` says that a coordinate is 0."""
    if isinstance(value, Choice):
        if value.condition in (condition, negated(condition)):
            return given(condition, value.yes if value.condition == condition else value.no)
        yes, no = as_value(given(condition, value.yes)), as_value(given(condition, value.no))
        value = value if (yes, no) == (value.yes, value.no) else choice(value.condition, yes, no)
    match condition:
        case Compare("le", Affine(0, terms)) if len(terms) == 1:
            ((atom, coefficient),) = terms
            if isinstance(atom, Coordinate) and coefficient > 0:
                return substitute(value, {atom.dim: ZERO})
    return value


def assuming(known: Boolean, value: Expression) -> Expression:
    """Return the expression with `known`, which holds everywhere, for true wherever it is a part."""
    match value:
        case Compare() | Truth():
            return TRUE if value == known else FALSE if value == negated(known) else value
        case All(parts):
            return both(*(as_boolean(assuming(known, part)) for part in parts))
        case Any_(parts):
            return either(*(as_boolean(assuming(known, part)) for part in parts))
        case Choice(condition, yes, no):
            inner = as_value(assuming(known, yes)), as_value(assuming(known, no))
            return choice(as_boolean(assuming(known, condition)), *inner)
    return value


def as_value(value: Expression) -> Value:
    """Return a number: of a boolean 1 or 0."""
    return value if isinstance(value, Affine | Number | Choice) else choice(value, ONE, ZERO)


def as_boolean(value: Expression) -> Boolean:
    """Return a boolean: of a number whether it is not 0."""
    match value:
        case Affine():
            return compare("ne", value)
        case Number(number):
            return TRUE if number != 0 else FALSE
        case Choice(condition, yes, no):
            return either(both(condition, as_boolean(yes)), both(negated(condition), as_boolean(no)))
    return value


def map_leaves(function: Callable[..., Expression], *values: Value) -> Expression:
    """Apply `function` to the numbers that the choices in `values` end in."""
    for i, value in enumerate(values):
        if isinstance(value, Choice):
            yes = map_leaves(function, *values[:i], value.yes, *values[i + 1 :])
            no = map_leaves(function, *values[:i], value.no, *values[i + 1 :])
            return choose(value.condition, yes, no)
    return function(*values)


def rewrite(value: Expression, function: Callable[[Atom], Affine]) -> Expression:
    """Return the expression with every atom replaced by an integer; the indices of a load come first."""
    match value:
        case Affine():
            return rewrite_affine(value, function)
        case Compare(kind, number):
            return compare(kind, rewrite_affine(number, function))
        case Truth(load, is_negated):
            moved = rewrite_load(load, function)
            return Truth(moved, is_negated)
        case All(parts):
            return both(*(as_boolean(rewrite(part, function)) for part in parts))
        case Any_(parts):
            return either(*(as_boolean(rewrite(part, function)) for part in parts))
        case Choice(condition, yes, no):
            moved_condition = as_boolean(rewrite(condition, function))
            return choice(moved_condition, as_value(rewrite(yes, function)), as_value(rewrite(no, function)))
    return value


def rewrite_affine(value: Affine, function: Callable[[Atom], Affine]) -> Affine:
    """Return the integer with every atom replaced."""
    total = Affine(value.constant)
    for atom, coefficient in value.terms:
        if isinstance(atom, Quotient):
            rounded = quotient(rewrite_affine(atom.value, function), atom.divisor)
            moved = Affine(rounded.constant)
            for inner, factor in rounded.terms:
                moved += (function(inner) if isinstance(inner, Quotient) else affine(inner)) * factor
        elif isinstance(atom, Scaled):
            moved = scaled(rewrite_load(atom.load, function), rewrite_affine(affine(atom.factor), function))
        else:
            moved = function(rewrite_load(atom, function) if isinstance(atom, Load) else atom)
        total += moved * coefficient
    return total


def rewrite_load(load: Load, function: Callable[[Atom], Affine]) -> Load:
    """Return the load with its indices rewritten."""
    return Load(load.node, tuple(rewrite_affine(index, function) for index in load.indices))


def substitute(value: Expression, coordinates: Mapping[int, Affine]) -> Expression:
    """Return the expression with coordinates replaced; those that are not named stay."""

    def at(atom: Atom) -> Affine:
        return coordinates.get(atom.dim, affine(atom)) if isinstance(atom, Coordinate) else affine(atom)

    return rewrite(value, at)


def shifted(value: Expression, dims: int) -> Expression:
    """Return the expression of a tensor seen with `dims` more dims in front."""
    assert dims >= 0, dims
    return (
        rewrite(value, lambda a: coordinate(a.dim + dims) if isinstance(a, Coordinate) else affine(a))
        if dims
        else value
    )


COMPARISONS: Mapping[str, Callable[[Affine, Affine], Boolean]] = {
    "le": lambda a, b: compare("le", a - b),
    "lt": lambda a, b: compare("le", a - b + ONE),
    "ge": lambda a, b: compare("le", b - a),
    "gt": lambda a, b: compare("le", b - a + ONE),
    "eq": lambda a, b: compare("eq", a - b),
    "ne": lambda a, b: compare("ne", a - b),
}
FLOAT_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    name: getattr(operator, name) for name in COMPARISONS
}
