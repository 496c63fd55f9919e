"""Timeline: the bytes that a compiled graph holds while it runs, told from the graph of its operators.

Inductor computes chains of elementwise operators in one kernel and never stores what is between. A value is stored here where
Inductor stores it (torch 2.11 to 2.14, `torch/_inductor/graph.py`: what operators outside of its own kernels read, outputs,
reductions, and chains that read too much), and freed behind the last kernel that reads it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from cpcompile.compile.offload import is_in_host_memory
from cpcompile.compile.stored import is_apart, readers_of, root_of
from cpcompile.ir.operator_call import size_hint, value_of

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
class _Value:
    """A stored value, or a chain that is computed where it is read."""

    reads: frozenset[fx.Node] = frozenset()  # stored values
    operators: int = 0


@dataclass(slots=True)
class Timeline:
    """The walk over one graph.

    Attributes:
        kind_of: the kind of an input, and of a result that is returned; other results are "temporary".
        workspace: what an operator needs while it runs, beside operands and results.
        owned: inputs that are freed behind their last reader; others are held by somebody else.
        late: values that are freed behind a later node than their last reader.
    """

    graph: fx.Graph
    kind_of: Callable[[fx.Node], str]
    workspace: Callable[[fx.Node], int]
    owned: Callable[[fx.Node], bool]
    late: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)

    def run(self) -> list[Moment]:
        """Return a moment for each operator that stores something or needs room."""
        nodes = list(self.graph.nodes)
        place = {node: i for i, node in enumerate(nodes)}
        (output,) = self.graph.find_nodes(op="output")
        roots = {node: root_of(node) for node in nodes}
        returned = {roots[node] for node in output.all_input_nodes}
        values: dict[fx.Node, _Value] = {}
        stored_at: dict[fx.Node, int] = {}
        last: dict[fx.Node, int] = {}
        for node in nodes:
            if node.op == "placeholder" or node.op == "get_attr":
                values[node], stored_at[node], last[node] = _Value(frozenset([node]), 0), -1, -1
                continue
            inputs = [values[x] for x in node.all_input_nodes]
            reads = frozenset(x for value in inputs for x in value.reads)
            if node.op == "output":
                for x in reads:
                    last[x] = len(nodes)
                continue
            if roots[node] is not node:  # a view
                values[node] = _Value(values[roots[node]].reads, values[roots[node]].operators)
                continue
            chain = _Value(reads, 1 + sum(value.operators for value in inputs))
            if is_stored(node, chain, node in returned):
                for x in reads:
                    last[x] = place[node]
                stored_at[node] = place[node.all_input_nodes[0] if node.target is operator.getitem else node]
                last[node] = place[node]
                values[node] = _Value(frozenset([node]), 0)
            else:
                values[node] = chain
        for node, behind in self.late.items():
            last[node] = max(last.get(node, 0), place[behind])
        self._add_up(nodes, place, stored_at, last)
        return self.moments

    def _add_up(
        self,
        nodes: list[fx.Node],
        place: Mapping[fx.Node, int],
        stored_at: Mapping[fx.Node, int],
        last: dict[fx.Node, int],
    ) -> None:
        held: Counter[str] = Counter()
        kinds = {node: self.kind_of(node) for node in stored_at}
        sizes = {node: bytes_of(node) for node in stored_at}
        freed: dict[int, list[fx.Node]] = {}
        for node, at in last.items():
            if stored_at[node] >= 0 or self.owned(node):
                freed.setdefault(at, []).append(node)
            if stored_at[node] < 0:
                held[kinds[node]] += sizes[node]
        self.moments.append(Moment(None, dict(held)))
        for node in freed.get(-1, []):  # inputs that nothing reads
            held[kinds[node]] -= sizes[node]
        made: dict[int, list[fx.Node]] = {}
        for node, at in stored_at.items():
            made.setdefault(at, []).append(node)
        for at in sorted({at for at in (*made, *freed) if 0 <= at < len(nodes)}):
            dying = list(freed.get(at, []))
            for node in made.get(at, []):
                # One kernel writes in the place of what it reads last.
                reused = next((x for x in dying if x is not node and sizes[x] == sizes[node]), None)
                if reused is not None and not is_apart(node):
                    dying.remove(reused)
                    held[kinds[reused]] -= sizes[reused]
                held[kinds[node]] += sizes[node]
            room = self.workspace(nodes[at])
            self.moments.append(Moment(nodes[at], dict(held) | ({"workspace": room} if room else {})))
            for x in dying:
                held[kinds[x]] -= sizes[x]
        self.moments.append(Moment(None, dict(held)))


def is_stored(node: fx.Node, chain: _Value, is_returned: bool) -> bool:
    """Tell whether Inductor stores the result of a node."""
    if is_returned or is_apart(node) or node.target.overloadpacket in REDUCTIONS:  # type: ignore[union-attr]
        return True
    readers = readers_of(node)
    if any(is_apart(x) for x in readers):
        return True
    is_heavy = len(chain.reads) > SHARED_READS or chain.operators > SHARED_OPERATORS
    return len(chain.reads) > MOST_READS or (len(readers) > 1 and is_heavy)


def bytes_of(node: fx.Node) -> int:
    """Return the bytes that a node stores on a device, as the allocator counts them; what takes one of several results has it."""
    if is_in_host_memory(node):
        return 0
    return -(-bytes_of_value(value_of(node)) // ALIGNMENT) * ALIGNMENT


def bytes_of_value(value: object) -> int:
    """Return the bytes of the memory of a tensor, 0 of anything else."""
    return size_hint(value.untyped_storage().nbytes()) if isinstance(value, torch.Tensor) else 0
