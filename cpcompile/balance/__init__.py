"""Balancers of packed sequences: permutations of the tokens, cut into one slice for each rank, and what they cost.

    sharding = Balanced().shard(length=8, world_size=2, cu_seqlens=[0, 6, 8])
    sharding.order()       # position in each slot of rank 0, then of rank 1
    sharding.inverse()     # slot of each token
    sharding.spans(0)      # runs of rank 0
    simulate(Balanced(), 8, 2, [0, 6, 8]).area_imbalance

In: a length, a number of ranks and where documents begin. Out: which rank holds which tokens, in which order. May import
`errors`.
"""

from cpcompile.balance.balanced import Balanced
from cpcompile.balance.balancers import Balancer, Contiguous, Llama3, Striped, Ulysses, ZigZag, ZigZagByDocument
from cpcompile.balance.documents import Boundaries, Documents
from cpcompile.balance.llama3 import Llama3Bounds
from cpcompile.balance.sharding import Sharding
from cpcompile.balance.simulate import MIXES, Heads, Load, simulate

BALANCERS: dict[str, Balancer] = {
    "contiguous": Contiguous(),
    "zig_zag": ZigZag(),
    "zig_zag_by_document": ZigZagByDocument(),
    "llama3": Llama3(),
    "ulysses": Ulysses(),
    "striped": Striped(),
    "balanced": Balanced(),
}

__all__ = [
    "BALANCERS",
    "MIXES",
    "Balanced",
    "Balancer",
    "Boundaries",
    "Contiguous",
    "Documents",
    "Heads",
    "Llama3",
    "Llama3Bounds",
    "Load",
    "Sharding",
    "Striped",
    "Ulysses",
    "ZigZag",
    "ZigZagByDocument",
    "simulate",
]
