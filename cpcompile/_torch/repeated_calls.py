"""Repeated calls: what torch finds out anew at each call of one function in a graph is found out once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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
