"""Push: what an operator makes of sharded operands, by its rule, and whether all who read the result can do with it.

The other direction, from a wanted result to its operands, is `localisation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Partial, Placement, Sharded
from cpcompile.rules import KEEPS_OUTSIDE, REASONS, RULES, Decision, no_rule
from cpcompile.rules.loops import MAX_READS, READS_A_FEW
from cpcompile.rules.registry import REFUSED_PAGE

LengthOf = Callable[[Sharded], Any]


def push(call: Call, sharded: Mapping[str, Sharded], length_of: LengthOf) -> Decision:
    """Return what happens when the operands that `sharded` names are sharded so.

    Args:
        length_of: the number of tokens, possibly symbolic, of the sequence of a placement.

    Raises:
        NoRule: no rule covers this.
    """
    if call.target not in RULES:
        reason = REASONS.get(call.target)
        missing = "there is no rule for this operator, so its operands cannot stay sharded"
        raise no_rule(call, sharded, reason(call) if reason else missing, page=REFUSED_PAGE if reason else "")
    at = next(iter(sharded.values()))
    decision = RULES[call.target].push(call, sharded, length_of(at))
    if not all(is_cut_back(call.node, result, length_of) for result in decision.results):
        raise no_rule(call, sharded, "tokens outside the sequence would be read, and what they hold is not known")
    if call.target in READS_A_FEW and decision.results == (Partial(),):
        refuse_many_reads(call, sharded)
    return decision


def is_cut_back(node: fx.Node, at: Placement, length_of: LengthOf) -> bool:
    """Tell whether what is not known of a value, its tokens outside the sequence, is cut off by all who read it."""
    if not isinstance(at, Sharded) or not at.reaches_outside or at.outside is not None:
        return True
    for user in node.users:
        if user.target not in KEEPS_OUTSIDE or user.args[0] is not node:
            return False
        decision = RULES[user.target].push(Call.of(user), {"self": at}, length_of(at))
        if not all(is_cut_back(user, result, length_of) for result in decision.results):
            return False
    return True


def refuse_many_reads(call: Call, sharded: Mapping[str, Sharded]) -> None:
    """Refuse a loop over the tokens: each one that is read by itself is sent to all ranks by itself."""
    (operand,) = (node for name, node in call.operands() if name in sharded)
    reads = [user for user in operand.users if user.target in READS_A_FEW]
    if len(reads) > MAX_READS:
        how = "are read one by one, as a loop over the tokens does, and each is sent by itself"
        raise no_rule(call, sharded, f"{len(reads)} tokens of one value {how}")
