"""Own backward: how ranks hold the gradients that a backward of the model's own reads and returns.

before  g = cp.incoming_gradient(y); dw = aten.sum(g, [0, 1]); y_1 = cp.own_gradient([y], [w], [g], [dw])
after   # y, g: Sharded(1); dw: Partial(sum), as the gradient of what every rank holds is

A rank back-propagates what its own tokens give. So gradients of tokens are of these tokens, those of whole values are addends of
each rank, and those of addends are whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotate, placement_of
from cpcompile.ir.insertion import insert_copy
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, PARTIAL, Full, Partial, Placement, Sharded
from cpcompile.ir.resharding import Resharder
from cpcompile.rules.localisation import Localiser
from cpcompile.rules.over_tokens import with_number

aten, cp = torch.ops.aten, torch.ops.cpcompile

REMEDY = (
    "Pass strict=False to gather what its backward mixes, or, if the function computes each token from that token alone, declare "
    "it (@cpcompile.token_local)."
)


def dual(at: Placement) -> Placement:
    """Return how ranks hold the gradient of a value."""
    match at:
        case Sharded():
            return replace(at, outside=None)
        case Full():
            return PARTIAL
        case Partial():
            return FULL


def place_incoming(node: fx.Node, resharder: Resharder) -> None:
    """Place the gradient of a result.

    Raises:
        NoRule: some of it belongs to tokens that no rank has.
    """
    (result,) = node.args
    assert isinstance(result, fx.Node)
    at = placement_of(result)
    if isinstance(at, Sharded) and at.reaches_outside:
        raise NoRule(
            f"a torch.autograd.Function computes tokens outside the sequence, whose gradients no rank has.\n\n{where(node)}\n\n"
            "Pad after the call."
        )
    annotate(node, placement=dual(at))


def place_own_gradient(node: fx.Node, localiser: Localiser) -> None:
    """Place results of a function, and bring the gradients of its operands to how ranks must hold these.

    Raises:
        NoRule: a gradient holds other tokens than its operand, and may not be gathered.
    """
    call = Call.of(node)
    results, incoming = call["results"], call["incoming"]
    operands, gradients = list(call["operands"]), list(call["gradients"])
    for i, (operand, gradient) in enumerate(zip(operands, gradients, strict=True)):
        operands[i], gradients[i] = matched(node, operand, gradient, localiser)
    node.args = (results, operands, incoming, gradients)
    annotate(node, placement=tuple(map(placement_of, results)))


def matched(node: fx.Node, operand: fx.Node, gradient: fx.Node, localiser: Localiser) -> tuple[fx.Node, fx.Node]:
    """Return an operand and its gradient, of which ranks hold what belongs together; padding has no gradient."""
    resharder = localiser.resharder
    if isinstance(placement_of(operand), Partial):
        operand = resharder.reduce(operand)
    have, found = placement_of(operand), placement_of(gradient)
    if isinstance(have, Sharded):
        gradient = local_gradient(gradient, replace(have, outside=None), localiser)
    elif isinstance(found, Sharded):
        have = replace(found, outside=None)
        operand = localiser.localise(operand, have)
    elif isinstance(found, Full) and resharder.plan.world_size > 1:
        arguments = (gradient, 1 / resharder.plan.world_size)
        with node.graph.inserting_before(node):
            gradient = insert_copy(node.graph, aten.mul.Scalar, arguments, gradient, PARTIAL)
    if isinstance(have, Sharded):
        gradient = with_number(resharder, gradient, Call.of(node), 0.0)
    return operand, gradient


def local_gradient(gradient: fx.Node, wanted: Sharded, localiser: Localiser) -> fx.Node:
    """Return this rank's tokens of a gradient."""
    resharder = localiser.resharder
    found = placement_of(gradient)
    if isinstance(found, Partial):
        gradient = resharder.reduce(gradient)
    elif isinstance(found, Sharded):
        if replace(found, outside=None) == wanted:
            return gradient
        if found.is_shift_of(wanted):
            return resharder.move(gradient, wanted)
        if resharder.plan.strict:
            raise NoRule(
                f"the backward of a torch.autograd.Function returns a gradient that is {found}, of an operand that is {wanted}."
                f"\n\n{where(gradient)}\n\n{REMEDY}"
            )
        gradient = resharder.gather(gradient, "its operand holds other tokens")
    return localiser.localise(gradient, wanted)
