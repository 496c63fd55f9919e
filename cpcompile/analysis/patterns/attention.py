"""An attention as the patterns find it, in whichever form the model says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.patterns.nodes import same_shape
from cpcompile.ir.operator_call import value_of


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention as found: what it computes, and the nodes that compute it, in their order.

    `fill`: the number that its mask, which the operator adds, puts in the place of scores in the model; only a row that sees no
    key tells the two apart. 0 for a mask that is added.
    """

    nodes: tuple[fx.Node, ...]
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    is_causal: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    sinks: fx.Node | None = None
    fill: float = 0.0


def is_batched(q: Any, k: Any, v: Any) -> bool:
    """Tell whether the shapes are `[B, H, S, D]`, or `[B, S, D]`, with as many heads as the operator takes."""
    if not same_shape(v[:-1], k[:-1]) or len(q) != len(k) or not statically_known_true(q[0] == k[0]):
        return False
    if len(q) == 3:
        return True
    is_grouped = isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1] == 0
    return len(q) == 4 and is_grouped


def num_heads(node: fx.Node) -> Any:
    """Return the size of the head dim."""
    return value_of(node).shape[-3]


def can_drop(num_queries: Any, num_keys: Any, p: float, exact_dropout: bool) -> bool:
    """Tell whether the operator can drop weights: by their places in a square, though not those that torch drops."""
    return p == 0 or (not exact_dropout and p < 1 and statically_known_true(num_queries == num_keys))
