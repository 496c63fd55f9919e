"""Recognise: the expression of a mask becomes the arguments of the attention operator that mean the same.

A mask is a conjunction over (batch, head, query, key). Each part is one of

    key - query <= A                        causal for A = 0, else a look-ahead
    key - query <= A or key < p[b]          the same with a prefix
    query - key < W                         a sliding window
    id[b, query] == id[b, key]              documents
    query // c == key // c                  chunks, which are documents
    p(id[b, key]), key < length[b]          key padding

and a mask with any other part is not recognised at all: no part is ever dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.expression import (
    ONE,
    ZERO,
    Affine,
    All,
    Any_,
    Atom,
    Boolean,
    Choice,
    Compare,
    Expression,
    Load,
    Number,
    Quotient,
    Truth,
    affine,
    coordinate,
    is_boolean,
)
from cpcompile.analysis.masks.read import Reader, loads
from cpcompile.analysis.masks.simplify import as_boolean, both, compare, negated, rewrite, sort_key, substitute
from cpcompile.ir.operator_call import Call, value_of

BATCH, HEAD, QUERY, KEY = (coordinate(dim) for dim in range(4))


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query attends to, as the arguments of the attention operator say it.

    Attributes:
        ahead: key - query is at most this; None for no bound.
        prefix: keys before it are visible whatever `ahead` says; None for no prefix.
        window: W > 0: query - key < W.
        documents: ids of a token at (batch, query), all of which must be those of the key.
        key_padding: predicates of the key, all of which must hold.
    """

    ahead: int | None = None
    prefix: Affine | None = None
    window: int = 0
    documents: frozenset[Affine] = frozenset()
    key_padding: frozenset[Compare | Truth] = frozenset()

    @property
    def shows_own_token(self) -> bool:
        """Every query attends to the key at its own place, so no row is empty."""
        return not self.key_padding

    @property
    def is_of_places(self) -> bool:
        """Queries and keys are compared by their places, so that they must be the same tokens."""
        return self.ahead is not None or bool(self.window) or bool(self.documents)

    def narrowed(self, ahead: int, prefix: Affine | None) -> Mask | None:
        """Return this and `key - query <= ahead or key < prefix`, or None where no two arguments mean both."""
        mine = -1 if self.ahead is None else self.ahead
        if self.ahead is None or (ahead, prefix) == (mine, self.prefix) or (prefix is None and ahead <= mine):
            return replace(self, ahead=ahead, prefix=prefix)
        return self if self.prefix is None and mine <= ahead else None


def conjuncts(value: Boolean) -> frozenset[Boolean]:
    """Return the parts of a conjunction."""
    return value.parts if isinstance(value, All) else frozenset({value})


def recognise(value: Boolean, reader: Reader, given: Mask | None = None) -> Mask | None:
    """Return the mask that `value`, over (batch, head, query, key), means beside what is `given`, or None."""
    mask: Mask | None = given or Mask()
    for part in sorted(conjuncts(with_positions(value, reader)), key=str):
        mask = narrowed(mask, part) if mask is not None else None
    return mask


def narrowed(mask: Mask, part: Boolean) -> Mask | None:
    """Return `mask` and `part`, or None."""
    match part:
        case Compare("le", number) if number.terms == (KEY - QUERY).terms and number.constant <= 0:
            return mask.narrowed(-number.constant, None)
        case Compare("le", number) if number.terms == (QUERY - KEY).terms and number.constant <= 0:
            window = 1 - number.constant
            return replace(mask, window=min(window, mask.window or window))
        case Compare("eq", number) if number in (KEY - QUERY, QUERY - KEY):
            own = mask.narrowed(0, None)
            return own and replace(own, window=1)
        case Compare("eq", number) if (documents := same_id(number)) is not None:
            return replace(mask, documents=mask.documents | {documents})
        case Any_(parts) if (found := prefixed(parts)) is not None:
            return mask.narrowed(*found)
        case Compare() | Truth() if key_load(part) is not None or is_of_key(part):
            return replace(mask, key_padding=mask.key_padding | {part})
    return None


