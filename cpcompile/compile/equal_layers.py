"""Equal layers: parts of a graph that repeat, found by what they compute, whatever modules they come from.

Two parts are equal where their operators, fixed arguments, shapes, strides and dtypes are, and where each reads the same results
of itself and the same pattern of others. Layers that alternate (windows of two lengths) repeat with the period of both.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from cpcompile import runtime  # noqa: F401  (registers the operators)
from cpcompile.analysis.gradient_flow import gradient_flow
from cpcompile.capture.writes.aliases import hidden_writes, source_of
from cpcompile.ir.annotation import annotation
from cpcompile.ir.checkpoint_answers import answers_of
from cpcompile.ir.operator_call import is_tensor, size_hint, value_of, values_of
from cpcompile.passes.rewrite_dropout import draws
from cpcompile.runtime.attention.registration import LAYER

MIN_LAYERS = 4  # a call costs the fusions across its border: with fewer layers there is little to gain
MIN_NODES = 16  # of a layer
NUM_PERIODS = 24  # how many distances between equal nodes are tried
ALIGNMENT = 16  # bytes: what a kernel that is compiled once assumes of all that it reads
cp = torch.ops.cpcompile
# Transfers of parameters and of their gradients stay outside, so that they run beside the layer before or behind.
TRANSFERS = (cp.unshard_parameter.default, cp.sum_gradient.default)
Layer = list[fx.Node]


class Run(NamedTuple):
    """A stretch of nodes each of which is equal to the one a period before it."""

    start: int
    period: int
    length: int

    @property
    def num_layers(self) -> int:
        """How many whole periods there are."""
        return self.length // self.period

    @property
    def saved(self) -> int:
        """How many nodes need not be compiled."""
        return self.period * (self.num_layers - 1)


def find_equal_layers(graph: fx.Graph) -> Iterator[tuple[list[Layer], AbstractSet[fx.Node]]]:
    """Yield sets of equal layers, the one that saves most first, and the nodes that gradients may reach; no node is in two.

    The graph holds ATen operators above autograd, with the values that they were traced with. It may be edited between.
    """
    reached = gradient_flow(graph)
    nodes = [node for node in graph.nodes if node.op == "call_function" and node.target not in TRANSFERS]
    keys = [node if must_stay(node) else (*key_of(node), node in reached) for node in nodes]
    while runs := find_runs(keys):
        run = max(runs, key=lambda run: (run.saved, -run.period))
        layers = layers_of(nodes, run, reached)
        if layers:
            yield layers, reached
            reached = gradient_flow(graph)
        taken = {node for layer in layers for node in layer} or set(nodes[run.start : run.start + run.length])
        keys = [node if node in taken else key for node, key in zip(nodes, keys, strict=True)]


def find_runs(keys: Sequence[Any]) -> list[Run]:
    """Return the longest run of each distance at which many nodes repeat, of those that are long enough."""
    last: dict[Any, int] = {}
    distances = Counter[int]()
    for i, key in enumerate(keys):
        distances[i - last.get(key, i)] += 1
        last[key] = i
    periods = [period for period in distances if period >= MIN_NODES]
    likely = sorted(periods, key=lambda period: -distances[period])[:NUM_PERIODS]
    return [run for period in likely if (run := longest_run(keys, period)).num_layers >= MIN_LAYERS]


def longest_run(keys: Sequence[Any], period: int) -> Run:
    """Return the longest stretch with a period."""
    best, start = Run(0, period, 0), 0
    for i in range(len(keys) - period + 1):
        if i == len(keys) - period or keys[i] != keys[i + period]:
            best = max(best, Run(start, period, i - start + period), key=lambda run: run.length)
            start = i + 1
    return best


def layers_of(nodes: Sequence[fx.Node], run: Run, reached: AbstractSet[fx.Node]) -> list[Layer]:
    """Return the layers of a run that can be calls of one subgraph, begun where least travels from one to the next."""
    costs = border_costs(nodes[run.start : run.start + run.length], run.period)
    cheapest = min(range(run.period), key=costs.__getitem__)
    if math.isinf(costs[cheapest]):
        return []
    stop = run.start + run.length - run.period + 1
    starts = range(run.start + cheapest, stop, run.period)
    by_reads: dict[Any, list[Layer]] = {}
    for layer in (list(nodes[start : start + run.period]) for start in starts):
        by_reads.setdefault(reads_of(layer, reached), []).append(layer)
    layers = max(by_reads.values(), key=len)
    # torch 2.11 pairs calls of forward with those of backward, of which a frozen part of a model has none.
    is_frozen = bool(reached) and reached.isdisjoint(layers[0])
    return layers if len(layers) >= MIN_LAYERS and is_sound(layers) and not is_frozen else []


def border_costs(stretch: Sequence[fx.Node], period: int) -> list[float]:
    """Return the bytes that cross the border between two layers, for each node of a layer that could be its first.

    A result that is no tensor cannot cross.
    """
    place = {node: i for i, node in enumerate(stretch)}
    costs = [0.0] * period
    for i, node in enumerate(stretch[period : 2 * period], period):
        if is_made_outside(node):
            continue
        readers = [place[user] for user in readers_of(node) if place.get(user, len(place)) <= i + period]
        value = value_of(node)
        size = size_hint(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else math.inf
        for cut in range(i + 1, max(readers, default=i) + 1):
            costs[cut % period] += size
    return costs


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a result or a view of it."""
    for user in node.users:
        yield user
        if is_made_outside(user):
            yield from readers_of(user)


