"""First difference: where the forward values of the ranks first differ from those of one device."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.token_order import TokenOrder
from cpcompile.capture.writes.aliases import hidden_writes, written_arguments
from cpcompile.compile.transform import Transformed
from cpcompile.errors import where
from cpcompile.inspect.lockstep import Lockstep, whole_value
from cpcompile.inspect.model_runs import orders_of, seeded
from cpcompile.ir.annotation import annotation
from cpcompile.ir.placement import Full, Sharded


@dataclass(frozen=True, slots=True)
class Difference:
    """A node whose value differs: the captured node, its relative error, and the user's line."""

    node: str
    error: float
    place: str


def first_difference(
    model: torch.nn.Module, transformed: Transformed, inputs: Sequence[Any], world_size: int, tolerance: float
) -> Difference | None:
    """Return the first node of the transformed graph whose joined value is not that of the captured graph."""
    values: dict[str, Any] = {}
    nodes = transformed.original.graph.nodes
    is_written = any(written_arguments(node) or any(hidden_writes(node)) for node in nodes)

    def kept(value: Any) -> Any:
        """Return a value as it is now: operators in place may change it later."""
        return value.clone() if is_written and isinstance(value, torch.Tensor) else value

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n.name] = kept(result)
            return result

    lockstep, orders = Lockstep(transformed.graph, world_size), list[TokenOrder | Arrangement]()
    with torch.no_grad(), seeded(model), filled_memory():
        Recorder(transformed.original).run(*map(kept, inputs))
    with torch.no_grad(), seeded(model), filled_memory():
        for node, ranks in lockstep.steps(*map(kept, inputs)):
            known = annotation(node)
            at, expected = known.placement, values.get(known.origin)
            if not isinstance(expected, torch.Tensor) or isinstance(at, tuple):
                continue
            if not all(isinstance(value, torch.Tensor) for value in ranks):
                continue
            if isinstance(at, Sharded):
                if at.reaches_outside:
                    continue
                # No value is sharded before the bounds of all documents are known.
                orders = orders or orders_of(transformed, inputs, lockstep)
            # A value that every rank holds whole is right only if it is on each.
            found = {id(x): x for x in ranks}.values() if isinstance(at, Full) else [whole_value(ranks, at, orders)]
            error = max(value_error(value, expected) for value in found)
            if error > tolerance:
                return Difference(known.origin, error, where(node).strip())
    return None


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Let new memory hold NaN, so that tensors that are written part by part can be compared in between."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about algorithms that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def value_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a value; a value of another shape, or NaN for a number, is infinitely wrong."""
    if found.shape != expected.shape:
        return math.inf
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else math.inf
    both_finite = expected.isfinite() & found.isfinite()
    if not torch.equal(expected.isfinite(), found.isfinite()):
        return math.inf
    scale: float = expected[both_finite].norm().item()
    error: float = (found - expected)[both_finite].norm().item()
    return error / scale if scale else error
