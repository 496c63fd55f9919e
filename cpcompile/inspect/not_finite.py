"""Not finite: the first value or gradient of one device that is NaN or infinite, with which nothing can be compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from cpcompile.capture.writes.aliases import written_arguments
from cpcompile.errors import where
from cpcompile.inspect.graph_listing import input_name

Tensor = torch.Tensor
aten = torch.ops.aten

# What is in new memory before something is written there means nothing.
UNWRITTEN = {
    *(getattr(aten, name).default for name in ("empty_like", "new_empty", "empty_strided", "new_empty_strided")),
    aten.empty.memory_format,
}


@dataclass(frozen=True, slots=True)
class NotFinite:
    """Where the program of one device stops being finite.

    Attributes:
        names: what is not finite: `the loss`, parameters whose gradient is not, buffers.
        node: the first operator whose value or gradient is not, although what it is computed from is; '' where the user's
            objective makes it of finite outputs.
        what: `NaN` or `infinite`.
        place: the user's line.
        is_gradient: it is the gradient that the operator makes in backward, not its value.
    """

    names: tuple[str, ...]
    node: str
    what: str
    place: str
    is_gradient: bool = False

    def __str__(self) -> str:
        more = f" and {len(self.names) - 4} more" if len(self.names) > 4 else ""
        head = f"on one device not finite: {', '.join(self.names[:4])}{more}"
        if not self.node:
            return f"{head}\n  every value of the model is finite: the objective makes {self.what} of them"
        kind = "the gradient of" if self.is_gradient else "the value of"
        return f"{head}\n  first {self.what}: {kind} {self.node}\n  {self.place}"


class Watch:
    """A Dynamo backend that runs a captured graph on one device and notes what is not finite.

    Attributes:
        kinds: of each node whose value is not: `NaN` or `infinite`.
        gradients: the same of each node whose gradient is not, in the order of backward.
        reached: all nodes that a gradient reached.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.kinds: dict[fx.Node, str] = {}
        self.gradients: dict[fx.Node, str] = {}
        self.reached: set[fx.Node] = set()
        self._handles: list[Any] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return Recorder(self).run

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """While active, a run may leave hooks on parameters."""
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def note_value(self, node: fx.Node, value: Any) -> None:
        """Note whether a value is finite, and, when it comes, whether its gradient is."""
        kinds = [kind for x in tree_leaves(value) if isinstance(x, Tensor) and (kind := kind_of(x))]
        if kinds and node.op != "output" and node.target not in UNWRITTEN:
            self.kinds[node] = "NaN" if "NaN" in kinds else kinds[0]
        if isinstance(value, Tensor) and value.requires_grad:
            hook = value.register_hook(lambda grad: self._note_gradient(node, grad))  # type: ignore[no-untyped-call]
            self._handles.append(hook)

    def _note_gradient(self, node: fx.Node, grad: Tensor) -> None:
        self.reached.add(node)
        kind = kind_of(grad)
        if kind:
            self.gradients.setdefault(node, kind)

    def first(self, loss: Tensor, names: Sequence[str]) -> NotFinite:
        """Return where it begins, once the model has run and back-propagated; `names` are not finite."""
        (output,) = self.graph.graph.find_nodes(op="output")
        writes = [node for node in self.graph.graph.nodes if written_arguments(node)]
        if not bool(loss.isfinite()):
            source = self._source(output.all_input_nodes)
        elif self.gradients:
            reached, kind = next(iter(self.gradients.items()))
            place = self._gradient_source(reached)
            return NotFinite(tuple(names), name_of(place), kind, where(place).strip(), is_gradient=True)
        else:
            source = self._source(writes)
        if source is None:
            return NotFinite(tuple(names), "", kind_of(loss) or "NaN", "")
        return NotFinite(tuple(names), name_of(source), self.kinds[source], where(source).strip())

    def _source(self, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """Return where one of `nodes` stops being finite: the last of the operands of operands on the way up."""
        node = self._worst(nodes)
        while node is not None:
            earlier = self._worst(node.all_input_nodes)
            if earlier is None:
                break
            node = earlier
        return node

    def _worst(self, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """Return the node to look into: one that is NaN, else one that is infinite and was not meant to be."""
        kinds = {node: self.kinds[node] for node in nodes if node in self.kinds and not is_meant(node, self.kinds)}
        return next((node for node in kinds if kinds[node] == "NaN"), next(iter(kinds), None))

    def _gradient_source(self, node: fx.Node) -> fx.Node:
        """Return the operator that makes the gradient of `node` not finite of one that is."""
        users = [user for user in node.users if user in self.reached and user not in self.gradients]
        return users[0] if users else node


class Recorder(fx.Interpreter):
    """Runs the graph of a `Watch`."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(watch.graph)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; note whether it is finite."""
        result = super().run_node(n)
        self.watch.note_value(n, result)
        return result


def is_meant(node: fx.Node, kinds: Mapping[fx.Node, str]) -> bool:
    """Tell whether an infinite value was written as one: masks hold -inf, and so does what is added to them.

    `kinds` is what is known of nodes whose values are not finite.
    """
    if kinds[node] == "NaN":
        return False
    if node.op == "placeholder":
        return not is_trained(node)
    if node.op == "get_attr":
        return True
    if any(isinstance(x, float) and math.isinf(x) for x in tree_leaves((node.args, node.kwargs))):
        return True
    operands = [operand for operand in node.all_input_nodes if operand in kinds]
    return bool(operands) and all(is_meant(operand, kinds) for operand in operands)


def kind_of(x: Tensor) -> str:
    """Return `NaN` or `infinite` for a tensor that holds such a number, '' for others."""
    if not (x.is_floating_point() or x.is_complex()) or bool(x.isfinite().all()):
        return ""
    return "NaN" if bool(x.isnan().any()) else "infinite"


def name_of(node: fx.Node) -> str:
    """Return the name of a node, or of the input or parameter that it is."""
    return input_name(node) if node.op == "placeholder" else node.name


def is_trained(node: fx.Node) -> bool:
    """Tell whether an input of the graph is a parameter that is trained."""
    return bool(getattr(node.meta.get("val"), "requires_grad", False))
