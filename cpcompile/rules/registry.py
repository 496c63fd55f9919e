"""The rule table: for each operator, how placements pass through it.

A rule answers two questions. `push`: the operands are sharded so; what must the other operands be, and what
is the result? `pull`: the result is wanted sharded so; what must the operands be? Both answers are a
`Decision`. Most rules only name the dims of operands and results (`Indices`): dims with one name run
together, so that either answer follows from the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.errors import NoRule, where
from cpcompile.ir.operator_call import Call, size_hint
from cpcompile.ir.placement import CHANNELS, FULL, Partial, Placement, Sharded

Names = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Local:
    """A size argument that counts the tokens of a placement: `size // tokens` times the local slots."""

    size: Any
    at: Sharded


@dataclass(frozen=True, slots=True)
class Decision:
    """What an operator does on local tokens.

    Attributes:
        operands: the placement that each tensor operand must have; one that is not named may have any (only
            its metadata is read).
        results: the placement of each result.
        arguments: the arguments that change; sizes of tokens are `Local`.
        padding: the value that the padding slots of an operand must hold first, because the operator runs
            over tokens.
        gathers: the sharded operands that are gathered to be whole, as the operator's own way (keys and values).
        exchanges: the operands that must be sharded along other dims first; what happens then is asked again.
        lower: writes other operators in place of this one; it returns the node of each result.
    """

    operands: Mapping[str, Placement]
    results: tuple[Placement, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    padding: Mapping[str, float] = field(default_factory=dict)
    gathers: frozenset[str] = frozenset()
    exchanges: Mapping[str, Sharded] = field(default_factory=dict)
    lower: Callable[[Lowering], Sequence[fx.Node]] | None = None


class Lowering(Protocol):
    """What a rule writes with, when other operators take the place of its own. Its operands are local already."""

    @property
    def call(self) -> Call:
        """The call, with the operands as they were decided."""

    @property
    def length(self) -> fx.Node | int:
        """The number of tokens, as a graph argument."""

    @property
    def local(self) -> fx.Node | int:
        """The number of local slots, as a graph argument."""

    @property
    def chunks(self) -> int:
        """The number of globally ordered chunks that a rank holds."""

    @property
    def has_padding(self) -> bool:
        """Whether some rank may hold padding slots, as far as is known when compiling."""

    @property
    def axis(self) -> tuple[Any, ...]:
        """The last arguments of every operator that knows the layout: layout, world size, group, perhaps bounds."""

    def insert(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call before the operator; its recorded value is what one rank holds."""


class Rule(Protocol):
    """How placements pass through one operator. `length` is the number of tokens, possibly symbolic."""

    @property
    def notation(self) -> str:
        """The rule in index notation, for messages."""

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        """Return what happens when `operands` are sharded (the others are not). Raises `NoRule`."""

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        """Return how the (first) result is computed sharded, or None when it must be computed whole."""


@dataclass(frozen=True, slots=True)
class Indices:
    """The dims of operands and results by name.

    Dims with one name run together. None: the operator mixes this dim, or an operand is broadcast along it. A
    name that only operands have is
    contracted: summed where `summed`, impossible to shard otherwise. `sizes` names the argument that spells
    the sizes of the result. `gathers` are the operands that may be gathered where tokens of others are along
    another dim, which they lack.
    """

    operands: Mapping[str, Names]
    results: tuple[Names, ...]
    summed: bool = False
    sizes: str | None = None
    gathers: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    padding: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IndexedRule:
    """A rule given by the names of the dims."""

    indices: Callable[[Call], Indices]
    notation: str

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        indices = self.indices(call)
        given = {o: p for o, p in operands.items() if o in indices.operands}
        found = {(indices.operands[o][p.dim], replace(p, dim=0)) for o, p in given.items()}
        if len(found) > 1:
            decision = along_one_dim(call, indices, given, length, self.notation)
            if decision is None:
                reason = "the operands hold tokens along different dims or ranges"
                raise no_rule(call, operands, reason, self.notation)
            return decision
        if not found:
            return Decision({}, (FULL,) * len(indices.results))
        name, at = found.pop()
        if name is None:
            raise no_rule(call, operands, "the operator runs over the tokens of the whole sequence", self.notation)
        return decide(call, indices, name, at, self.notation)

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        indices = self.indices(call)
        name = indices.results[0][result.dim]
        if name is None:
            return None
        return decide(call, indices, name, result, self.notation)


