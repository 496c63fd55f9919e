"""Choose strategies: each attention is marked with how it will be computed, and given its kernel.

before  o = cp.attention(q, k, v, ..., is_causal=True)
after   o = cp.attention(q, k, v, ..., is_causal=True, kernel_name="flash")      # strategy: ring
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from cpcompile.choose.attention_sites import attention_nodes
from cpcompile.ir.annotation import annotate
from cpcompile.ir.operator_call import Call


def choose_strategies(gm: fx.GraphModule, *, strategies: Sequence[str], kernel: str = "auto") -> int:
    """Return how many attentions were marked, each with its strategy (`strategies` are in their order) and the kernel.

    Needs: attentions with their masks lifted (`lift_masks`), and one strategy for each (`cpcompile.choose`).
    Gives: the annotation `strategy`, and the kernel by name.
    """
    nodes = attention_nodes(gm)
    for node, strategy in zip(nodes, strategies, strict=True):
        annotate(node, strategy=strategy)
        node.args, node.kwargs = Call.of(node).rebound({"kernel_name": kernel})
    return len(nodes)
