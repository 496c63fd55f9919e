"""Workspace: what an operator of the runtime holds while it runs, beside its operands and results."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.ir.operator_call import Call, value_of


def workspace(node: fx.Node) -> int:
    """Return the bytes."""
    name = str(getattr(node.target, "overloadpacket", "")).removeprefix("cpcompile.")
    if name == "loss_and_gradients" or name == "loss_chunks":
        call = Call.of(node)
        hidden, weight = value_of(call["hidden"]), value_of(call["weight"])
        tokens = min(call["chunk"], hidden.numel() // hidden.shape[-1])
        return tokens * weight.shape[0] * weight.element_size() 
    return 0
