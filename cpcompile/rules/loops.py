"""Loops over the tokens: a rank runs the loop over all tokens, for some channels of the state that it carries.

before  for t in range(S): state = decay[:, t] * state + x[:, t]      # decay, x: Sharded(1), [B, S, C]
after   decay, x = exchange_dims(decay, ...), exchange_dims(x, ...)   # all tokens of some of the channels; the loop is as it was

What one turn of the loop combines with such channels has the same ones, or is whole where it has none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from cpcompile.errors import NoRule
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import JOINS, Call, is_tensor
from cpcompile.ir.placement import CHANNELS, FULL, Full, Placement, Sharded
from cpcompile.rules.registry import RULES

aten, cp = torch.ops.aten, torch.ops.cpcompile

# Operators that may read single tokens, which their owners send to all ranks, and how often one value may be read so.
READS_A_FEW = {aten.select.int, aten.slice.Tensor}
MAX_READS = 16
JOINERS = {aten.stack.default, *JOINS}


def reads_of(operand: fx.Node, dim: int) -> list[fx.Node]:
    """Return what reads single tokens of a value along a dim."""
    reads = [user for user in operand.users if user.target in READS_A_FEW]
    calls = [Call.of(user) for user in reads]
    return [call.node for call in calls if call.dim("dim", "self") == dim and is_single(call, dim)]


def is_single(call: Call, dim: int) -> bool:
    """Tell whether a cut takes one element of a dim."""
    return call.target is aten.select.int or bool(call.result.shape[dim] == 1)


def is_loop(operand: fx.Node, at: Sharded, length: Any) -> bool:
    """Tell whether tokens are read one by one: all of them, or more than are sent by themselves."""
    count = len(reads_of(operand, at.dim))
    return count > MAX_READS or (isinstance(length, int) and count >= length > 2)


def is_of_single_tokens(node: fx.Node, is_of_channels: Callable[[Any], bool], lengths: Collection[str]) -> bool:
    """Tell whether a value of channels is computed from tokens that are read one by one, and not joined again.

    The state that a loop leaves is. No dim of it runs along the tokens, whatever its size is.

    Args:
        lengths: how many tokens sequences have.
    """
    seen, stack = {node}, [node]
    while stack:
        step = stack.pop()
        if not isinstance(step.target, torch._ops.OpOverload) or step.target in JOINERS | {cp.exchange_dims.default}:
            return False
        if step.target in READS_A_FEW:
            call = Call.of(step)
            dim = call.dim("dim", "self")
            if is_single(call, dim) and str(call.shape("self")[dim]) in lengths:
                continue
        operands = [x for x in step.all_input_nodes if x not in seen and is_of_channels(annotation(x).placement)]
        seen.update(operands)
        stack += operands
    return True


def placement_in_loop(operand: fx.Node, at: Sharded, is_of_channels: Callable[[Placement], bool]) -> Placement | None:
    """Return how a loop over the tokens wants a value that it reads one by one; None where that is not known."""
    first, shape = reads_of(operand, at.dim)[0], operand.meta["val"].shape
    found = beside(first, is_of_channels)
    if found is not None:
        return replace_dim(found, Call.of(first), at)
    dims = [d for d, size in enumerate(shape) if d not in (0, at.dim) and isinstance(size, int) and size > 1]
    return Sharded(dims[0], sequence=CHANNELS) if dims and at.covers_all and at.inner == 1 else None


def replace_dim(found: Placement, read: Call, at: Sharded) -> Placement | None:
    """Return where what is read has the dim of a placement of the read."""
    if not isinstance(found, Sharded):
        return found
    decision = RULES[read.target].pull(read, found, 0)
    return None if decision is None or decision.operands["self"].dim == at.dim else decision.operands["self"]  # type: ignore[union-attr]


def beside(node: fx.Node, is_of_channels: Callable[[Placement], bool]) -> Placement | None:
    """Return how a value must be placed for the first operator that combines it with channels of this rank."""
    user = min(node.users, default=None)
    if user is None or user.target not in RULES:
        return None
    call = Call.of(user)
    given = {n: annotation(o).placement for n, o in call.operands() if o is not node}
    of_channels = {n: p for n, p in given.items() if isinstance(p, Sharded) and is_of_channels(p)}
    names = [n for n, o in call.operands() if o is node]
    try:
        if of_channels:
            return RULES[call.target].push(call, of_channels, 0).operands.get(names[0], FULL)
        if call.is_tuple or not is_tensor(user):
            return None
        found = beside(user, is_of_channels)
        if not isinstance(found, Sharded):
            return found
        decision = RULES[call.target].pull(call, found, 0)
    except NoRule:
        return None
    return None if decision is None else decision.operands.get(names[0], Full())
