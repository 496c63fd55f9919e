"""Latents: the narrowest values from which the keys and values of an attention follow token by token.

DeepSeek's keys and values are products of a latent that all heads share, beside one rotary key (multi-head latent attention,
DeepSeek-AI, 2024): 512 + 64 numbers of a token in place of 128 * (192 + 128). Nothing here knows that model. What keys and
values are computed from is walked up as far as each token of a result depends on the same token of its operands, by the rules
of placement; of all cuts through what was walked, the one of the fewest bytes is the latent, and the nearest to the keys of
those.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import networkx  # type: ignore[import-untyped]
import torch
from torch import fx

from cpcompile.choose.attention import Expansion
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call, is_tensor, size_estimate, size_hint, value_of
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.rules import RULES

aten, cp = torch.ops.aten, torch.ops.cpcompile

# These compute most of what a model computes, and shard what they meet; a value that comes of none is whole on every rank.
PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default}
HEAVY = {*PRODUCTS, aten.embedding.default, cp.attention.default}

KEYS = Sharded(2)
MESSAGE = 1 / 1024  # of a byte for each token: of cuts of the same bytes, the one of fewest messages


@dataclass(frozen=True, slots=True)
class Latent:
    """What determines keys and values.

    Attributes:
        cut: the values that travel.
        expansion: what is computed from them, in the order of the graph; the last ones are keys and values.
        numbers: what the cost depends on.
    """

    cut: tuple[fx.Node, ...]
    expansion: tuple[fx.Node, ...]
    numbers: Expansion


def find_latent(
    attention: fx.Node,
    token_dims: Mapping[str, int] = MappingProxyType({}),
    sharded: AbstractSet[fx.Node] | None = None,
) -> Latent | None:
    """Return the latent of an attention, or None where nothing narrower than its keys and values determines them.

    Args:
        attention: the node.
        token_dims: the placeholders that hold tokens, and the dim of these; without any, the model makes its tokens itself.
        sharded: the `sharded_values` of its graph, if they are known.
    """
    call = Call.of(attention)
    if str(call.shape("q")[2]) != str(call.shape("k")[2]) or not attends_to_tokens(attention, token_dims):
        return None
    walk = LatentWalk(attention, sharded_values(attention.graph, token_dims) if sharded is None else sharded)
    if call["q"] not in walk.sharded:
        return None
    width = sum(walk.width(node) for node in walk.keys)
    narrow = walk.narrowest()
    if not narrow or not 0 < sum(walk.width(node) for node in narrow) < width:
        return None
    expansion = walk.between(narrow)
    numbers = Expansion(
        latent_bytes=sum(walk.width(node) for node in narrow),
        key_bytes=width,
        flops=sum(flops(node) for node in expansion) // size_hint(walk.length),
        messages=len(narrow),
    )
    return Latent(narrow, expansion, numbers)


def attends_to_tokens(attention: fx.Node, token_dims: Mapping[str, int]) -> bool:
    """Tell whether the rows of an attention are the tokens of an input: not those of several joined, or of one frame of many."""
    lengths = lengths_of(attention.graph, token_dims)
    return not lengths or str(Call.of(attention).shape("k")[2]) in lengths


class LatentWalk:
    """What the keys and values of one attention are computed from, up to where tokens mix, or nothing narrower can come.

    Attributes:
        keys: the keys and values.
        length: the number of tokens, possibly symbolic.
        sharded: the values of the graph that may be sharded.
        placements: where the tokens of each value are that was met.
        operands: for each value that was walked, those that its tokens come from; None where it cannot be computed by token.
    """

    def __init__(self, attention: fx.Node, sharded: AbstractSet[fx.Node]) -> None:
        call = Call.of(attention)
        self.keys = list(dict.fromkeys((call["k"], call["v"])))
        self.length = call.shape("k")[2]
        self.sharded = sharded
        self.placements: dict[fx.Node, Sharded] = dict.fromkeys(self.keys, KEYS)
        self.operands: dict[fx.Node, dict[fx.Node, Sharded] | None] = {}

    def narrowest(self) -> tuple[fx.Node, ...]:
        """Return the values of the fewest bytes that all paths to the keys go through; none where no path starts.

        Paths lead up through the residual stream to the first layer. The walk ends where what is above it cannot matter: where
        the sources that were met carry as much to the keys as they would with all that is left to walk.
        """
        pending, tested = set(self.keys), 0
        while pending:
            # What every rank has anyway comes first: it has no source, which is known once it has been walked.
            node = max(pending, key=lambda node: (node not in self.sharded, node))
            pending.remove(node)
            self.operands[node] = operands = self._operands(node, self.placements[node])
            for operand, at in (operands or {}).items():
                if operand not in self.placements:
                    self.placements[operand] = at
                    pending.add(operand)
                elif self.placements[operand] != at:
                    self.operands[operand] = None
                    pending.discard(operand)
            if operands is None and len(self.operands) >= 2 * tested:
                tested = len(self.operands)
                bytes_cut, narrow = self._cut()
                if bytes_cut == self._cut(pending)[0]:
                    return narrow
        return self._cut()[1]

    def _operands(self, node: fx.Node, at: Sharded) -> dict[fx.Node, Sharded] | None:
        """Return the operands whose tokens are those of `node`; none for a value that every rank has anyway."""
        if node.target is operator.getitem:
            return {node.args[0]: at}  # type: ignore[dict-item]
        is_whole = node not in self.sharded
        if node.op != "call_function":
            return None if is_floating(node) else {}
        if is_whole and not is_floating(node):
            return {}
        found = self._by_rule(node, at)
        return {} if found is None and is_whole else found

    def _by_rule(self, node: fx.Node, at: Sharded) -> dict[fx.Node, Sharded] | None:
        if node.target not in RULES or node.target is aten.embedding.default or annotation(node).region:
            return None
        call = Call.of(node)
        if torch.Tag.nondeterministic_seeded in call.target.tags:
            return None
        decision = RULES[call.target].pull(call, at, self.length)
        if decision is None or decision.lower or decision.padding or any(result != at for result in decision.results):
            return None
        found = {}
        for name, operand in call.operands():
            wanted = decision.operands.get(name)
            if isinstance(wanted, Sharded):
                found[operand] = wanted
            elif wanted == FULL and operand in self.sharded:
                return None
        return found

    def width(self, node: fx.Node) -> int:
        """Return the bytes of a value for each token."""
        value = value_of(node)
        return int(prod(size_hint(n) for n in value.shape) * value.element_size()) // size_hint(self.length)

    def _cut(self, more: Collection[fx.Node] = ()) -> tuple[float, tuple[fx.Node, ...]]:
        """Return the least bytes of values that separate the keys from all sources, and from `more`, and these values."""
        graph = networkx.DiGraph()
        graph.add_node("start")
        for node in (*self.operands, *more):
            capacity = {"capacity": self.width(node) + MESSAGE} if is_tensor(node) else {}
            graph.add_edge((node, "in"), (node, "out"), **capacity)
            operands = self.operands.get(node)
            if operands is None:
                graph.add_edge("start", (node, "in"))
            for operand in operands or {}:
                graph.add_edge((operand, "out"), (node, "in"))
        for node in self.keys:
            graph.add_edge((node, "out"), "end")
        # Of several minimal cuts, networkx finds the one nearest to the end.
        bytes_cut, (before, after) = networkx.minimum_cut(graph, "start", "end")
        return bytes_cut, tuple(node for node in self.operands if (node, "in") in before and (node, "out") in after)

    def between(self, cut: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
        """Return what must be computed of the values of `cut` to get the keys, in the order of the graph."""
        found: set[fx.Node] = set()
        pending = [node for node in self.keys if node not in cut]
        while pending:
            node = pending.pop()
            if node not in found and node in self.sharded:
                found.add(node)
                pending += [operand for operand in self.operands[node] or {} if operand not in cut]
        return tuple(sorted(found))


def lengths_of(graph: fx.Graph, token_dims: Mapping[str, int]) -> set[str]:
    """Return the lengths of the inputs that hold tokens."""
    given = [node for node in graph.find_nodes(op="placeholder") if node.name in token_dims]
    return {str(value_of(node).shape[token_dims[node.name]]) for node in given}


def sharded_values(graph: fx.Graph, token_dims: Mapping[str, int]) -> set[fx.Node]:
    """Return the values of a graph that may be sharded: those of tokens, or as long as these, that products come before."""
    found: set[fx.Node] = set()
    lengths = lengths_of(graph, token_dims)
    of_tokens = {node for node in graph.find_nodes(op="placeholder") if node.name in token_dims}
    for node in graph.nodes:
        if any(operand in of_tokens for operand in node.all_input_nodes):
            of_tokens.add(node)
        is_first = node.target in HEAVY and (node in of_tokens or not lengths or has_length(node, lengths))
        if is_first or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def has_length(node: fx.Node, lengths: Collection[str]) -> bool:
    """Tell whether a dim in front of the channels of a value may be one of tokens."""
    return is_tensor(node) and any(str(size) in lengths for size in value_of(node).shape[:-1])


def is_floating(node: fx.Node) -> bool:
    """Tell whether a node computes real numbers; several results are taken to be."""
    return not is_tensor(node) or bool(value_of(node).is_floating_point())


def flops(node: fx.Node) -> int:
    """Return the floating-point operations of a product of matrices, 0 for another operator."""
    if node.target not in PRODUCTS:
        return 0
    call = Call.of(node)
    first = "mat1" if "mat1" in call else "input" if "input" in call else "self"
    return 2 * size_estimate(call.shape(first)[-1]) * prod(size_estimate(n) for n in value_of(node).shape)
