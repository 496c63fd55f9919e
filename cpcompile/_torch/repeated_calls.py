"""Repeated calls: what torch finds out anew at each call of one function in a graph is found out once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph


@contextlib.contextmanager
def schemas_once() -> Iterator[None]:
    """Have torch look once for what a function of `invoke_subgraph` writes to, for which it traces the function (torch 2.11 to
    2.14).

    Without, it does at each call, twice. The answer depends on the function and on the types of what it is given.
    """
    find: Any = invoke_subgraph.gen_schema
    known: dict[Any, Any] = {}

    def gen_schema(subgraph: Any, identifier: str | None, *operands: Any) -> Any:
        key = subgraph, identifier, tuple(map(type, operands))
        if key not in known:
            known[key] = find(subgraph, identifier, *operands)
        return known[key]

    invoke_subgraph.gen_schema = gen_schema  # type: ignore[method-assign]
    try:
        yield
    finally:
        del invoke_subgraph.gen_schema


def rename_sizes(graph: fx.Graph) -> None:
    """Have calls be given sizes by the names that torch has for them since it found several to be equal (torch 2.11 to 2.14).

    Inductor lowers a function for what its first call was traced with. A size that is an operand has the name there that it was
    made with, and sizes of tensors the other, which the function would not know (torch 2.11 to 2.13).
    """
    for call in graph.find_nodes(op="call_function", target=invoke_subgraph):
        traced = call.meta.get("eager_input_vals")
        if traced is not None:
            given, named = traced
            call.meta["eager_input_vals"] = tuple(x + 0 if isinstance(x, torch.SymInt) else x for x in given), named
