"""The bytes that attention operators really send are those that `traffic` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from cpcompile.balance.layout import local_length
from cpcompile.runtime.traffic import Traffic, traffic

HEADS, DIM, BATCH = (9, 3), 4, 2
STRATEGIES = ("ring", "gather", "gather_1", "halo", "ulysses", "ulysses_1", "usp_2")


def operator_and_arguments(rank: Any, strategy: str, layout: str, length: int, terms: dict[str, Any]) -> Any:
    name, _, number = strategy.partition("_")
    slots = local_length(length, rank.world_size, layout)
    heads = terms.pop("heads", HEADS)
    q, k = (torch.randn(BATCH, n, slots, DIM) for n in heads)
    given: dict[str, Any] = dict.fromkeys(("mask", "documents", "key_padding"))
    given |= {"scale": 1.0, "is_causal": True, "window": 0, "softcap": 0.0, "dropout": 0.0, "lookahead": -1} | terms
    axis: dict[str, Any] = {"length": length, "layout": layout, "world_size": rank.world_size, "group": rank.group}
    if name == "usp":
        inner_group, outer_group = rank.grid(int(number))
        axis |= {"inner_size": int(number), "inner_group": inner_group, "outer_group": outer_group}
    elif number:
        axis["heads_per_message"] = int(number)
    operator = getattr(torch.ops.cpcompile, f"{name}_attention").default
    return operator, {"q": q, "k": k, "v": k.clone(), **given}, axis


def count_sent(rank: Any, strategy: str, layout: str, length: int, terms: dict[str, Any]) -> tuple[Traffic, Traffic]:
    """Return (bytes that this rank sent, what `traffic` says)."""
    operator, given, axis = operator_and_arguments(rank, strategy, layout, length, dict(terms))
    sent = 0
    real = dist.batch_isend_irecv

    def counted(exchange: list[Any]) -> Any:
        nonlocal sent
        sent += sum(op.tensor.nbytes for op in exchange if op.op is dist.isend)
        return real(exchange)

    dist.batch_isend_irecv = counted
    try:
        leaves = [given[name].requires_grad_() for name in "qkv"]
        out = operator(*given.values(), **axis)[0]
        forward, sent = sent, 0
        torch.autograd.grad(out.sum(), leaves)
    finally:
        dist.batch_isend_irecv = real
    return Traffic(forward, sent), traffic(operator, given | axis)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize(
    "terms",
    [{}, {"window": 5}, {"is_causal": False}, {"window": 6, "lookahead": 2, "is_causal": False}, {"heads": (8, 2)}],
    ids=["causal", "window", "full", "both_sides", "heads_8_2"],
)
def test_traffic_is_what_is_sent(pool: Any, strategy: str, layout: str, terms: dict[str, Any]) -> None:
    for length in (31, 64):
        ranks = pool.run(4, count_sent, strategy, layout, length, terms)
        sent, said = [found for found, _ in ranks], ranks[0][1]
        assert said == Traffic(max(t.forward for t in sent), max(t.backward for t in sent))
