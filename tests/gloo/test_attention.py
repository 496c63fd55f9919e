"""Every collective attention against a plain softmax over the whole sequence: out, dq, dk and dv in float64."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.balance.layout import DOCUMENT_LAYOUTS, LAYOUTS, of_groups
from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime import kernels
from cpcompile.runtime.attention import key_needs, partial_results
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.key_needs import needs, visits
from cpcompile.runtime.tokens.dropout import is_kept

ALL_LAYOUTS = (*LAYOUTS, *DOCUMENT_LAYOUTS)
NAMES = ("out", "dq", "dk", "dv", "dsinks")
BATCH, HEAD_DIM, VALUE_DIM, SCALE, DROPOUT = 2, 8, 4, 0.3, 0.3

PLAIN: dict[str, Any] = {
    "heads": (4, 2),
    "length": 31,
    "is_causal": True,
    "window": 0,
    "lookahead": -1,
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
    "heads_8_4": {"heads": (8, 4)},
    "heads_8_8": {"heads": (8, 8), "sinks": True, "slopes": True, "dropout": True},
    "full": {"is_causal": False},
    "window": {"window": 7},
    "window_even": {"window": 20, "length": 64, "heads": (9, 3)},
    "window_both_sides": {"window": 7, "lookahead": 4, "is_causal": False},
    "lookahead": {"lookahead": 9, "is_causal": False, "length": 64},
    "documents": {"documents": "sorted"},
    "documents_full": {"documents": "sorted", "is_causal": False, "length": 64},
    "documents_that_come_back": {"documents": "mixed", "bounds": True},
    "bounds": {"documents": "sorted", "bounds": True},
    "bounds_full": {"documents": "sorted", "bounds": True, "is_causal": False, "length": 64},
    "bounds_window": {"documents": "sorted", "bounds": True, "window": 5, "length": 64},
    "bounds_of_one_token": {"documents": "single", "bounds": True},
    "bounds_of_a_giant": {"documents": "giant", "bounds": True, "length": 97},
    "bounds_of_chunks": {"documents": "chunks", "bounds": True, "heads": (9, 3)},
    "left_padding": {"key_padding": True},
    "padding_full": {"key_padding": True, "is_causal": False, "heads": (9, 3)},
    "bounds_and_padding": {"documents": "sorted", "bounds": True, "key_padding": True},
    "prefix": {"prefix": True},
    "prefix_window": {"prefix": True, "window": 12, "length": 64},
    "mask": {"mask": "heads", "is_causal": False},
    "mask_rows": {"mask": "keys", "window": 9},
    "softcap": {"softcap": 2.0, "length": 64},
    "slopes": {"slopes": True},
    "slopes_bounds": {"slopes": True, "documents": "sorted", "bounds": True, "heads": (9, 3)},
    "sinks": {"sinks": True},
    "sinks_window": {"sinks": True, "window": 6, "heads": (9, 3)},
    "dropout": {"dropout": True},
    "dropout_documents": {"dropout": True, "documents": "sorted", "bounds": True, "heads": (9, 3)},
    "value_dim": {"value_dim": VALUE_DIM},
    "everything": {
        "documents": "sorted",
        "key_padding": True,
        "mask": "heads",
        "window": 11,
        "softcap": 3.0,
        "heads": (9, 3),
        "prefix": True,
        "slopes": True,
        "sinks": True,
        "dropout": True,
    },
}
# The same sizes with documents that begin elsewhere, as batches come one after the other.
CHANGING_CASES: dict[str, dict[str, Any]] = {
    name: {"documents": kind, "bounds": True, "length": 64, "heads": (8, 4)}
    for name, kind in (("first", "chunks"), ("second", "chunks_11"), ("third", "sorted"), ("first_again", "chunks"))
}
FLOAT_CASES: dict[str, dict[str, Any]] = {
    "bias": {"mask": "bias"},
    "bias_full": {"mask": "bias", "is_causal": False, "heads": (9, 3), "softcap": 2.0},
    "finfo_min": {"mask": "min", "is_causal": False, "length": 64},
}


def documents_of(kind: str, length: int) -> torch.Tensor:
    """Return ids `[batch, length]`."""
    match kind:
        case "sorted":
            return torch.randint(0, 4, (BATCH, length)).sort(dim=1).values
        case "mixed":
            return torch.randint(0, 2, (BATCH, length))
        case "single":
            return torch.arange(length).expand(BATCH, length)
        case "giant":
            return torch.bucketize(torch.arange(length), torch.tensor([1, 2, 5, 68, 69, 71]), right=True)[None]
    size, *_ = (*parts_of(kind)[1], 6)
    return (torch.arange(length) // size).expand(1, length)


def inputs_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the whole tensors of a case."""
    case = PLAIN | case
    torch.manual_seed(0)
    (num_query, num_key), length = case["heads"], case["length"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    inputs = {name: case[name] for name in ("is_causal", "window", "lookahead", "softcap", "length")}
    inputs |= dict.fromkeys(("documents", "bounds", "key_padding", "mask", "prefix", "slopes", "sinks", "seed"))
    inputs["q"] = normal(BATCH, num_query, length, HEAD_DIM)
    inputs["k"] = normal(BATCH, num_key, length, HEAD_DIM)
    inputs["v"] = normal(BATCH, num_key, length, case["value_dim"])
    inputs["dout"] = normal(BATCH, num_query, length, case["value_dim"])
    if case.get("documents"):
        inputs["documents"] = documents_of(case["documents"], length)
    if case.get("bounds"):
        inputs["bounds"] = torch.ops.cpcompile.document_bounds(inputs["documents"])
    if case.get("key_padding"):
        inputs["key_padding"] = torch.arange(length) >= torch.tensor([[length // 3], [0]])
    if case.get("prefix"):
        inputs["prefix"] = torch.tensor([length // 2, 3])
    if case.get("slopes"):
        inputs["slopes"] = torch.rand(num_query)
    if case.get("sinks"):
        inputs["sinks"] = normal(num_query)
    inputs["dropout"] = DROPOUT if case.get("dropout") else 0.0
    if case.get("dropout"):
        inputs["seed"] = torch.tensor(12345)
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


def visible_of(x: dict[str, Any]) -> torch.Tensor:
    """Return which keys each query sees, by the definitions."""
    at = torch.arange(x["length"])
    row, column = at[:, None], at
    visible = torch.ones(1, 1, x["length"], x["length"], dtype=torch.bool)
    if x["is_causal"]:
        visible = visible & (column <= row)
    if x["lookahead"] >= 0:
        visible = visible & (column - row <= x["lookahead"])
    if x["prefix"] is not None:
        visible = visible | (column < x["prefix"][:, None, None, None])
    if x["window"]:
        visible = visible & (row - column < x["window"])
    if x["documents"] is not None:
        visible = visible & (x["documents"][:, None, :, None] == x["documents"][:, None, None, :])
    if x["key_padding"] is not None:
        visible = visible & x["key_padding"][:, None, None, :]
    if x["mask"] is not None and x["mask"].dtype == torch.bool:
        visible = visible & x["mask"]
    return visible


@functools.cache
def reference(name: str) -> tuple[torch.Tensor, ...]:
    """Return (out, dq, dk, dv, dsinks) by autograd through a plain softmax."""
    x = inputs_of((CASES | FLOAT_CASES | CHANGING_CASES)[name])
    leaves = q, k, v = [x[n].clone().requires_grad_() for n in "qkv"]
    repeats = q.shape[1] // k.shape[1]
    s = SCALE * q @ k.repeat_interleave(repeats, 1).transpose(-1, -2)
    if x["softcap"]:
        s = x["softcap"] * torch.tanh(s / x["softcap"])
    if x["slopes"] is not None:
        at = torch.arange(x["length"])
        s = s - x["slopes"][:, None, None] * (at[:, None] - at).abs()
    if x["mask"] is not None and x["mask"].dtype != torch.bool:
        s = s + x["mask"]
    s = s.masked_fill(~visible_of(x), -torch.inf)
    if x["sinks"] is not None:
        leaves.append(x["sinks"].clone().requires_grad_())
        s = torch.cat([s, leaves[-1][:, None, None].expand(*s.shape[:-1], 1)], -1)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)[..., : x["length"]]
    if x["dropout"]:
        index = torch.arange(p.numel()).view(p.shape)
        p = p * is_kept(x["seed"], 3, index, x["dropout"]) / (1 - x["dropout"])
    out = p @ v.repeat_interleave(repeats, 1)
    return out.detach(), *torch.autograd.grad(out, leaves, x["dout"])


def local(x: torch.Tensor, dim: int, rank: int, order: TokenOrder) -> torch.Tensor:
    """Return a rank's slots of `x`; padding slots hold 7, which no result may depend on."""
    taken = x.index_select(dim, order.sources(rank))
    shape = [-1 if d == dim else 1 for d in range(x.dim())]
    return (
        taken if x.dtype == torch.bool else taken.masked_fill((order.positions(rank) >= order.length).view(shape), 7.0)
    )


def parts_of(strategy: str) -> tuple[str, list[int]]:
    """Return the name and the numbers of `gather_1`."""
    parts = strategy.split("_")
    numbers = [int(part) for part in parts if part.isdecimal()]
    return "_".join(part for part in parts if not part.isdecimal()), numbers


def axis_of(rank: Any, strategy: str, layout: str, length: int) -> dict[str, Any]:
    """Return the keyword arguments of a strategy; `gather_1` sends one key head a message, `usp_2` has 2 inner ranks.

    Of `ulysses_0`, as of `usp_2_0`, nothing is kept by heads, and all heads are exchanged at once.
    """
    axis = {"length": length, "layout": layout, "world_size": rank.world_size, "group": rank.group}
    name, numbers = parts_of(strategy)
    if name == "usp":
        inner = numbers.pop(0)
        inner_group, outer_group = rank.grid(inner)
        axis |= {"inner_size": inner, "inner_group": inner_group, "outer_group": outer_group}
    if numbers == [0]:
        return axis | {"keeps_heads": False}
    return axis | ({"heads_per_message": numbers[0]} if numbers else {})


def attend(rank: Any, strategy: str, layout: str, cases: dict[str, dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """Run the operator on this rank's tokens for each case; return out, dq, dk, dv of its slots and its addend of dsinks."""
    results = {}
    for name, case in cases.items():
        x = inputs_of(case)
        order = TokenOrder.of(x["length"], rank.world_size, layout, x["bounds"])
        q, k, v, dout = (local(x[n], 2, rank.rank, order) for n in ("q", "k", "v", "dout"))
        family, _ = parts_of(strategy)
        mask = x["mask"]
        if mask is not None and not STRATEGIES[family].takes_whole_mask and mask.shape[2] > 1:
            mask = local(mask, 2, rank.rank, order)
        leaves = [t.requires_grad_() for t in (q, k, v, x["sinks"]) if t is not None]
        operator = getattr(torch.ops.cpcompile, f"{family}_attention")
        names = ("documents", "key_padding"), ("is_causal", "window", "softcap", "dropout", "lookahead", "bounds")
        terms = [mask, *(x[n] for n in names[0]), SCALE, *(x[n] for n in names[1])]
        terms += [*(x[n] for n in ("prefix", "slopes", "sinks", "seed")), 3]
        out = operator(*leaves[:3], *terms, **axis_of(rank, strategy, layout, x["length"]))[0]
        results[name] = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return results


def attend_in_other_calls(
    rank: Any, strategy: str, layout: str, cases: dict[str, dict[str, Any]]
) -> dict[str, list[torch.Tensor]]:
    """Run the operator as where a kernel takes many rectangles at once, and windows only of the rows' own tokens.

    A ring fetches each run of documents for itself, as where there is much between them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "takes_rectangles", lambda *_: True)
        patch.setattr(kernels, "prefers_squares", lambda *_: True)
        patch.setattr(key_needs, "GAP", 0)
        forget_schedules()
        found = attend(rank, strategy, layout, cases)
    forget_schedules()
    return found


def forget_schedules() -> None:
    """Forget what was found with another gap and other kernels."""
    for function in (needs, visits, partial_results._known_launches):
        function.cache_clear()


def check(
    pool: Any, strategy: str, layout: str, world_size: int, cases: dict[str, dict[str, Any]], job: Any = attend
) -> None:
    """Compare every case, joined by position, with the reference; padding slots must come out 0."""
    ranks = pool.run(world_size, job, strategy, layout, cases)
    for name, case in cases.items():
        length = (PLAIN | case)["length"]
        order = TokenOrder.of(length, world_size, layout, inputs_of(case)["bounds"])
        at = torch.cat([order.positions(rank) for rank in range(world_size)])
        assert len(at) == world_size * order.local_length
        for i, expected in enumerate(reference(name)):
            if NAMES[i] == "dsinks":
                whole = sum(rank[name][i] for rank in ranks)
            else:
                joined = torch.cat([rank[name][i] for rank in ranks], 2)
                assert not joined[:, :, at >= length].any(), f"{name}: padding of {NAMES[i]}"
                whole = torch.empty_like(expected).index_copy_(2, at[at < length], joined[:, :, at < length])
            error = ((whole - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
            assert error < 1e-12, f"{name}: {NAMES[i]} is off by {error:.1e}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("strategy", ["ring", "gather", "gather_1", "halo", "ulysses"])
def test_equals_the_whole_attention(pool: Any, strategy: str, layout: str, world_size: int) -> None:
    check(pool, strategy, layout, world_size, CASES)


@pytest.mark.parametrize(
    ("world_size", "strategy"), [(2, "usp_2"), (3, "usp_1"), (4, "usp_2"), (4, "usp_4"), (4, "usp_1")]
)
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_usp_equals_the_whole_attention(pool: Any, strategy: str, layout: str, world_size: int) -> None:
    check(pool, strategy, layout, world_size, CASES)


HEADS = ("short", "heads_9_3", "heads_2_1", "heads_8_4", "heads_8_8", "bounds", "mask", "sinks", "dropout_documents")


@pytest.mark.parametrize(
    ("world_size", "strategy", "layout"),
    [
        (1, "ulysses_1", "contiguous"),
        (2, "ulysses_0", "zig_zag"),
        (2, "ulysses_1", "contiguous"),
        (3, "ulysses_1", "zig_zag"),
        (4, "usp_2_1", "zig_zag"),
        (4, "usp_4_0", "balanced"),
    ],
)
def test_heads_that_are_exchanged_again_equal_the_whole_attention(
    pool: Any, world_size: int, strategy: str, layout: str
) -> None:
    check(pool, strategy, layout, world_size, {name: CASES[name] for name in (*HEADS, "everything")})


def laid(rank: Any, strategy: str, layout: str, case: dict[str, Any]) -> list[list[Any]]:
    """Return shapes and strides of all results and gradients, as they are and as they are traced."""
    x, found = inputs_of(case), []
    order = TokenOrder.of(x["length"], rank.world_size, layout)
    leaves = [local(x[n], 2, rank.rank, order).requires_grad_() for n in "qkv"]
    operator = getattr(torch.ops.cpcompile, f"{parts_of(strategy)[0]}_attention")
    with FakeTensorMode() as mode:
        traced = [mode.from_tensor(leaf) for leaf in leaves]
    for operands, inside in ((leaves, contextlib.nullcontext()), (traced, mode)):
        with inside:
            axis = axis_of(rank, strategy, layout, x["length"])
            out, *others = operator(*operands, None, None, None, SCALE, True, 0, 0.0, **axis)
            results = [out, *others, *torch.autograd.grad(out, operands, torch.ones_like(out))]
        found.append([(tuple(t.shape), t.stride() if t.numel() else (), t.dtype) for t in results])
    return found


@pytest.mark.parametrize(
    ("world_size", "strategy"), [(2, "ulysses"), (3, "ulysses"), (3, "ulysses_0"), (2, "ulysses_1"), (4, "usp_2")]
)
def test_results_are_laid_as_traced(pool: Any, world_size: int, strategy: str) -> None:
    for case in ("heads_9_3", "heads_8_4"):
        for real, traced in pool.run(world_size, laid, strategy, "zig_zag", CASES[case]):
            assert real == traced


@pytest.mark.parametrize("layout", DOCUMENT_LAYOUTS)
@pytest.mark.parametrize(
    ("world_size", "strategy", "size"),
    [
        (2, "usp_2", 2),
        (4, "usp_2", 2),
        (4, "usp_4", 4),
        (4, "usp_4", 2),
        (3, "ring", 3),
        (4, "gather", 2),
        (4, "ulysses", 2),
    ],
)
def test_documents_dealt_to_groups_equal_the_whole_attention(
    pool: Any, strategy: str, layout: str, world_size: int, size: int
) -> None:
    check(pool, strategy, of_groups(layout, size), world_size, CASES)


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        ("ring", "balanced"),
        ("gather_1", "balanced"),
        ("halo", "zig_zag"),
        ("ulysses", "contiguous"),
        ("ulysses", "balanced"),
        ("usp_2", "balanced:2"),
    ],
)
def test_documents_that_change_are_planned_anew(pool: Any, strategy: str, layout: str) -> None:
    check(pool, strategy, layout, 4, CHANGING_CASES)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [(1, "ring"), (4, "ring"), (3, "gather"), (4, "gather_1"), (3, "halo"), (2, "ulysses"), (4, "usp_2")],
)
def test_other_calls_of_kernels_equal_the_whole_attention(
    pool: Any, world_size: int, strategy: str, layout: str
) -> None:
    cases = {name: case for name, case in CASES.items() if "bounds" in name or "window" in name}
    check(pool, strategy, layout, world_size, cases, attend_in_other_calls)


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["gather", "ulysses"])
def test_float_masks_are_added(pool: Any, strategy: str, layout: str, world_size: int) -> None:
    check(pool, strategy, layout, world_size, FLOAT_CASES)


def test_ring_refuses_a_float_mask() -> None:
    x = torch.randn(1, 1, 4, 8)
    axis = {"length": 4, "layout": "contiguous", "world_size": 1, "group": ""}
    with pytest.raises(ValueError, match="gather_attention"):
        torch.ops.cpcompile.ring_attention(x, x, x, torch.zeros(1, 1, 4, 4), None, None, SCALE, False, 0, 0.0, **axis)
