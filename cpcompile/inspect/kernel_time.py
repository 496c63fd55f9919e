"""Kernel time: what the kernels of a compiled graph take, told from its operators without running it.

A product takes its operations at the rate that products reach. A generated kernel takes the bytes that it reads and writes at the
rate that kernels reach memory with: which elementwise operators and reductions are one kernel, and what between them is never
stored, is what the prediction of memory has (`memory.timeline`, `memory.kernels`). Attention and messages of tokens are estimated
elsewhere, and are no part of it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.choose.attention_sites import REWRITTEN
from cpcompile.choose.cost import bandwidth_on, products_on
from cpcompile.choose.machine import Machine
from cpcompile.compile.result_memory import body_of, invoke_subgraph
from cpcompile.ir.operator_call import Call, size_estimate, value_of, values_of
from cpcompile.memory.kernels import Kernel, kernels_of
from cpcompile.memory.timeline import bytes_of, stored_results
from cpcompile.runtime.tiles import loss_body
from cpcompile.runtime.tiles.by_rows import function_of, tiles

PRODUCTS, MEMORY, AGAIN = "products", "memory-bound", "computed again"


@dataclass(frozen=True, slots=True)
class Transfer:
    """A message of parameters or of their gradients: the bytes that a rank sends, and among how many ranks."""

    sent: int
    world_size: int


@dataclass(slots=True)
class Spent:
    """What a graph takes.

    Attributes:
        seconds: by kind: products, memory-bound kernels, and both where backward computes again what forward had.
        transfers: messages of parameters and gradients, in their order.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    transfers: list[Transfer] = field(default_factory=list)

    def add(self, other: Spent, times: int = 1) -> None:
        """Add what another graph takes, that runs so many times."""
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds * times
        self.transfers += other.transfers * times