def prefixed(parts: frozenset[Boolean]) -> tuple[int, Affine] | None:
    """Return (A, p) of `key - query <= A or key < p`, or None."""
    numbers = [part.value for part in parts if isinstance(part, Compare) and part.kind == "le"]
    if len(numbers) != 2 or len(parts) != 2:
        return None
    for bound, number in (numbers, numbers[::-1]):
        prefix = KEY + ONE - number
        if bound.terms == (KEY - QUERY).terms and bound.constant <= 0 and is_per_batch(prefix):
            return -bound.constant, prefix
    return None


def is_per_batch(number: Affine) -> bool:
    """Tell whether an integer is one for each sequence: made of constants and loads of `[B | 1]`, `[B | 1, 1]` or `[]`."""
    return all(isinstance(atom, Load) and is_load_per_batch(atom) for atom, _ in number.terms)


def is_load_per_batch(load: Load) -> bool:
    """Tell whether a load is of one element for each sequence, or for all of them."""
    sizes = value_of(load.node).shape
    return all(
        (dim == 0 and index == BATCH) or (index == ZERO and statically_known_true(sizes[dim] == 1))
        for dim, index in enumerate(load.indices)
    )


def same_id(number: Affine) -> Affine | None:
    """Return the id at the query of `id[b, query] - id[b, key]`, or None."""
    terms = frozenset((atom, factor) for atom, factor in number.terms if is_of_token(atom))
    found = [Affine(0, terms), Affine(0, terms) * -1]
    for of_query in found:
        of_key = substitute(of_query, {2: KEY})
        assert isinstance(of_key, Affine)
        if terms and of_query - of_key in (number, -number):
            return max(found, key=sort_key)
    return None


def is_of_token(atom: Atom) -> bool:
    """Tell whether an atom is one integer for each token, here the query."""
    if isinstance(atom, Load):
        return is_per_token(atom, QUERY)
    if isinstance(atom, Quotient):
        parts = [part for part, _ in atom.value.terms]
        return any(is_of_token(part) for part in parts) and all(
            is_of_token(part) or (isinstance(part, Load) and is_load_per_batch(part)) for part in parts
        )
    return affine(atom) == QUERY


def all_loads(mask: Mask) -> Iterator[Load]:
    """Yield the loads of a mask."""
    for part in mask.key_padding:
        yield from loads(part)
    for number in mask.documents:
        yield from loads(number)
    yield from loads(mask.prefix) if mask.prefix is not None else []


def at_token(load: Load, token: Affine) -> Affine:
    """Return the load with its token, the last index, replaced."""
    return affine(Load(load.node, (*load.indices[:-1], token)))


def is_per_token(load: Load, token: Affine) -> bool:
    """Tell whether a load is of one element for each token: of `[B | 1, S]`, or `[S]`, at `token`."""
    if not load.indices:
        return False
    *batch, last = load.indices
    return last == token and batch in ([], [BATCH], [ZERO]) and not is_size_one(load, batch)


def is_size_one(load: Load, batch: list[Affine]) -> bool:
    """Tell whether an index 0 picks one row of several."""
    return batch == [ZERO] and value_of(load.node).shape[0] != 1


def is_of_key(part: Compare | Truth) -> bool:
    """Tell whether a predicate compares integers of the key's place, of its token and of its sequence, such as its length."""
    if not isinstance(part, Compare):
        return False
    atoms = [atom for atom, _ in part.value.terms]
    of_token = [affine(atom) == KEY or (isinstance(atom, Load) and is_per_token(atom, KEY)) for atom in atoms]
    of_batch = [isinstance(atom, Load) and is_load_per_batch(atom) for atom in atoms]
    return any(of_token) and all(map(operator.or_, of_token, of_batch))


def key_load(part: Compare | Truth) -> Load | None:
    """Return the load of a predicate of one per-token value at the key, or None."""
    if isinstance(part, Truth):
        return part.load if is_per_token(part.load, KEY) else None
    found = list(loads(part.value))
    if len(part.value.terms) == 1 and len(found) == 1 and is_per_token(found[0], KEY):
        return found[0] if dict(part.value.terms)[found[0]] in (1, -1) else None
    return None


