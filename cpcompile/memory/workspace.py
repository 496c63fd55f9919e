"""Workspace: what an operator of the runtime holds while it runs, beside its operands and results."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.choose.kernels import sized
from cpcompile.ir.operator_call import Call, size_hint, value_of
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.workload import memory_of
from cpcompile.runtime.tiles.by_rows import tiles
from cpcompile.runtime.tiles.loss_body import body_of
from cpcompile.runtime.tiles.loss_providers import PROVIDERS
from cpcompile.runtime.traffic import attention_workload

# The strategy of an attention, and how many copies of what it receives are held: in backward keys and their gradients.
_ATTENTIONS = {f"{name}_attention": (name, 1) for name in STRATEGIES} | {
    f"{name}_attention_backward": (name, 2) for name in STRATEGIES
}


def workspace(node: fx.Node) -> int:
    """Return the bytes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "cpcompile":
        return 0
    name = target._schema.name.removeprefix("cpcompile::")
    if name in ("loss_and_gradients", "loss_chunks"):
        return logits_of_a_chunk(Call.of(node))
    if name in ("tiles_forward", "tiles_backward"):
        return tile_of(Call.of(node), 1 if name == "tiles_forward" else 2)
    if name in _ATTENTIONS:
        strategy, copies = _ATTENTIONS[name]
        return copies * memory_of(attention_workload(sized(Call.of(node))), strategy).received
    return 0


def logits_of_a_chunk(call: Call) -> int:
    """Return the bytes of the logits of a chunk, in whose place their gradient is written."""
    hidden, weight = value_of(call["hidden"]), value_of(call["weight"])
    rows, chunk, provider = size_hint(hidden.numel() // hidden.shape[-1]), call["chunk"], body_of(call["body"]).provider
    at_once = (
        PROVIDERS[provider].rows_at_once(rows, weight.shape[0], weight.shape[1], chunk)
        if provider
        else _longest(rows, chunk)
    )
    return int(at_once * weight.shape[0] * weight.element_size())


def tile_of(call: Call, copies: int) -> int:
    """Return the bytes of what is computed of a tile: about as wide as the widest of the weights, two times."""
    rows, others = call["rows"], call["others"]
    width = max((max(value_of(x).shape) for x in others if value_of(x).dim() > 1), default=0)
    first = value_of(rows[0])
    return int(2 * copies * _longest(size_hint(first.shape[0]), call["tile"]) * width * first.element_size())


def _longest(rows: int, chunk: int) -> int:
    return int(max(part.stop - part.start for part in tiles(rows, chunk)))
