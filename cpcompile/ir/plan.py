"""Plan: the decisions that all passes share, and the graph values that depend on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile.balance.layout import follows_documents, local_length, num_chunks
from cpcompile.errors import NoRule
from cpcompile.ir.annotation import annotation
from cpcompile.ir.placement import Sharded


@dataclass(frozen=True, slots=True)
class Plan:
    """How one graph is made context parallel.

    Attributes:
        world_size: ranks of the context-parallel axis, P.
        group: name of the process group of the axis; '' when the ranks only exist in this process.
        layout: which tokens each rank holds.
        token_dims: for each token input (the name of its placeholder) the dim of its tokens.
        num_tokens: how many tokens there are, for a model that makes them itself (patches of an image) and has no
            token input; 0 otherwise.
        outputs: `local` or `full`.
        gradient_scale: what one rank's gradient of a loss counts: 1 when gradients are summed over the axis,
            P when they are averaged.
        exact_dropout: dropout draws what one device draws.
        token_local: paths or classes of the modules that are declared token-local.
        kernel: the kernel of all attentions, or `auto`.
        heads_per_message: how many key heads a rank receives at once; 0: all.
        inner_size: ranks that exchange heads in `usp`; 0 where the axis is no grid.
        inner_group, outer_group: names of the process groups of the grid's axes.
    """

    world_size: int
    group: str
    layout: str
    token_dims: Mapping[str, int]
    outputs: str = "local"
    gradient_scale: float = 1.0
    strict: bool = True
    num_tokens: int = 0
    exact_dropout: bool = False
    token_local: tuple[str, ...] = ()
    kernel: str = "auto"
    heads_per_message: int = 0
    inner_size: int = 0
    inner_group: str = ""
    outer_group: str = ""

    @property
    def keeps_heads(self) -> bool:
        """Whether attention keeps for backward what it exchanged by heads; inside of activation checkpoints it does not."""
        return not self.heads_per_message

    def has_padding(self, length: Any) -> bool:
        """Tell whether some rank may hold padding slots; a symbolic length may need them."""
        if not isinstance(length, int):
            return True
        return local_length(length, self.world_size, self.layout) * self.world_size != length


Parts = tuple[tuple[int, int], ...]  # the number of a sequence, and how many elements each of its tokens has


@dataclass(frozen=True, slots=True)
class Lengths:
    """The number of tokens and of local slots, as values (possibly symbolic) and as graph arguments (nodes or ints).

    Attributes:
        bounds: the node of the documents that the layout follows, if there are any.
        parts: of a joined sequence, the sequences that every rank holds behind one another: the number of each, and how many
            elements each of its tokens has there. See `ir.joining`.
        is_padded: whether some rank may hold padding slots; None where that follows from the number of tokens.
        layout: that of this sequence, where it is not the plan's.
        is_of_channels: these are no tokens, but another dim that a value is sharded along for a while.
    """

    value: Any
    total: fx.Node | int
    local: fx.Node | int
    bounds: fx.Node | None = None
    parts: Parts = ()
    is_padded: bool | None = None
    layout: str = ""
    is_of_channels: bool = False

    @property
    def is_of_tokens(self) -> bool:
        """Whether these are tokens, dealt to the ranks as the plan says."""
        return not (self.parts or self.layout or self.is_of_channels)

    def axis(self, plan: Plan) -> tuple[Any, ...]:
        """Return the last arguments of every operator that knows the layout, behind the number of tokens.

        Raises:
            NoRule: a joined sequence is dealt to the ranks part by part.
        """
        if self.parts:
            raise NoRule("the tokens of several sequences are joined, and dealt to the ranks sequence by sequence")
        axis = self.layout or plan.layout, plan.world_size, plan.group
        return axis if self.bounds is None else (*axis, self.bounds)

    def has_padding(self, plan: Plan) -> bool:
        """Tell whether some rank may hold padding slots; a symbolic length may need them."""
        return plan.has_padding(self.value) if self.is_padded is None else self.is_padded

    @classmethod
    def of(cls, gm: fx.GraphModule, sequence: int = 0) -> Lengths:
        """Return the lengths of a sequence that were inserted into `gm`."""
        lengths = gm.meta["cpcompile_lengths"][sequence]
        assert isinstance(lengths, cls)
        return lengths

    @classmethod
    def all_of(cls, gm: fx.GraphModule) -> tuple[Lengths, ...]:
        """Return the lengths of every sequence, in the order of their numbers."""
        lengths: tuple[Lengths, ...] = gm.meta["cpcompile_lengths"]
        return lengths

    @classmethod
    def find(cls, gm: fx.GraphModule, value: Any, matches: Callable[[Lengths], bool]) -> int | None:
        """Return the number of the first sequence of so many tokens that `matches`; None if there is none."""
        known = enumerate(cls.all_of(gm))
        return next((number for number, x in known if str(x.value) == str(value) and matches(x)), None)

    def add(self, gm: fx.GraphModule) -> int:
        """Return the number of this sequence, which is new."""
        known = Lengths.all_of(gm)
        gm.meta["cpcompile_lengths"] = (*known, self)
        return len(known)

    @classmethod
    def bounds_of(cls, gm: fx.GraphModule) -> list[fx.Node]:
        """Return the nodes of the documents that the layout follows, in the order of the sequences."""
        return [lengths.bounds for lengths in cls.all_of(gm) if lengths.bounds is not None]

    @classmethod
    def nodes_of(cls, gm: fx.GraphModule) -> list[fx.Node]:
        """Return the nodes of all lengths: what reads them comes behind."""
        nodes = [size for lengths in cls.all_of(gm) for size in (lengths.total, lengths.local, lengths.bounds)]
        return [node for node in nodes if isinstance(node, fx.Node)]

    @classmethod
    def insert(cls, gm: fx.GraphModule, plan: Plan) -> dict[str, int]:
        """Put the nodes that compute the lengths of the token inputs behind the placeholders.

        Returns the sequence of each token input: inputs of one length hold the same sequence.
        """
        sequences = sequences_of(gm, plan)
        lengths: dict[int, Lengths] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            if node.name in sequences and sequences[node.name] not in lengths:
                lengths[sequences[node.name]] = cls._insert(gm, plan, node, plan.token_dims[node.name])
        if plan.num_tokens:
            slots = local_length(plan.num_tokens, plan.world_size, plan.layout)
            lengths[0] = cls(plan.num_tokens, plan.num_tokens, slots)
        of_layout = [node for node in gm.graph.nodes if annotation(node).is_of_layout]
        by_size = {str(node.meta["val"].shape[1] - 1): node for node in of_layout}
        gm.meta["cpcompile_lengths"] = tuple(replace(x, bounds=by_size.get(str(x.value))) for x in lengths.values())
        return sequences

    @classmethod
    def _insert(cls, gm: fx.GraphModule, plan: Plan, tokens: fx.Node, dim: int) -> Lengths:
        value = tokens.meta["val"].shape[dim]
        if isinstance(value, int):
            return cls.of_total(gm, plan, value, value)
        last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
        with gm.graph.inserting_after(last):
            total = gm.graph.call_function(torch.ops.aten.sym_size.int, (tokens, dim))
        total.meta["val"] = value
        return cls.of_total(gm, plan, value, total)

    @classmethod
    def of_total(cls, gm: fx.GraphModule, plan: Plan, value: Any, total: fx.Node | int) -> Lengths:
        """Return the lengths of a sequence of `value` tokens, with nodes behind `total`."""
        slots = local_length(value, plan.world_size, plan.layout)
        if isinstance(total, int):
            return cls(value, total, slots)
        follows = follows_documents(plan.layout)
        chunks = plan.world_size if follows else num_chunks(plan.world_size, plan.layout)
        added = _after(gm, total, operator.add, (total, chunks - 1), value + (chunks - 1))
        chunk = _after(gm, added, operator.floordiv, (added, chunks), (value + (chunks - 1)) // chunks)
        local = _after(gm, chunk, operator.mul, (chunk, chunks // plan.world_size), slots)
        return cls(value, total, local)

    def localise(self, gm: fx.GraphModule, size: Any, at: Sharded, before: fx.Node) -> fx.Node | int:
        """Return the graph argument for `size // tokens * local slots`, where `size` is an int or a node."""
        value, tokens = size.meta["val"] if isinstance(size, fx.Node) else size, at.count(self.value)
        if isinstance(value, int) and isinstance(self.local, int):
            return int(value // tokens) * self.local
        if str(value) == str(tokens):
            return self.local
        with gm.graph.inserting_before(before):
            count = self.count(gm, at)
            outer = gm.graph.call_function(operator.floordiv, (size, count))
            return gm.graph.call_function(operator.mul, (outer, self.local))

    def count(self, gm: fx.GraphModule, at: Sharded) -> fx.Node | int:
        """Return the graph argument for the number of tokens in the range of `at`; inserts where the graph inserts."""
        if isinstance(self.total, int) or not (at.front or at.back):
            return at.count(self.total) if isinstance(self.total, int) else self.total
        count = gm.graph.call_function(operator.sub, (self.total, at.front + at.back))
        count.meta["val"] = at.count(self.value)
        return count


def sequences_of(gm: fx.GraphModule, plan: Plan) -> dict[str, int]:
    """Return the number of the sequence that each token input holds: those of one length hold the same."""
    inputs = [node for node in gm.graph.find_nodes(op="placeholder") if node.name in plan.token_dims]
    sizes = {node.name: str(node.meta["val"].shape[plan.token_dims[node.name]]) for node in inputs}
    distinct = list(dict.fromkeys(sizes.values()))
    return {name: distinct.index(size) for name, size in sizes.items()}


def _after(gm: fx.GraphModule, node: fx.Node, function: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(function, args)
    new.meta["val"] = value
    return new