def with_positions(value: Boolean, reader: Reader) -> Boolean:
    """Return the conjunction with positions inside a document replaced by the places of the tokens.

    Ids that count the places where `position[t] - position[t - 1] != 1` are equal only for tokens between which positions grow by
    one a token. Beside `id[b, query] == id[b, key]`, a position is therefore the place plus a start that both tokens share.
    """
    for part in conjuncts(value):
        documents = same_id(part.value) if isinstance(part, Compare) and part.kind == "eq" else None
        position = counted_position(documents, reader) if documents is not None else None
        if position is not None:
            # Chunks of positions stay: they are ids as they are.
            parts = conjuncts(value)
            chunks = {part for part in parts if isinstance(part, Compare) and is_chunk(same_id(part.value))}
            value = both(*(as_boolean(rewrite(part, places_for(position))) for part in parts - chunks), *chunks)
    return value


def places_for(position: Load) -> Any:
    """Return the replacement of the positions at the query and at the key."""
    places = {at_token(position, token): token + at_token(position, Affine(-1)) for token in (QUERY, KEY)}

    def place(atom: Atom) -> Affine:
        return places.get(affine(atom), affine(atom))

    return place


def is_chunk(number: Affine | None) -> bool:
    """Tell whether an id is made of quotients."""
    return number is not None and any(isinstance(atom, Quotient) for atom, _ in number.terms)


def counted_position(number: Affine, reader: Reader) -> Load | None:
    """Return the position of which the id `number` counts the jumps, at the indices of the id, or None."""
    documents = next(iter(number.terms))[0]
    if len(number.terms) != 1 or not isinstance(documents, Load):
        return None
    node = documents.node
    if node.target is not torch.ops.aten.cumsum.default:
        return None
    call = Call.of(node)
    token = len(documents.indices) - 1
    jumps = reader.read(call["self"])
    if call.dim("dim", "self") != token or jumps is None:
        return None
    # Only tokens after another are ever compared, so what is counted at the first one does not matter.
    parts = conjuncts(as_boolean(jumps)) - {compare("le", ONE - coordinate(token))}
    for load in [load for part in parts if isinstance(part, Compare) for load in loads(part.value)]:
        before = affine(load) - substituted(load, token, coordinate(token) - ONE)
        if load.indices[-1] == coordinate(token) and parts == {compare("ne", before - ONE)}:
            return Load(load.node, tuple(substitute_all(load, dict(enumerate(documents.indices)))))
    return None


def substituted(load: Load, dim: int, index: Affine) -> Affine:
    """Return the load with a coordinate replaced."""
    return affine(Load(load.node, tuple(substitute_all(load, {dim: index}))))


def substitute_all(load: Load, coordinates: dict[int, Affine]) -> Iterator[Affine]:
    """Yield the indices of a load with coordinates replaced."""
    for index in load.indices:
        moved = substitute(index, coordinates)
        assert isinstance(moved, Affine)
        yield moved


def predicate(value: Expression, dtype: torch.dtype) -> tuple[Boolean, bool] | None:
    """Return where a mask lets attend, and whether what it adds elsewhere is infinite; None for a score bias."""
    if is_boolean(value):
        return as_boolean(value), True
    if isinstance(value, Number) and value.value == 0:
        return All(), True
    match value:
        case Choice(condition, Number(yes), Number(no)) if yes == 0 and hides(no, dtype):
            return condition, no == float("-inf")
        case Choice(condition, Number(yes), Number(no)) if no == 0 and hides(yes, dtype):
            return negated(condition), yes == float("-inf")
    return None


def hides(fill: float, dtype: torch.dtype) -> bool:
    """Tell whether a score with `fill` added has weight 0 beside one without it: scores do not differ by a billion."""
    return fill <= max(-1e9, torch.finfo(dtype).min)