def decide(call: Call, indices: Indices, name: str, at: Sharded, notation: str) -> Decision:
    """Return the decision to shard every dim called `name`, with the factors and the range of `at`."""
    operands = {o: placed(names, name, at) for o, names in indices.operands.items()}
    if not any(name in names for names in indices.results):
        if not indices.summed or at.reaches_outside:
            sharded = {o: p for o, p in operands.items() if isinstance(p, Sharded)}
            raise no_rule(call, sharded, "the operator runs over the tokens of the whole sequence", notation)
        padding = indices.padding or {next(o for o, p in operands.items() if isinstance(p, Sharded)): 0.0}
        return Decision(operands, (Partial(),) * len(indices.results), indices.arguments, padding)
    arguments = dict(indices.arguments)
    if indices.sizes is not None:
        dim = indices.results[0].index(name)
        sizes = list(call[indices.sizes])
        entry = dim - len(indices.results[0]) + len(sizes)
        sizes[entry] = sizes[entry] if sizes[entry] == -1 else Local(sizes[entry], at)
        arguments[indices.sizes] = sizes
    return Decision(operands, tuple(after(call, placed(names, name, at)) for names in indices.results), arguments)


def along_one_dim(
    call: Call, indices: Indices, given: Mapping[str, Sharded], length: Any, notation: str
) -> Decision | None:
    """Return the decision to shard one of the dims that operands are sharded along, so that the fewest bytes travel.

    Operands that lack this dim are gathered; those that have it are sharded along it first, all of them at once. Of two operands
    that hold a number for each pair of tokens, neither is gathered if there are channels that both can be sharded along.
    """
    choices: list[tuple[int, int, int, Decision]] = []
    for first, at in given.items():
        name = indices.operands[first][at.dim]
        if name is None:
            return None
        if not any(name in names for names in indices.results):
            continue
        others = [o for o, p in given.items() if placed(indices.operands[o], name, at) != p]
        gathered = [o for o in others if name not in indices.operands[o]]
        exchanged = {o: replace(at, dim=indices.operands[o].index(name)) for o in others if o not in gathered}
        if not {*gathered} <= {*indices.gathers} or not may_exchange(exchanged, given):
            continue
        channels = along_channels(call, indices, given) if any(holds_pairs(call, o, length) for o in gathered) else {}
        if channels or exchanged:
            decision = Decision({}, (), exchanges=channels or exchanged)
        else:
            decision = replace(decide(call, indices, name, at, notation), gathers=frozenset(gathered))
        place = next(names.index(name) for names in indices.results if name in names)
        choices.append((sum(num_bytes(call.tensor(o)) for o in others), at.sequence, place, decision))
    return min(choices, key=lambda choice: choice[:3])[3] if choices else None


def may_exchange(to: Mapping[str, Sharded], given: Mapping[str, Sharded]) -> bool:
    """Tell whether operands can be sharded along other dims: these hold all tokens and, as far as is known, nothing else."""
    return all(is_whole_dim(at) and is_whole_dim(given[o]) and given[o].dim != at.dim for o, at in to.items())


def is_whole_dim(at: Sharded) -> bool:
    """Tell whether a dim holds all tokens, and one element for each as far as that is known."""
    return at.covers_all and at.inner == 1


