"""Layer marks: compiled programs and graphs that run operator by operator say which layer they come to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile._torch.trace import is_profiled

BACKWARD = " backward"


@dataclass(frozen=True, slots=True)
class LayerMarks:
    """What tells layers apart, and who is told.

    Attributes:
        name_of: returns the layer that a node is of; '' for none.
        enter: a function of a module, which is called with the name of a layer, ` backward` behind it in backward, and with ''
            where a layer ends and none begins.
    """

    name_of: Callable[[fx.Node], str]
    enter: Callable[[str], None]

    def after(self, current: str, node: fx.Node, is_backward: bool) -> str:
        """Return what is entered at a node behind `current`; nodes of no layer are what the model itself does, and in backward
        mostly sums of gradients, which stay where they are.
        """
        name = self.name_of(node)
        if is_backward:
            return f"{name}{BACKWARD}" if name else current
        return name


@contextlib.contextmanager
def in_generated_code(marks: LayerMarks | None) -> Iterator[None]:
    """Have the Python that Inductor writes call `enter` between kernels of different layers (torch 2.11 to 2.14).

    No operator is added, so that kernels are fused as they were. A layer that is a call of a function is one stretch; what runs
    inside of it, or is replayed by a CUDA graph, has no marks.
    """
    if marks is None:
        yield
        return
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.virtualized import V

    writer: Any = PythonWrapperCodegen
    enter_context, generate_return = writer.enter_context, writer.generate_return
    function, open_layers = marks.enter.__name__, dict[int, str]()

    def enter_with_mark(self: Any, node: fx.Node) -> None:
        enter_context(self, node)
        if type(self) is not writer:
            return
        current = open_layers.get(id(self), "")
        name = marks.after(current, node, V.graph.is_backward)
        if name != current:
            open_layers[id(self)] = name
            V.graph.scheduler.flush()  # on a CPU, kernels of the layer before may not have been written yet
            self.add_import_once(f"from {marks.enter.__module__} import {function}")
            self.writeline(f"{function}({name!r})")

    def return_with_mark(self: Any, results: list[str]) -> None:
        if open_layers.pop(id(self), ""):
            self.wrapper_call.writeline(f"{function}('')")
        generate_return(self, results)

    writer.enter_context, writer.generate_return = enter_with_mark, return_with_mark
    try:
        yield
    finally:
        writer.enter_context, writer.generate_return = enter_context, generate_return


def closing(run: Callable[..., Any], marks: LayerMarks | None) -> Callable[..., Any]:
    """Return a compiled function that leaves no layer open where it raises."""
    if marks is None:
        return run
    enter = marks.enter

    @functools.wraps(run)
    def run_closing(*inputs: Any) -> Any:
        try:
            return run(*inputs)
        finally:
            enter("")

    return run_closing


def with_marks(
    gm: fx.GraphModule, run: Callable[..., Any], marks: LayerMarks | None, is_backward: bool = False
) -> Callable[..., Any]:
    """Return a function that runs a graph: by `run`, or node by node with calls of `enter` while a profiler runs.

    What autograd records meanwhile has the same calls in backward.
    """
    if marks is None:
        return run

    def run_marked(*inputs: Any) -> Any:
        return MarkedRun(gm, marks, is_backward).run(*inputs) if is_profiled() else run(*inputs)

    return run_marked


class MarkedRun(fx.Interpreter):
    """Runs a graph, and says which layer it comes to."""

    def __init__(self, gm: fx.GraphModule, marks: LayerMarks, is_backward: bool) -> None:
        super().__init__(gm)
        self.marks, self.is_backward, self.layer = marks, is_backward, ""

    def run(self, *inputs: Any, **options: Any) -> Any:
        try:
            return super().run(*inputs, **options)
        finally:
            self.enter("")

    def enter(self, name: str) -> None:
        if name != self.layer:
            self.layer = name
            self.marks.enter(name)

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method", "call_module"):
            return super().run_node(n)
        self.enter(self.marks.after(self.layer, n, self.is_backward))
        before = records_of([self.env[x] for x in n.all_input_nodes])
        result = super().run_node(n)
        if torch.is_grad_enabled() and self.layer:
            self.mark_records(records_of([result]), before)
        return result

    def mark_records(self, records: set[Any], before: set[Any]) -> None:
        """Have backward of what autograd recorded of a node say its layer: each record by itself, inside of the profiler's own
        range of it.
        """
        enter, name = self.marks.enter, f"{self.layer}{BACKWARD}"
        stack, seen = list(records), set(before)
        while stack:
            record = stack.pop()
            if record is None or record in seen or not record.next_functions:
                continue
            seen.add(record)
            record.register_prehook(functools.partial(call_with, enter, name))
            record.register_hook(functools.partial(call_with, enter, ""))
            stack += [each for each, _ in record.next_functions]


def call_with(function: Callable[[str], None], name: str, *_: Any) -> None:
    """Call a function as a hook, which changes no gradient."""
    function(name)


def records_of(values: Sequence[Any]) -> set[Any]:
    """Return what autograd has recorded of some results: of tensors, and of those in tuples."""
    found = set()
    for value in values:
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, torch.Tensor) and each.grad_fn is not None:
                found.add(each.grad_fn)
    return found
