"""Layer names: which layer of the model each node of a graph is of, for ranges in profiles.

A layer is a block (a member of a list of modules, `model.layers.7`); outside of blocks it is the module next to them
(`model.norm`, `lm_head`), so that each node is of one layer, and layers are not nested.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import fx

from cpcompile import _torch
from cpcompile.choose.attention_sites import REWRITTEN
from cpcompile.errors import module_path
from cpcompile.ir.folding import one_path
from cpcompile.passes.recompute_blocks import blocks_of
from cpcompile.runtime.layer_ranges import enter_layer


class LayerNames:
    """The layers of a graph, whose nodes keep their modules when compilers make others out of them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._blocks = set(blocks_of(gm))
        self._above = {prefix for path in self._blocks for prefix in itertools.accumulate(path.split(".")[:-1], joined)}
        self.key = repr([name for name, _ in itertools.groupby(map(self.of, gm.graph.nodes))])

    def of(self, node: fx.Node) -> str:
        """Return the layer of a node; '' for what the model itself does."""
        return self._find(module_path(node))

    def of_call(self, nodes: Sequence[fx.Node]) -> str:
        """Return the layers of what one call computes: of its attentions, where it has some, so that a call across the border of
        two layers is of one.
        """
        attentions = [node for node in nodes if node.target in REWRITTEN]
        found = list(dict.fromkeys(filter(None, map(self.of, attentions or nodes))))
        return (one_path(found) or ",".join(found)) if found else ""

    def marks(self) -> _torch.LayerMarks:
        """Return what has compiled programs tell their layers."""
        return _torch.LayerMarks(self.of, enter_layer)

    def _find(self, path: str) -> str:
        """Return the shortest start of a path that is no list of blocks and nothing around one."""
        for prefix in itertools.accumulate(filter(None, path.split(".")), joined):
            if prefix not in self._above:
                return prefix
        return ""


def joined(path: str, part: str) -> str:
    """Return a path with one part more."""
    return f"{path}.{part}"
