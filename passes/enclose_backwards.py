"""Enclose backwards: what a `torch.autograd.Function` of the model computes back leaves the graph and becomes a body.

before  g = cp.incoming_gradient(y); dx = aten.mul(g, slope); y_1 = cp.own_gradient([y], [x], [g], [dx])
after   y_1 = cp.own_backward([y], [x], [slope], [], body)      # body: lambda g, slope: [aten.mul(g, slope)]
"""

from __future__ import annotations

from torch import fx

from cpcompile.analysis import own_backward
from cpcompile.ir.plan import Plan


def enclose_backwards(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many there are.

    Needs: operators of a rank in each backward, as in the rest of the graph; no pass behind sees these.
    Gives: `cp.own_backward`, so that the graph computes gradients.
    """
    return own_backward.enclose_backwards(gm, plan.gradient_scale)
