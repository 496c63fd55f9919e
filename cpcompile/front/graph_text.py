"""Graph text: a transformed graph as lines that are the same on every rank that runs the same program.

A size that one rank knows as a number may be a symbol on another, which has traced the model at other shapes too (to explain it,
say). Sizes that are computed are therefore written `?`, which stands for any number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.errors import source_place
from cpcompile.front.fingerprint import text_fingerprint, value_fingerprint
from cpcompile.front.weights import same_parts
from cpcompile.options.mesh import Axis
from cpcompile.runtime.traffic import sends

_PLAIN = (int, float, complex, type(None), torch.dtype, torch.layout, torch.memory_format)
_WORD = re.compile(r"-?[\w.%]+|\S")


@dataclass(frozen=True, slots=True)
class GraphText:
    """A line for each operator, and a fingerprint of all."""

    lines: tuple[str, ...]
    fingerprint: int

    @classmethod
    def of(cls, gm: fx.GraphModule, axis: Axis, fsdp_groups: Set[str] = frozenset()) -> GraphText:
        """Return the text of a graph for the ranks of an axis.

        Groups along a grid, those in which FSDP shards parameters and those of the model have other names on other ranks.
        """
        groups = {
            name: f"<group {i}>" for i, name in enumerate((axis.group, axis.inner_group, axis.outer_group)) if name
        }
        others = dict.fromkeys(_torch.group_names(), "<another group>") | dict.fromkeys(fsdp_groups, "<FSDP's group>")
        return cls.of_lines(text_lines(gm, others | groups))

    @classmethod
    def of_lines(cls, lines: list[str]) -> GraphText:
        """Return the text of these lines."""
        return cls(tuple(lines), text_fingerprint(*map(str.encode, lines)))


EMPTY = GraphText((), 0)


def means_same(line: str, other: str) -> bool:
    """Tell whether two ranks that have these lines may run the same operator."""
    words, others = _WORD.findall(line), _WORD.findall(other)
    return len(words) == len(others) and all(
        a == b or (a == "?" and b.isdecimal()) or (b == "?" and a.isdecimal())
        for a, b in zip(words, others, strict=True)
    )


def text_lines(gm: fx.GraphModule, groups: Mapping[str, str]) -> list[str]:
    """Return a line for each node of a graph that is no size, and of the graphs inside it."""
    # The order of the inputs depends on what else was traced before, their names do not.
    inputs = [node for node in gm.graph.find_nodes(op="placeholder") if is_told(node)]
    places = {node: _torch.source_name(node) or f"input {i}" for i, node in enumerate(inputs)}
    lines = sorted(f"{place}: {input_text(node)}" for node, place in places.items())
    for node in in_order_of_use(gm.graph):
        if node.op == "placeholder" or not is_told(node):
            continue
        places[node] = f"%{len(lines)}"
        arguments = text([node.args, dict(node.kwargs)], places, groups)
        lines.append(f"{places[node]} = {target_text(node)} {arguments} {source_place(node)}".rstrip())
        held = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        for part in same_parts(held) if isinstance(held, torch.Tensor) else ():
            lines[-1] += f" with values {int(value_fingerprint(part)):x}"
        if isinstance(held, fx.GraphModule):
            lines += text_lines(held, groups)
    return lines


def in_order_of_use(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes so that only what travels, writes or is returned keeps its order: each behind what it needs first.

    The order of other nodes may depend on that of the inputs.
    """
    done: set[fx.Node] = set()
    for root in graph.nodes:
        if root.users and not (isinstance(root.target, torch._ops.OpOverload) and sends(root.target)):
            continue
        waiting = [root]
        while waiting:
            node = waiting[-1]
            needed = [x for x in node.all_input_nodes if x not in done]
            if needed:
                waiting.append(needed[0])
                continue
            waiting.pop()
            done.add(node)
            yield node


def is_told(node: fx.Node) -> bool:
    """Tell whether a node is more than arithmetic with sizes and checks of them."""
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return node.op in ("get_attr", "output") or any(isinstance(x, torch.Tensor) for x in leaves)


def input_text(node: fx.Node) -> str:
    """Return the dtype of an input and its number of dims."""
    value = node.meta.get("val")
    return f"{value.dtype}, {value.dim()} dims" if isinstance(value, torch.Tensor) else type(value).__qualname__


def target_text(node: fx.Node) -> str:
    """Return what a node computes."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def text(value: Any, places: Mapping[fx.Node, str], groups: Mapping[str, str]) -> str:
    """Return an argument as text."""
    if isinstance(value, fx.Node):
        return places.get(value, "?")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(text(x, places, groups) for x in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {text(x, places, groups)}' for key, x in value.items())}}}"
    if isinstance(value, str):
        return groups.get(value, repr(value))
    if isinstance(value, torch.device):
        return value.type  # ranks of one host have other indices
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__