def arguments_of(node: fx.Node) -> list[Any]:
    """Return all arguments of a node in one list, nodes and others."""
    return tree_flatten((node.args, node.kwargs))[0]


def externals_of(layer: Layer) -> list[fx.Node]:
    """Return what a layer reads of others, in the order of its reads."""
    own = set(layer)
    read = (x for node in layer for x in arguments_of(node) if isinstance(x, fx.Node) and x not in own)
    return list(dict.fromkeys(read))


def reads_of(layer: Layer, reached: AbstractSet[fx.Node]) -> tuple[Any, ...]:
    """Return which results each node of a layer reads: of the layer by their place, of others by their number.

    And what those of others are; `reached` are those that a gradient may reach.
    """
    number = {node: i for i, node in enumerate(layer)} | {x: ~i for i, x in enumerate(externals_of(layer))}
    places = [number[x] for node in layer for x in arguments_of(node) if isinstance(x, fx.Node)]
    read = externals_of(layer)
    return *places, *((signature(value_of(x)), repr(annotation(x).placement), x in reached) for x in read)


def is_made_outside(node: fx.Node) -> bool:
    """Tell whether others that read a node read one made outside of the layer: a view, for calls return no shared memory, or a
    size.
    """
    if isinstance(value_of(node), torch.SymInt):
        return True
    # Of our own operators, several have their operand's value as a placeholder for their own.
    is_own = getattr(node.target, "namespace", "") == "cpcompile" and node.target is not cp.whole_tokens.default
    return not is_own and any(isinstance(x, torch.Tensor) for x in values_of(node)) and source_of(node) is not None


def is_sound(layers: Sequence[Layer]) -> bool:
    """Tell whether what other nodes read of the layers are tensors, and what the layers read lies where kernels expect it."""
    results = (node for layer in layers for node in layer if read_outside(node, set(layer)))
    return all(is_tensor(node) or is_made_outside(node) for node in results) and all(
        is_aligned(value_of(x)) for layer in layers for x in externals_of(layer)
    )


def read_outside(node: fx.Node, own: AbstractSet[fx.Node]) -> bool:
    """Tell whether a node is read by others than `own`."""
    return any(user not in own for user in node.users)


def is_aligned(value: Any) -> bool:
    """Tell whether a value begins where kernels expect it, for all tokens and for those of any rank."""
    if not isinstance(value, torch.Tensor):
        return isinstance(value, torch.SymInt)
    offset = value.storage_offset()
    if isinstance(offset, int) and offset == 0:
        return True
    steps = (offset, *(step for step in value.stride() if step != 1))
    return all(isinstance(x, int) and x * value.element_size() % ALIGNMENT == 0 for x in steps)


def key_of(node: fx.Node) -> tuple[Any, ...]:
    """Return what a node computes: its operator, its fixed arguments, what its results are, and whether they are kept."""
    flat, spec = tree_flatten((node.args, {name: x for name, x in node.kwargs.items() if name != LAYER}))
    fixed = tuple("a result" if isinstance(x, fx.Node) else repr(x) for x in flat)
    kept = str(node.meta.get("recompute")), "ac_graph_id" in node.meta, repr(answers_of(node))
    return node.target, repr(spec), fixed, signature(value_of(node)), repr(annotation(node).placement), kept


def signature(value: Any) -> Any:
    """Return what a fake value says of the real one."""
    if isinstance(value, tuple | list):
        return tuple(map(signature, value))
    if not isinstance(value, torch.Tensor):
        return type(value), str(value)
    return value.dtype, value.device, str(tuple(value.shape)), str(value.stride()), str(value.storage_offset())


def must_stay(node: fx.Node) -> bool:
    """Tell whether a node cannot be part of a call: it writes, draws random numbers, or is no operator."""
    if node.target is operator.getitem or isinstance(value_of(node), torch.SymInt):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or draws(node):
        return True
    writes = node.target._schema.is_mutable or any(hidden_writes(node))
    return writes or any(x.op == "get_attr" for x in node.all_input_nodes)
