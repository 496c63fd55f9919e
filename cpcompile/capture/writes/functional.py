"""Functional: for each operator in place, or with `out=`, the operator that returns what the other writes."""

from __future__ import annotations

from functools import cache

import torch

aten = torch.ops.aten

# Functional forms whose name does not follow from that of the operator in place.
RENAMED = {"normal_": "normal_functional"}
# They draw every element anew. The old ones have no gradient then, which some functional forms do not know.
DRAWS = {
    getattr(aten, name)
    for name in ("bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_")
}


def kinds(schema: torch._C.FunctionSchema) -> list[str]:
    """Return the types of the arguments, without those that are results."""
    return [str(a.type) for a in schema.arguments if not a.is_out]


@cache
def functional_form(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Return the operator that computes what `target` writes, from the same arguments, or None."""
    namespace, _, name = target._schema.name.partition("::")
    if name.startswith("__i"):
        name = f"__{name[3:]}"
    elif name.endswith("_"):
        name = RENAMED.get(name, name[:-1])
    packet = getattr(getattr(torch.ops, namespace), name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    wanted = kinds(target._schema)
    for form in overloads:
        schema = form._schema
        returns = len(schema.returns) == len(target._schema.returns)
        if not schema.is_mutable and kinds(schema) == wanted and returns:
            found: torch._ops.OpOverload = form
            return found
    return None
