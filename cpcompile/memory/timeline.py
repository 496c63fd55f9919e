"""Timeline: the bytes that a compiled graph holds while it runs, told from the graph of its operators.

Inductor computes chains of elementwise operators in one kernel and never stores what is between. A value is stored here where
Inductor stores it (torch 2.11 to 2.14, `torch/_inductor/graph.py`: what operators outside of its own kernels read, outputs,
reductions, and chains that read too much), and freed behind the last kernel that reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from cpcompile.compile.offload import is_in_host_memory
from cpcompile.compile.result_memory import body_of, invoke_subgraph, is_apart, readers_of, root_of
from cpcompile.ir.operator_call import Call, size_hint, value_of
from cpcompile.memory.kernels import Kernel, Stored, kernels_of

aten = torch.ops.aten
REDUCTIONS = frozenset(
    getattr(aten, name)
    for name in [
        "sum",
        "mean",
        "amax",
        "amin",
        "var",
        "var_mean",
        "argmax",
        "argmin",
        "any",
        "all",
        "prod",
        "cumsum",
        "cumprod",
        "logcumsumexp",
        "max",
        "min",
    ]
)
# From so many stored values that a chain reads, or so many operators, Inductor stores what several readers share
# (`realize_reads_threshold`, `realize_opcount_threshold`), and from so many any chain (`realize_acc_reads_threshold`).
SHARED_READS, SHARED_OPERATORS, MOST_READS = 4, 30, 8
ALIGNMENT = 512  # of torch's allocator


@dataclass(frozen=True, slots=True)
class Moment:
    """What is held while one operator runs: bytes by kind, and the node."""

    node: fx.Node | None
    held: Mapping[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.held.values())


@dataclass(slots=True)
class _Chain:
    """What one result is computed from, if nothing between is stored."""

    reads: frozenset[fx.Node]  # stored results, and inputs
    operators: int


@dataclass(slots=True)
class Timeline:
    """The walk over one graph.

    Attributes:
        kind_of: the kind of an input, and of a result that is returned; other results are "temporary".
        workspace: what an operator needs while it runs, beside operands and results.
        owned: inputs that are freed behind their last reader; others are held by somebody else.
        late: values that are freed behind a later node than their last reader.
        calls: what graphs hold that this one calls.
    """

    graph: fx.Graph
    kind_of: Callable[[fx.Node], str]
    workspace: Callable[[fx.Node], int]
    owned: Callable[[fx.Node], bool]
    late: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    calls: dict[fx.Graph, list[Moment]] = field(default_factory=dict)

    def run(self) -> list[Moment]:
        """Return a moment for each kernel that stores something or needs room."""
        stored, kept = stored_results(self.graph)
        given = [x for x in self.graph.nodes if x.op in ("placeholder", "get_attr")]
        self._add_up(given, stored, kept)
        return self.moments

    def _inside(self, node: fx.Node) -> list[Moment]:
        """Return what a call of a layer holds while it runs, beside its operands: it frees none of them."""
        if node.target is not invoke_subgraph:
            return []
        graph = body_of(node).graph
        if graph not in self.calls:
            inner = Timeline(graph, kind_inside, self.workspace, lambda _: False, calls=self.calls).run()
            self.calls[graph] = [Moment(m.node, {k: v for k, v in m.held.items() if k != "external"}) for m in inner]
        return self.calls[graph]

    def _add_up(self, given: list[fx.Node], stored: list[Stored], kept: set[fx.Node]) -> None:
        values = [*given, *(each.node for each in stored)]
        kinds = {node: self.kind_of(node) for node in values}
        sizes = {node: bytes_of(node) for node in values}
        kernels = kernels_of(stored, sizes)
        place = {node: i for i, kernel in enumerate(kernels) for node in kernel.members}
        last = dict.fromkeys(given, -1) | place
        readers = Counter[fx.Node]()
        for i, kernel in enumerate(kernels):
            readers.update(kernel.reads)
            last.update((x, max(last[x], i)) for x in kernel.reads)
        last.update((x, max(last[x], place[behind])) for x, behind in self.late.items())
        dying: dict[int, dict[fx.Node, None]] = {i: {} for i in range(-1, len(kernels))}
        for node, at in last.items():
            if node not in kept and (node in place or self.owned(node)):
                dying[at][node] = None
        held = Counter[str]()
        for node in given:
            held[kinds[node]] += sizes[node]
        self.moments.append(Moment(None, dict(held)))
        for node in dying[-1]:  # inputs that nothing reads
            held[kinds[node]] -= sizes[node]
        for i, kernel in enumerate(kernels):
            self.moments += [Moment(m.node, held + Counter(m.held)) for m in self._inside(next(iter(kernel.members)))]
            for node, each in kernel.members.items():
                if each.elements and node in dying[i] and readers[node]:
                    del dying[i][node]  # never leaves the kernel
                    continue
                reused = next((x for x in dying[i] if each.elements and is_overwritten(x, each, kernel, sizes)), None)
                if reused is not None:
                    del dying[i][reused]
                    held[kinds[reused]] -= sizes[reused]
                held[kinds[node]] += sizes[node]
            first = next(iter(kernel.members))
            room = self.workspace(first)
            self.moments.append(Moment(first, dict(held) | ({"workspace": room} if room else {})))
            for x in dying[i]:
                held[kinds[x]] -= sizes[x]
        self.moments.append(Moment(None, dict(held)))


def stored_results(graph: fx.Graph) -> tuple[list[Stored], set[fx.Node]]:
    """Return what the operators of a graph store, and what of it is returned."""
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    (output,) = graph.find_nodes(op="output")
    roots = {node: root_of(node) for node in nodes}
    returned = {roots[node] for node in output.all_input_nodes}
    chains: dict[fx.Node, _Chain] = {}
    stored: dict[fx.Node, Stored] = {}

    def read(x: fx.Node, at: int) -> _Chain:
        """Return what is read of a value: it, or, as long as it is not stored, what it is computed from."""
        x = roots[x]
        is_chain = x in chains and (x not in stored or stored[x].place[0] > at)
        return chains[x] if is_chain else _Chain(frozenset([x]), 0)

    for i, node in enumerate(nodes):
        if node.op in ("placeholder", "get_attr", "output") or roots[node] is not node:
            continue
        inputs = [read(x, i) for x in node.all_input_nodes]
        chain = chains[node] = _Chain(
            frozenset(x for each in inputs for x in each.reads), 1 + sum(each.operators for each in inputs)
        )
        at = stored_at(node, chain, node in returned, place)
        if at is not None:
            stored[node] = Stored(node, chain.reads, (at, i), elements_of(node))
    kept = {x for node in output.all_input_nodes for x in read(node, len(nodes)).reads}
    return list(stored.values()), kept


def kind_inside(node: fx.Node) -> str:
    """Return what kind a value is of that a call of a layer holds."""
    return "external" if node.op in ("placeholder", "get_attr") else "temporary"


def is_overwritten(value: fx.Node, stored: Stored, kernel: Kernel, sizes: Mapping[fx.Node, int]) -> bool:
    """Tell whether a kernel writes a result in the place of a value that it reads last (`decide_inplace_update`)."""
    is_read = value in stored.reads and value not in kernel.members
    return is_read and sizes[value] == sizes[stored.node] and kernel.readers(value, stored.node) == [stored.node]


def stored_at(node: fx.Node, chain: _Chain, is_returned: bool, place: Mapping[fx.Node, int]) -> int | None:
    """Return where Inductor decides to store the result of a node: there, or where it is first read; None where it never does."""
    if is_apart(node) or node.target.overloadpacket in REDUCTIONS:  # type: ignore[union-attr]
        return place[node]
    readers = readers_of(node)
    is_heavy = len(chain.reads) > SHARED_READS or chain.operators > SHARED_OPERATORS
    if len(chain.reads) > MOST_READS or (len(readers) > 1 and is_heavy):
        return place[node]
    first = min((place[x] for x in readers if is_apart(x)), default=None)
    if any(x.op == "output" or (is_apart(x) and len(chain.reads) > 1) for x in node.users):
        return place[node]
    return len(place) if first is None and is_returned else first


def elements_of(node: fx.Node) -> tuple[int, ...]:
    """Return how many elements a generated kernel goes over for a result, and how many it reduces them to; () of others.

    The former below 0 where it keeps the last dim: it goes over them in another order than elementwise operators do.
    """
    if is_apart(node):
        return ()
    value = value_of(node)
    numel = size_hint(value.numel()) if isinstance(value, torch.Tensor) else 0
    if node.target.overloadpacket in REDUCTIONS:  # type: ignore[union-attr]
        source, dims = value_of(node.all_input_nodes[0]), Call.of(node).arguments.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        keeps_last = all(dim % source.dim() != source.dim() - 1 for dim in dims or [-1])
        return size_hint(source.numel()) * (-1 if keeps_last else 1), numel
    return (numel,)


def bytes_of(node: fx.Node) -> int:
    """Return the bytes that a node stores on a device, as the allocator counts them; what takes one of several results has it."""
    if is_in_host_memory(node):
        return 0
    return -(-bytes_of_value(value_of(node)) // ALIGNMENT) * ALIGNMENT


def bytes_of_value(value: object) -> int:
    """Return the bytes of the memory of a tensor, 0 of anything else."""
    return size_hint(value.untyped_storage().nbytes()) if isinstance(value, torch.Tensor) else 0
