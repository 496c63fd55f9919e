"""Repeated calls: what torch finds out anew at each call of one function in a graph is found out once."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.ir import ExternKernel, FixedLayout, IRNode, is_storage_and_layout


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


@contextlib.contextmanager
def values_once() -> Iterator[None]:
    """Have Inductor look only once for what the nodes of a graph compute that no pass has changed since (torch 2.11 to 2.14).

    Without, it runs each call of a function again on fake tensors before it takes operators in place.
    """
    update = FakeTensorUpdater.incremental_update
    looked_at = weakref.WeakSet[FakeTensorUpdater]()

    def incremental_update(self: FakeTensorUpdater) -> Any:
        if self in looked_at and is_unchanged(self):
            return 0
        looked_at.add(self)
        return update(self)

    FakeTensorUpdater.incremental_update = incremental_update  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeTensorUpdater.incremental_update = update  # type: ignore[method-assign]


def is_unchanged(updater: Any) -> bool:
    """Tell whether a graph and the functions that it calls are as they were when their values were last looked at."""
    graph = updater.gm.graph if hasattr(updater, "gm") else updater.graph  # torch 2.12 and before
    functions = getattr(updater, "subgraph_updaters", {}).values()
    return all(updater.hash_node(node) in updater.processed_hashes for node in graph.nodes) and all(
        map(is_unchanged, functions)
    )


@contextlib.contextmanager
def strides_as_they_are() -> Iterator[None]:
    """Have Inductor take what lies in memory with the strides that it asks for as it is, without a proof (torch 2.11 to 2.14)."""
    given = ExternKernel.__dict__["require_exact_strides"]

    def require_exact_strides(
        cls: type[ExternKernel], x: IRNode, exact_strides: Sequence[Any], allow_padding: bool = False
    ) -> Any:
        if is_storage_and_layout(x):
            layout = x.get_layout()
            if type(layout) is FixedLayout and all(map(is_same_number, layout.stride, exact_strides)):
                return x
        return given.__get__(None, cls)(x, exact_strides, allow_padding)

    ExternKernel.require_exact_strides = classmethod(require_exact_strides)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ExternKernel.require_exact_strides = given  # type: ignore[method-assign]


def is_same_number(a: Any, b: Any) -> bool:
    """Tell whether two strides are the same number, as far as that takes no proof."""
    return isinstance(b, int) and a == b


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
