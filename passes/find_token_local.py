"""Find token-local regions: what one call of a declared module or function computes becomes one region.

before  perm = aten.sort(experts); ...; y = aten.sum(z, [1])                # all made by `mlp.experts`
after   the same nodes, annotated with region="mlp.experts"
"""

from __future__ import annotations

from torch import fx

from cpcompile.analysis.regions import find_regions
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.plan import Plan


def find_token_local(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many regions were found; `place_tokens` places each as one operator.

    Needs: modules and functions that are declared token-local, or known to be.
    Gives: the annotation `region` of every node of such a call.
    """
    found = [r for r in find_regions(gm, plan.token_local) if annotation(r.nodes[0]).region != r.name]
    for region in found:
        for node in region.nodes:
            annotate(node, region=region.name)
    return len(found)
