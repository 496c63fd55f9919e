"""Kernels: which stored results one generated kernel computes, and the order in which kernels run (torch 2.11 to 2.14).

As `torch/_inductor/scheduler.py` has it: elementwise operators and reductions over the same elements become one kernel where one
reads what the other reads or returns, wherever they stand, unless a third must run between the two. A kernel stands where its
first operator stands, behind all that it needs.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

FAR = 64  # operators, beyond which Inductor fuses only what takes no more memory for it (`are_long_distant_nodes`)


@dataclass(slots=True)
class Stored:
    """A stored result.

    Attributes:
        node: the operator.
        reads: stored results, and inputs.
        place: where Inductor decides to store it, and the operator itself.
        elements: how many a generated kernel computes, and how many results a reduction makes of them; () of any other operator.
    """

    node: fx.Node
    reads: frozenset[fx.Node]
    place: tuple[int, int]
    elements: tuple[int, ...] = ()


@dataclass(slots=True)
class Kernel:
    """What runs at once: one operator, or several that are fused. `behind` has a bit for each kernel that must run before."""

    number: int
    place: int
    elements: tuple[int, ...]
    members: dict[fx.Node, Stored] = field(default_factory=dict)
    reads: set[fx.Node] = field(default_factory=set)
    behind: int = 0

    def add(self, stored: Stored) -> None:
        """Have the kernel compute one more result."""
        self.members[stored.node] = stored
        self.reads |= stored.reads
        self.elements = max(self.elements, stored.elements, key=len)

    def readers(self, value: fx.Node, but_before: fx.Node) -> list[fx.Node]:
        """Return which members read a value, but for those that are computed before a member."""
        before, stack = set[fx.Node](), [but_before]
        while stack:
            found = self.members[stack.pop()].reads & self.members.keys() - before
            before |= found
            stack += found
        return [node for node, stored in self.members.items() if value in stored.reads and node not in before]


def kernels_of(results: Sequence[Stored], sizes: Mapping[fx.Node, int]) -> list[Kernel]:
    """Return the kernels that compute results, in the order in which they run."""
    kernels: list[Kernel] = []
    kernel: Kernel | None
    made_by: dict[fx.Node, Kernel] = {}
    touched_by: dict[fx.Node, list[Kernel]] = defaultdict(list)  # by generated kernels
    for number, stored in enumerate(sorted(results, key=lambda each: each.place)):
        needs = [made_by[x] for x in stored.reads if x in made_by]
        if stored.node.target is operator.getitem:  # one of several results
            (kernel,) = needs
        else:
            kernel = fused_with(stored, number, needs, touched_by, sizes)
        if kernel is None:
            kernel = Kernel(len(kernels), number, stored.elements)
            kernels.append(kernel)
        kernel.add(stored)
        made_by[stored.node] = kernel
        behind = kernel.behind
        for need in needs:
            if need is not kernel:
                behind |= need.behind | 1 << need.number
        if behind != kernel.behind:
            for each in kernels:
                if each is kernel or each.behind >> kernel.number & 1:
                    each.behind |= behind
        if stored.elements:
            for x in (*stored.reads, stored.node):
                if not touched_by[x] or touched_by[x][-1] is not kernel:
                    touched_by[x].append(kernel)
    return in_order(kernels, made_by)


def fused_with(
    stored: Stored,
    number: int,
    needs: Sequence[Kernel],
    touched_by: Mapping[fx.Node, Sequence[Kernel]],
    sizes: Mapping[fx.Node, int],
) -> Kernel | None:
    """Return the kernel that a result is computed in with most bytes in common; None where it is by itself."""
    shared: dict[int, int] = defaultdict(int)
    found: dict[int, Kernel] = {}
    for x in stored.reads if stored.elements else ():
        for kernel in {each.number: each for each in touched_by.get(x, ())}.values():
            if number - kernel.place <= FAR and fit(kernel.elements, stored.elements):
                shared[kernel.number] += sizes[x]
                found[kernel.number] = kernel
    for each in sorted(shared, key=lambda i: (-shared[i], -i)):
        if not any(need.behind >> each & 1 for need in needs):
            return found[each]
    return None


def fit(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Tell whether one kernel can go over the elements of two: all of them, or those that one reduces to."""
    if len(one) == len(other):
        return one == other
    return min(one, other, key=len)[0] in max(one, other, key=len)


def in_order(kernels: Sequence[Kernel], made_by: Mapping[fx.Node, Kernel]) -> list[Kernel]:
    """Return kernels by their places, each behind those that it needs."""
    order: dict[int, Kernel] = {}
    for kernel in kernels:
        stack = [kernel]
        while stack:
            top = stack[-1]
            missing = {made_by[x].number: made_by[x] for x in top.reads if x in made_by}
            missing = {i: each for i, each in missing.items() if i not in order and each is not top}
            if missing:
                stack += [missing[i] for i in sorted(missing, reverse=True)]
            else:
                order.setdefault(stack.pop().number, top)
    return list(order.values())
