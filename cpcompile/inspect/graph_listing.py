"""Graph listing: a graph as code that a person reads, under the lines of the model that it came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cpcompile.errors import module_path, source_place, user_frame
from cpcompile.ir.annotation import annotation

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "bool",
}  # fmt: skip


def listing(gm: fx.GraphModule) -> str:
    """Return the graph as code: each value with dtype, the shape of the whole tensor and its placement, below its source line."""
    lines: list[str] = []
    shown = None
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        frame = user_frame(node)
        if frame is not None and frame != shown:
            lines.append(f"\n# {source_line(node)}")
            shown = frame
        lines.append(statement(node))
    return "\n".join(lines).lstrip("\n")


def source_line(node: fx.Node) -> str:
    """Return the user's line that a node is of, with its place and module; '' where that is not known."""
    frame, module = user_frame(node), module_path(node)
    return "" if frame is None else f"{frame[2]}    {source_place(node)}{', in ' + module if module else ''}"


def statement(node: fx.Node) -> str:
    """Return one node as a line of code."""
    arguments = [argument(a) for a in node.args] + [f"{k}={argument(v)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"\nreturn {argument(node.args[0])}"
    kind = value_type(node)
    return f"{node.name}{': ' + kind if kind else ''} = {operator_name(node)}({', '.join(arguments)})"


def operator_name(node: fx.Node) -> str:
    """Return the operator as it is called: `aten.linear`, `cp.ring_attention`, `getitem`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        namespace = "cp" if target.namespace == "cpcompile" else target.namespace
        return f"{namespace}.{target._schema.name.split('::')[1]}{overload}"
    return getattr(target, "__name__", str(target))


def value_type(node: fx.Node) -> str:
    """Return dtype, shape and placement of a tensor value, or ''."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    placement = annotation(node).placement
    text = f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    return text if isinstance(placement, tuple) or str(placement) == "Full" else f"{text} {placement}"


def argument(value: Any) -> str:
    """Return an argument as code; parameters by their path in the model."""
    if isinstance(value, fx.Node):
        return input_name(value) if value.op == "placeholder" else value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(map(argument, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(value)


def input_name(node: fx.Node) -> str:
    """Return the name of a placeholder without Dynamo's decoration."""
    name = node.name.removeprefix("l_self_modules_").removeprefix("l_kwargs_").removeprefix("l_")
    for old, new in (("_modules_", "."), ("_parameters_", "."), ("_buffers_", ".")):
        name = name.replace(old, new)
    return name.strip("_")
