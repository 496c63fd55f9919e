"""Whole modules: parts of a model that see no tokens, such as an image encoder, and that every rank therefore runs alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from cpcompile.analysis.patterns.latent import flops
from cpcompile.choose.attention_sites import REWRITTEN
from cpcompile.compile.inner import input_names
from cpcompile.errors import clean_path, source_place
from cpcompile.inspect.explanation import WholeModule
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call, is_tensor, size_estimate, value_of
from cpcompile.ir.placement import Full

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding}


def whole_modules(gm: fx.GraphModule) -> list[WholeModule]:
    """Return the outermost modules whose products and attentions every rank computes whole, of inputs that are not tokens."""
    unsharded = without_tokens(gm)
    work = {node: operations(node) for node in gm.graph.nodes}
    work = {node: count for node, count in work.items() if count}
    total = sum(count for node, count in work.items() if node in unsharded)
    if total == sum(work.values()):
        return []  # nothing is sharded
    paths = {node: module_paths(node) for node in work}
    mixed = {path for node in work if node not in unsharded for path in paths[node]}
    found: dict[str, list[fx.Node]] = {}
    for node in work:
        outermost = next((path for path in paths[node] if path not in mixed), None)
        if outermost is not None and unsharded.get(node):
            found.setdefault(outermost, []).append(node)
    return [
        WholeModule(
            module=path,
            line=source_place(nodes[0]),
            inputs={name: shape for node in nodes for name, shape in unsharded[node].items()},
            attentions=sum(node.target in REWRITTEN for node in nodes),
            flops=sum(work[node] for node in nodes),
        )
        for path, nodes in found.items()
    ]


def without_tokens(gm: fx.GraphModule) -> dict[fx.Node, dict[str, tuple[int, ...]]]:
    """Return the nodes that no token reaches, each with the inputs that do reach it and their shapes; parameters are none."""
    found: dict[fx.Node, dict[str, tuple[int, ...]]] = {}
    names = input_names(gm)
    for node in gm.graph.nodes:
        if not isinstance(annotation(node).placement, Full) or any(x not in found for x in node.all_input_nodes):
            continue
        if node.op == "placeholder":
            name = names.get(node.name) if is_tensor(node) else None
            found[node] = {} if name is None else {name: tuple(map(size_estimate, value_of(node).shape))}
        else:
            found[node] = merged(found[x] for x in node.all_input_nodes)
    return found


def merged(parts: Iterable[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Return the entries of all of them."""
    return {name: shape for part in parts for name, shape in part.items()}


def module_paths(node: fx.Node) -> list[str]:
    """Return the paths of the modules around a node, the outermost first, without the model itself."""
    paths = [clean_path(str(entry[0])) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    return [path for path in paths if path]


def operations(node: fx.Node) -> int:
    """Return the floating-point operations of a product, a convolution or an attention; 0 for others."""
    if node.target in CONVOLUTIONS:
        weight = Call.of(node).tensor("weight")
        return 2 * weight[0].numel() * size_of(value_of(node).shape)
    if node.target in REWRITTEN:
        call = Call.of(node)
        return 2 * size_of((*call.shape("q")[:3], call.shape("k")[2])) * int(call.shape("q")[3] + call.shape("v")[3])
    return flops(node)


def size_of(shape: Iterable[object]) -> int:
    """Return how many elements a shape has, as an estimate."""
    count = 1
    for size in shape:
        count *= size_estimate(size)
    return count