@dataclass(slots=True)
class KernelTime:
    """The walk over graphs.

    Attributes:
        machine: that they run on; None for CPUs.
        ranks: that sums of gradients are among.
        calls: what graphs take that others call, by whether backward calls them.
    """

    machine: Machine | None
    ranks: int
    calls: dict[tuple[fx.Graph, bool], Spent] = field(default_factory=dict)

    def of(self, graph: fx.Graph, is_backward: bool = False) -> Spent:
        """Return what a graph takes."""
        if (graph, is_backward) in self.calls:
            return self.calls[graph, is_backward]
        stored, kept = stored_results(graph)
        sizes = {x: bytes_of(x) for each in stored for x in (each.node, *each.reads)}
        kernels = kernels_of(stored, sizes)
        readers = Counter(x for kernel in kernels for x in kernel.reads - kernel.members.keys())
        total = Spent()
        for kernel in kernels:
            found = self._of_kernel(kernel, kept | readers.keys(), sizes, is_backward)
            if is_backward and all(map(_torch.is_computed_again, kernel.members)):
                found = Spent(Counter({AGAIN: found.seconds.total()}), found.transfers)
            total.add(found)
        self.calls[graph, is_backward] = total
        return total

    def _of_kernel(
        self, kernel: Kernel, stored: Collection[fx.Node], sizes: Mapping[fx.Node, int], is_backward: bool
    ) -> Spent:
        first = next(iter(kernel.members))
        if kernel.elements:
            return self._moving(bytes_moved(kernel, stored, sizes))
        if first.target is invoke_subgraph:
            return self.of(body_of(first).graph, is_backward)
        return self._apart(first, sizes)

    def _apart(self, node: fx.Node, sizes: Mapping[fx.Node, int]) -> Spent:
        """Return what an operator takes that is no part of a generated kernel."""
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        if is_transfer(name):
            return Spent(transfers=[self._transfer(node)])
        if name in ("cpcompile::loss_and_gradients", "cpcompile::loss_chunks"):
            return self._loss(Call.of(node), has_gradients=name.endswith("gradients"))
        if name in ("cpcompile::tiles_forward", "cpcompile::tiles_backward"):
            return self._tiles(Call.of(node), is_backward=name.endswith("backward"))
        if node.target is operator.getitem or is_estimated_elsewhere(node):
            return Spent()
        moved = sum(sizes.get(x, 0) for x in node.all_input_nodes) + sum(map(num_bytes, values_of(node)))
        return self._product(operations(node), moved)

    def _product(self, flops: float, moved: float) -> Spent:
        """Return what a product of so many operations takes, which reads and writes so many bytes."""
        if not flops:
            return self._moving(moved)
        return Spent(Counter({PRODUCTS: max(flops / products_on(self.machine), moved / bandwidth_on(self.machine))}))

    def _moving(self, moved: float) -> Spent:
        return Spent(Counter({MEMORY: moved / bandwidth_on(self.machine)}))

    def _transfer(self, node: fx.Node) -> Transfer:
        """Return the message of a collective of parameters or gradients."""
        arguments = Call.of(node).arguments
        held = max(sum(map(num_bytes, values_of(node))), sum(num_bytes(value_of(x)) for x in node.all_input_nodes))
        ranks = arguments.get("group_size", self.ranks)
        passes = 1 if "group_size" in arguments else 2  # a sum is scattered, and gathered
        return Transfer(passes * held * (ranks - 1) // ranks, ranks)

    def _loss(self, call: Call, *, has_gradients: bool) -> Spent:
        """Return what a loss in chunks takes: its products, what is computed of the logits, and sums over the chunks."""
        hidden, weight, body = value_of(call["hidden"]), value_of(call["weight"]), loss_body.body_of(call["body"])
        rows = number_of(hidden) // size_estimate(hidden.shape[-1])
        chunks = tiles(rows, call["chunk"])
        needs = call["needs"] if has_gradients else [False, False]
        total = Spent()
        total.add(self._product(2 * rows * number_of(weight) * (1 + sum(needs[:2])), 0))
        logits = (chunks[0].stop, size_estimate(weight.shape[0])), hidden.dtype, weight.device
        of_rows = [((chunks[0].stop, *shape[1:]), *rest) for shape, *rest in map(like, call["rows"])]
        if body.provider or not has_gradients:
            passes = 3 if has_gradients else 1
            total.add(self._moving(passes * rows * logits[0][1] * hidden.element_size()))
        else:
            smooth = [r for r in body.results if r.has_gradient]
            shapes = [() if r.inner is None else (chunks[0].stop, *r.inner) for r in smooth]
            grads = [(shape, r.dtype, weight.device) for shape, r in zip(shapes, smooth, strict=True)]

            def step(*given: torch.Tensor) -> Sequence[torch.Tensor]:
                z, *rest = given
                return [*body.eager_step(z, *loss_body.split(rest, len(grads), len(of_rows))), z]

            total.add(self._inside(step, [logits, *grads, *of_rows, *map(like, call["others"])]), len(chunks))
        if has_gradients and needs[1]:  # the sum of the weight's gradient is read and written, in float32
            total.add(self._moving(2 * max(weight.element_size(), 4) * number_of(weight)), len(chunks))
        return total

    def _tiles(self, call: Call, *, is_backward: bool) -> Spent:
        """Return what a function of rows takes for all its tiles, and the sums of what these share."""
        function = function_of(call["function"])
        parts = tiles(size_estimate(value_of(call["rows"][0]).shape[0]), call["tile"])
        given = [call["grads"], call["rows"]] if is_backward else [call["rows"]]
        of_rows = [((parts[0].stop, *shape[1:]), *rest) for x in given for shape, *rest in map(like, x)]
        others = list(map(like, call["others"]))
        forward = found = self._inside(function.function, [*of_rows[-len(call["rows"]) :], *others])
        if is_backward:
            counts, needs = [len(x) for x in given], call["needs"]

            def gradients(*x: torch.Tensor) -> Sequence[torch.Tensor]:
                grads, rows, rest = loss_body.split(x, *counts)
                return function.backward(False, grads, rows, rest, needs)

            found = self._inside(gradients, [*of_rows, *others])
            found.seconds[PRODUCTS] -= forward.seconds[PRODUCTS]
            found.seconds[AGAIN] += forward.seconds[PRODUCTS]
            shared = [x for x, need in zip(call["others"], needs[counts[1] :], strict=True) if need]
            found.add(
                self._moving(sum(2 * max(value_of(x).element_size(), 4) * number_of(value_of(x)) for x in shared))
            )
        total = Spent()
        total.add(found, len(parts))
        return total

    def _inside(self, function: Callable[..., Any], shapes: Sequence[Any]) -> Spent:
        """Return what a function takes on tensors of these shapes, dtypes and devices."""
        found = Spent()
        found.add(self.of(_torch.trace_for_inductor(function, shapes).graph))
        return found


def bytes_moved(kernel: Kernel, stored: Collection[fx.Node], sizes: Mapping[fx.Node, int]) -> int:
    """Return the bytes that a generated kernel reads of what others stored, and writes for others.

    It goes over its elements once, and reads no more elements of an operand than that: of a table the rows that are looked up.
    """
    elements = abs(kernel.elements[0])
    read = [x for x in kernel.reads if x not in kernel.members]
    written = [x for x in kernel.members if x in stored]
    return sum(min(sizes[x], elements * item_size(x)) for x in read) + sum(sizes[x] for x in written)


def operations(node: fx.Node) -> int:
    """Return the floating-point operations of a product, a convolution or an attention of ATen."""
    values = functools.partial(torch.fx.map_arg, fn=lambda x: torch.utils._pytree.tree_map(sized, x.meta["val"]))
    return _torch.floating_point_operations(
        node.target, values(node.args), values(dict(node.kwargs)), torch.utils._pytree.tree_map(sized, value_of(node))
    )


def sized(value: Any) -> Any:
    """Return a tensor without memory of estimated sizes in the place of a tensor, and a number in that of a symbol."""
    if isinstance(value, torch.Tensor):
        return torch.empty([size_estimate(n) for n in value.shape], dtype=value.dtype, device="meta")
    return size_estimate(value) if isinstance(value, torch.SymInt) else value


def is_transfer(name: str) -> bool:
    """Tell whether an operator sends parameters or their gradients."""
    return name == "cpcompile::start_sum" or (name.startswith("_c10d_functional::") and "wait_tensor" not in name)


def is_estimated_elsewhere(node: fx.Node) -> bool:
    """Tell whether an operator is an attention or its gradient, or sends tokens."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("cpcompile::"):
        return False
    return node.target in REWRITTEN or "_attention" in schema.name or any(a.name == "group" for a in schema.arguments)


def like(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Return the shape, dtype and device of a tensor."""
    value = value_of(node)
    return tuple(map(size_estimate, value.shape)), value.dtype, value.device


def number_of(value: torch.Tensor) -> int:
    """Return how many elements a tensor has."""
    return math.prod(map(size_estimate, value.shape))


def num_bytes(value: Any) -> int:
    """Return the bytes of the elements of a tensor; 0 of anything else."""
    return number_of(value) * value.element_size() if isinstance(value, torch.Tensor) else 0


def item_size(node: fx.Node) -> int:
    """Return the bytes of an element of a value."""
    value = value_of(node)
    return int(value.element_size()) if isinstance(value, torch.Tensor) else 0
