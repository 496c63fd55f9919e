"""Every collective attention against a plain softmax over the whole sequence: out, dq, dk and dv in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.layout import LAYOUTS, local_length, positions

NAMES = ("out", "dq", "dk", "dv")
BATCH, HEAD_DIM, VALUE_DIM, SCALE = 2, 8, 4, 0.3

PLAIN: dict[str, Any] = {
    "heads": (4, 2),
    "length": 31,
    "is_causal": True,
    "window": 0,
    "softcap": 0.0,
    "value_dim": HEAD_DIM,
}
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "causal_even": {"length": 64},
    "short": {"length": 5},
    "heads_9_3": {"heads": (9, 3)},
    "heads_2_1": {"heads": (2, 1), "length": 64},
    "heads_3_3": {"heads": (3, 3), "is_causal": False},
    "full": {"is_causal": False},
    "window": {"window": 7},
    "window_even": {"window": 20, "length": 64, "heads": (9, 3)},
    "documents": {"documents": True},
    "documents_full": {"documents": True, "is_causal": False, "length": 64},
    "left_padding": {"key_padding": True},
    "padding_full": {"key_padding": True, "is_causal": False, "heads": (9, 3)},
    "mask": {"mask": "heads", "is_causal": False},
    "mask_rows": {"mask": "keys", "window": 9},
    "softcap": {"softcap": 2.0, "length": 64},
    "value_dim": {"value_dim": VALUE_DIM},
    "everything": {
        "documents": True,
        "key_padding": True,
        "mask": "heads",
        "window": 11,
        "softcap": 3.0,
        "heads": (9, 3),
    },
}
FLOAT_CASES: dict[str, dict[str, Any]] = {
    "bias": {"mask": "bias"},
    "bias_full": {"mask": "bias", "is_causal": False, "heads": (9, 3), "softcap": 2.0},
    "finfo_min": {"mask": "min", "is_causal": False, "length": 64},
}


def inputs_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the whole tensors of a case."""
    case = PLAIN | case
    torch.manual_seed(0)
    (num_query, num_key), length = case["heads"], case["length"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inputs = {name: case[name] for name in ("is_causal", "window", "softcap")} | {"length": length}
    inputs |= {"documents": None, "key_padding": None, "mask": None}
    inputs["q"] = normal(BATCH, num_query, length, HEAD_DIM)
    inputs["k"] = normal(BATCH, num_key, length, HEAD_DIM)
    inputs["v"] = normal(BATCH, num_key, length, case["value_dim"])
    inputs["dout"] = normal(BATCH, num_query, length, case["value_dim"])
    if case.get("documents"):
        inputs["documents"] = torch.randint(0, 3, (BATCH, length)).sort(dim=1).values
    if case.get("key_padding"):
        inputs["key_padding"] = torch.arange(length) >= torch.tensor([[length // 3], [0]])
    match case.get("mask"):
        case "heads":
            inputs["mask"] = torch.rand(1, num_query, length, length) > 0.5
        case "keys":
            inputs["mask"] = torch.rand(BATCH, 1, 1, length) > 0.3
        case "bias":
            inputs["mask"] = normal(1, num_query, length, length).masked_fill(
                torch.rand(length, length) > 0.8, -torch.inf
            )
        case "min":
            hidden = torch.arange(length)[None, :] > torch.arange(length)[:, None] - 3
            inputs["mask"] = torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
    return inputs


@functools.cache
def reference(name: str) -> tuple[torch.Tensor, ...]:
    """Return (out, dq, dk, dv) by autograd through a plain softmax."""
    x = inputs_of((CASES | FLOAT_CASES)[name])
    q, k, v = (x[n].clone().requires_grad_() for n in "qkv")
    repeats = q.shape[1] // k.shape[1]
    s = SCALE * q @ k.repeat_interleave(repeats, 1).transpose(-1, -2)
    if x["softcap"]:
        s = x["softcap"] * torch.tanh(s / x["softcap"])
    at = torch.arange(x["length"])
    visible = torch.ones(1, 1, x["length"], x["length"], dtype=torch.bool)
    if x["is_causal"]:
        visible = visible & (at <= at[:, None])
    if x["window"]:
        visible = visible & (at[:, None] - at < x["window"])
    if x["documents"] is not None:
        visible = visible & (x["documents"][:, None, :, None] == x["documents"][:, None, None, :])
    if x["key_padding"] is not None:
        visible = visible & x["key_padding"][:, None, None, :]
    if x["mask"] is not None and x["mask"].dtype == torch.bool:
        visible = visible & x["mask"]
    elif x["mask"] is not None:
        s = s + x["mask"]
    s = s.masked_fill(~visible, -torch.inf)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    out = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0) @ v.repeat_interleave(repeats, 1)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), x["dout"])


def local(x: torch.Tensor, dim: int, rank: int, world_size: int, layout: str, length: int) -> torch.Tensor:
    """Return a rank's slots of `x`; padding slots hold 7, which no result may depend on."""
    at = positions(length, rank, world_size, layout)
    taken = x.index_select(dim, at.clamp(max=length - 1))
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    return taken if x.dtype == torch.bool else taken.masked_fill((at >= length).view(shape), 7.0)


def attend(rank: Any, strategy: str, layout: str, cases: dict[str, dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """Run the operator on this rank's tokens for each case; return out, dq, dk, dv of its slots."""
    results = {}
    for name, case in cases.items():
        x = inputs_of(case)
        q, k, v, dout = (
            local(x[n], 2, rank.rank, rank.world_size, layout, x["length"]) for n in ("q", "k", "v", "dout")
        )
        mask = x["mask"]
        if mask is not None and strategy != "ulysses" and mask.shape[2] > 1:
            mask = local(mask, 2, rank.rank, rank.world_size, layout, x["length"])
        leaves = [t.requires_grad_() for t in (q, k, v)]
        operator = getattr(torch.ops.cpcompile, f"{strategy}_attention")
        terms = (mask, x["documents"], x["key_padding"], SCALE, x["is_causal"], x["window"], x["softcap"])
        out = operator(*leaves, *terms, x["length"], layout, rank.world_size, rank.group)[0]
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return results


def check(pool: Any, strategy: str, layout: str, world_size: int, cases: dict[str, dict[str, Any]]) -> None:
    """Compare every case, joined by position, with the reference; padding slots must come out 0."""
    ranks = pool.run(world_size, attend, strategy, layout, cases)
    for name, case in cases.items():
        length = (PLAIN | case)["length"]
        at = torch.cat([positions(length, rank, world_size, layout) for rank in range(world_size)])
        assert len(at) == world_size * local_length(length, world_size, layout)
        for i, expected in enumerate(reference(name)):
            joined = torch.cat([rank[name][i] for rank in ranks], 2)
            assert not joined[:, :, at >= length].any(), f"{name}: padding of {NAMES[i]}"
            whole = torch.empty_like(expected).index_copy_(2, at[at < length], joined[:, :, at < length])
            error = ((whole - expected).abs().max() / expected.abs().max()).item()
            assert error < 1e-12, f"{name}: {NAMES[i]} is off by {error:.1e}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_equals_the_whole_attention(pool: Any, strategy: str, layout: str, world_size: int) -> None:
    check(pool, strategy, layout, world_size, CASES)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["gather", "ulysses"])
def test_float_masks_are_added(pool: Any, strategy: str, layout: str, world_size: int) -> None:
    check(pool, strategy, layout, world_size, FLOAT_CASES)


def test_ring_refuses_a_float_mask() -> None:
    x = torch.randn(1, 1, 4, 8)
    settings = (SCALE, False, 0, 0.0, 4, "contiguous", 1, "")
    with pytest.raises(ValueError, match="gather_attention"):
        torch.ops.cpcompile.ring_attention(x, x, x, torch.zeros(1, 1, 4, 4), None, None, *settings)