def along_channels(call: Call, indices: Indices, given: Mapping[str, Sharded]) -> dict[str, Sharded]:
    """Return how all operands can be sharded along the longest dim that they and the result share; {} if there is none."""
    if not all(o in indices.operands for o in given):
        return {}
    kept = [name for name in indices.results[0] if all(name in names for names in indices.results)]
    common = [name for name in kept if name and all(name in indices.operands[o] for o in given)]
    found: list[tuple[int, dict[str, Sharded]]] = []
    for name in common:
        to = {o: Sharded(indices.operands[o].index(name), sequence=CHANNELS) for o in given}
        sizes = [call.shape(o)[at.dim] for o, at in to.items()]
        if all(isinstance(size, int) and size > 1 for size in sizes) and may_exchange(to, given):
            found.append((sizes[0], to))
    return max(found, key=lambda choice: choice[0])[1] if found else {}


def holds_pairs(call: Call, name: str, length: Any) -> bool:
    """Tell whether an operand has two dims that are as long as there are tokens."""
    return sum(bool(statically_known_true(size == length)) for size in call.shape(name)) > 1


def num_bytes(x: torch.Tensor) -> int:
    """Return how many bytes a tensor has, at the lengths it was traced with."""
    return math.prod(map(size_hint, x.shape)) * x.dtype.itemsize


def placed(names: Names, name: str, at: Sharded) -> Placement:
    """Return the placement of a tensor with these dims when the dim called `name` is sharded like that of `at`."""
    return replace(at, dim=names.index(name)) if name in names else FULL


def after(call: Call, at: Placement) -> Placement:
    """Return the placement of a result: only an operator that computes nothing keeps what is outside the sequence."""
    return at if not isinstance(at, Sharded) or call.target in KEEPS_OUTSIDE else replace(at, outside=None)


def no_rule(call: Call, operands: Mapping[str, Placement], reason: str, notation: str = "", page: str = "") -> NoRule:
    """Return the error for an operator whose operands cannot stay sharded, with the user's line and the remedy.

    `page` of the documentation says more.
    """
    shapes = {name: list(call.shape(name)) for name, _ in call.operands()}
    lines = "\n".join(f"  {name}: {operands[name]} of {shapes.get(name)}" for name in operands)
    return NoRule(
        f"{call.target}: {reason}.\n\n{where(call.node)}\n{lines}\n"
        + (f"  rule: {notation}\n" if notation else "")
        + "\nCompute this value from inputs that every rank holds whole, move it out of the model (after cpcompile.unshard), "
        "pass strict=False to gather it on every rank, or register a rule for this case (cpcompile.rules.rule).",
        page=page,
    )


RULES: dict[torch._ops.OpOverload, Rule] = {}

# Operators that move elements and compute nothing, so that tokens outside the sequence stay what they are.
aten = torch.ops.aten
KEEPS_OUTSIDE = {
    aten.alias.default,
    aten.clone.default,
    aten.constant_pad_nd.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.pad.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
}

REFUSED_PAGE = "rules.md#refused-along-the-tokens"
# For operators without a rule: why there is none, where more can be said than that.
REASONS: dict[torch._ops.OpOverload, Callable[[Call], str]] = {}


def register(rule: Rule, *targets: torch._ops.OpOverload) -> None:
    """Enter `rule` for each target; a second rule for an operator is an error."""
    for target in targets:
        if target in RULES:
            raise ValueError(f"{target} already has the rule {RULES[target].notation}")
        RULES[target] = rule


def rule(*targets: torch._ops.OpOverload) -> Callable[[Callable[[Call], Indices]], Callable[[Call], Indices]]:
    """Register a function that names the dims of a call as the rule of `targets`; its docstring is the rule in index notation."""

    def decorate(indices: Callable[[Call], Indices]) -> Callable[[Call], Indices]:
        assert indices.__doc__, "a rule's docstring is its index notation"
        register(IndexedRule(indices, indices.__doc__.splitlines()[0]), *targets)
        return indices

    return decorate
