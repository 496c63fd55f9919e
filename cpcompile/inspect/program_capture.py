"""Program capture: a captured graph written as a program, with the values of its calls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from cpcompile.capture.writes.aliases import hidden_writes, written_arguments
from cpcompile.compile.inner import input_names
from cpcompile.errors import CPError
from cpcompile.inspect.program import TAKEN, Program, Ref, Source, Step, kept

aten, cp = torch.ops.aten, torch.ops.cpcompile


def program_of(gm: fx.GraphModule, given: Sequence[Any], token_dims: Mapping[str, int]) -> Program:
    """Return a captured graph as a program; `given` are its flat inputs, `token_dims` those of its placeholders.

    Raises:
        CPError: it holds what cannot be written.
    """
    inputs, refs = input_names(gm), dict[fx.Node, Any]()
    sources, steps, taken = list[Source](), list[Step](), set(TAKEN)

    def named(text: str) -> str:
        name = re.sub(r"\W+", "_", text).strip("_") or "x"
        name = f"x{name}" if name[0].isdigit() else name
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    values = iter(given)
    sizes = sizes_of(gm)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = next(values)
            if isinstance(value, torch.Tensor):
                is_input, is_parameter = node.name in inputs, isinstance(value, torch.nn.Parameter)
                kind = "input" if is_input else "parameter" if is_parameter else "buffer"
                name = named(inputs[node.name] if is_input else short(node.name))
                sources.append(Source(name, kind, value, token_dims.get(node.name)))
                refs[node] = Ref(name)
            elif node not in sizes:
                refs[node] = value
        elif node.op == "get_attr":
            value = getattr(gm, str(node.target))
            if not isinstance(value, torch.Tensor):
                raise CPError(f"{node.target} is a graph inside the graph, which cannot be written as calls.")
            refs[node] = Ref(named(node.name))
            sources.append(Source(refs[node].name, "buffer", value))
    for node, (of, dim) in sizes.items():
        name = named(node.name)
        steps.append(Step(name, aten.sym_size.int, (refs[of], dim), {}, False))
        refs[node] = Ref(name)
    for node in calls_of(gm):
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), refs.__getitem__)
        acts = bool(written_arguments(node)) or any(hidden_writes(node)) or not is_valued(node)
        assert callable(node.target)
        step = Step(named(node.name), node.target, tuple(args), dict(kwargs), acts)
        _ = step.text  # what cannot be written is refused
        steps.append(step)
        refs[node] = Ref(step.name)
    (output,) = gm.graph.find_nodes(op="output")
    results = [refs[node] for node in output.all_input_nodes]
    return Program(tuple(sources), tuple(steps), tuple(x.name for x in results if isinstance(x, Ref)))


def write_out_backwards(gm: fx.GraphModule) -> None:
    """Make a backward of the model's own (`torch.autograd.Function`) calls like others, whose results the graph returns.

    A program of calls has no place for it, and whether it still fails as the model does is tried.
    """
    (output,) = gm.graph.find_nodes(op="output")
    returned = [output.args[0]]
    for call in gm.graph.find_nodes(op="call_function", target=cp.own_gradient.default):
        results, operands, _, gradients = call.args
        for item in list(call.users):
            item.replace_all_uses_with(results[item.args[1]])
            gm.graph.erase_node(item)
        gm.graph.erase_node(call)
        for operand in operands:
            for user in [user for user in operand.users if user.target is aten.detach.default]:
                user.replace_all_uses_with(operand)
        returned += gradients
    for node in gm.graph.find_nodes(op="call_function", target=cp.incoming_gradient.default):
        node.target = aten.ones_like.default
    if len(returned) > 1:
        output.args = (tuple(returned),)
        gm.graph.eliminate_dead_code()
        gm.recompile()


def calls_of(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the calls of a graph in order."""
    return [node for node in gm.graph.nodes if node.op == "call_function"]


def is_valued(node: fx.Node) -> bool:
    """Tell whether a call has a value: one without changes a mode."""
    return node.meta.get("val") is not None


def sizes_of(gm: fx.GraphModule) -> dict[fx.Node, tuple[fx.Node, int]]:
    """Return, for each placeholder that is a symbolic size, a tensor and its dim of this size."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    dims: dict[str, tuple[fx.Node, int]] = {}
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                dims.setdefault(str(size), (node, dim))
    symbols = [node for node in placeholders if isinstance(node.meta.get("val"), torch.SymInt)]
    return {node: dims[str(node.meta["val"])] for node in symbols if str(node.meta["val"]) in dims}


def short(name: str) -> str:
    """Return the name of a parameter without what Dynamo puts around it."""
    return re.sub(r"^l_(self|fn|model)_|_?(modules|parameters|buffers)_", "_", name)


def recorded(gm: fx.GraphModule, program: Program, given: Sequence[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each step with its value when it was made, and what the graph knows of it."""
    nodes = calls_of(gm)
    steps = program.steps[len(program.steps) - len(nodes) :]
    names = {node: step.name for node, step in zip(nodes, steps, strict=True)}
    found: dict[str, tuple[Any, Any]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in names:
                found[names[n]] = tree_map(kept, result), n.meta.get("val")
            return result

    Recorder(gm).run(*given)
    of_placeholder = dict(zip(gm.graph.find_nodes(op="placeholder"), given, strict=True))
    for node, step in zip(sizes_of(gm), program.steps, strict=False):  # sizes are what a program begins with
        yield step.name, of_placeholder[node], None
    for name, (value, known) in found.items():
        yield name, value, known
