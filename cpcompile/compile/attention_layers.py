"""Layers: each attention knows whose it is, for profiles; one that several equal layers share knows of all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from cpcompile.choose.attention_sites import rewritten_attentions
from cpcompile.errors import module_path, source_place
from cpcompile.ir.folding import one_path
from cpcompile.runtime.attention.registration import LAYER


def name_layers(gm: fx.GraphModule) -> None:
    """Tell each attention the path of its module, or its line where no module has it."""
    for node in rewritten_attentions(gm):
        node.kwargs = {**node.kwargs, LAYER: (module_path(node) or source_place(node)).replace(" ", "_")}


def share_layer(node: fx.Node, equal: Sequence[fx.Node]) -> None:
    """Tell a node that stands for equal ones of whose layers it is: `model.layers.{0..31}.self_attn`."""
    paths = [str(each.kwargs[LAYER]) for each in equal if LAYER in each.kwargs]
    if paths:
        node.kwargs = {**node.kwargs, LAYER: one_path(paths) or ",".join(dict.fromkeys(paths))}
