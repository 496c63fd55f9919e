"""Masks in every spelling: drawn conjunctions of recognisable parts lose their dense mask, whatever operators write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import cpcompile
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.functionalise_writes import functionalise_writes
from cpcompile.passes.lift_masks import describe, lift_masks
from tests.graph.test_masks import (
    CAUSAL,
    IDS,
    NEAR_MISSES,
    NEAR_MISSES_OF_VECTORS,
    OTHER_IDS,
    PADDING,
    POSITIONS,
    S,
    attend,
    implied,
    packed,
    words,
)

LEAST = torch.finfo(torch.float32).min
Spelling = Callable[[Tensor, Tensor], Tensor]  # of the indices of queries and keys, in shapes that broadcast

ORDERS: dict[str, Spelling] = {
    "k <= q": lambda q, k: k <= q,
    "q >= k": lambda q, k: q >= k,
    "k < q + 1": lambda q, k: k < q + 1,
    "not k > q": lambda q, k: ~(k > q),
    "not q < k": lambda q, k: torch.logical_not(q < k),
    "q - k >= 0": lambda q, k: (q - k) >= 0,
    "k - q <= 0": lambda q, k: (k - q).le(0),
    "-k >= -q": lambda q, k: -k >= -q,
    "q > k - 1": lambda q, k: torch.gt(q, k - 1),
    "with offsets": lambda q, k: (k + 5) <= (q + 5),
    "twice as long": lambda q, k: 2 * k <= 2 * q,
    "q - k not negative": lambda q, k: ((q - k) < 0) == 0,
    "int32": lambda q, k: k.int() <= q.int(),
    "== 0 of an exclusive or": lambda q, k: (k > q) ^ True,
    "of either": lambda q, k: (k < q) | (k == q),
    "a where": lambda q, k: torch.where(k > q, False, True),
}
WINDOWS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "k > q - w": lambda q, k, w: k > q - w,
    "q - k < w": lambda q, k, w: q - k < w,
    "not q - k >= w": lambda q, k, w: ~(q - k >= w),
    "k + w > q": lambda q, k, w: k + w > q,
    "k - q >= 1 - w": lambda q, k, w: k - q >= 1 - w,
    "q - k <= w - 1": lambda q, k, w: torch.le(q - k, w - 1),
    "q < k + w": lambda q, k, w: q.lt(k + w),
}
EQUALITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a == b": lambda a, b: a == b,
    "b == a": lambda a, b: b == a,
    "not a != b": lambda a, b: ~(a != b),
    "a - b == 0": lambda a, b: (a - b) == 0,
    "both bounds": lambda a, b: (a <= b) & (b <= a),
    "no difference": lambda a, b: torch.logical_not((b - a).bool()),
    "an eq": lambda a, b: torch.eq(a.int(), b.int()),
}
PADDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda p: p.bool(),
    "!= 0": lambda p: p != 0,
    "== 1": lambda p: p == 1,
    "> 0": lambda p: p > 0,
    "not == 0": lambda p: ~(p == 0),
    "1 - p": lambda p: ~(1 - p).bool(),
    ">= 1": lambda p: p.int() >= 1,
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "&": lambda a, b: a & b,
    "logical_and": torch.logical_and,
    "not either": lambda a, b: ~(~a | ~b),
    "product": lambda a, b: a * b,
    "where": lambda a, b: torch.where(a, b, False),
    "masked_fill": lambda a, b: a.masked_fill(~b, False),
    "reversed": lambda a, b: b & a,
    "a product of numbers": lambda a, b: (a.long() * b.long()) != 0,
}
AXES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "two dims": lambda: (torch.arange(S)[:, None], torch.arange(S)[None, :]),
    "four dims": lambda: (torch.arange(S).view(1, 1, S, 1), torch.arange(S).view(1, 1, 1, S)),
    "expanded": lambda: (torch.arange(S)[:, None].expand(S, S), torch.arange(S).expand(S, S)),
    "cumsum": lambda: (torch.ones(S, 1, dtype=torch.long).cumsum(0), torch.ones(1, S, dtype=torch.long).cumsum(1)),
    "an offset": lambda: (torch.arange(3, 3 + S).unsqueeze(-1), torch.arange(3, 3 + S).unsqueeze(0)),
    "transposed": lambda: (torch.arange(S).expand(S, S).T, torch.arange(S)[:, None].expand(S, S).transpose(0, 1)),
    "permuted": lambda: (torch.arange(S).view(S, 1, 1).permute(1, 0, 2), torch.arange(S).view(1, 1, S)),
}
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "boolean": lambda m: m,
    "expanded": lambda m: m.expand(2, 1, S, S),
    "for each head": lambda m: m.expand(2, 2, S, S).clone(),
    "where 0, -inf": lambda m: torch.where(m, 0.0, float("-inf")),
    "where -inf, 0": lambda m: torch.where(~m, float("-inf"), 0.0),
    "masked_fill": lambda m: torch.zeros(2, 1, S, S).masked_fill(~m, float("-inf")),
    "zeros_like": lambda m: torch.zeros_like(m, dtype=torch.float32).masked_fill(m.logical_not(), float("-inf")),
}
FINITE_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "where 0, least": lambda m: torch.where(m, 0.0, LEAST),
    "1 - m times least": lambda m: (1.0 - m.float()) * LEAST,
    "masked_fill of least": lambda m: torch.full((2, 1, S, S), 0.0).masked_fill(~m, LEAST),
    "full then product": lambda m: torch.full((S, S), LEAST) * (~m),
}


def rows(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return a value of each token for the queries and for the keys."""
    return vector[:, None, :, None], vector[:, None, None, :]


@st.composite
def conjunctions(draw: Any) -> tuple[set[str], Callable[..., Tensor]]:
    """Draw a mask that is a conjunction of recognisable parts, with the words for it."""

    def name(table: dict[str, Any]) -> Any:
        return table[draw(st.sampled_from(sorted(table)))]

    kinds = draw(
        st.lists(st.sampled_from(["causal", "window", "documents", "packed", "padding", "chunks"]), min_size=1)
    )
    width, size = draw(st.integers(1, S - 2)), draw(st.integers(2, 4))
    order, window, equal, other, real = (name(t) for t in (ORDERS, WINDOWS, EQUALITIES, EQUALITIES, PADDINGS))
    axes, joins = name(AXES), [name(JOINS) for _ in kinds]
    form = name(FORMS if "padding" in kinds else FORMS | FINITE_FORMS)

    def mask(ids: Tensor, padding: Tensor, positions: Tensor) -> Tensor:
        q, k = axes()
        makes: dict[str, Callable[[], Tensor]] = {
            "causal": lambda: order(q, k),
            "window": lambda: window(q, k, width),
            "documents": lambda: equal(*rows(ids)),
            "packed": lambda: other(*rows(packed(positions))),
            "padding": lambda: real(padding)[:, None, None, :],
            "chunks": lambda: q // size == k // size,
        }
        result = torch.ones(S, S, dtype=torch.bool)
        for kind, join in zip(kinds, joins, strict=True):
            result = join(result, makes[kind]())
        return form(result)

    named = {"window": f"window {width}", "packed": "documents", "chunks": "documents", "padding": "key padding"}
    return {named.get(kind, kind) for kind in kinds}, mask


@settings(max_examples=60, deadline=None)
@given(conjunctions())
def test_a_conjunction_is_recognised_however_it_is_written(drawn: tuple[set[str], Callable[..., Tensor]]) -> None:
    expected, mask = drawn
    vectors = (IDS, PADDING, POSITIONS)
    gm, node = attend(mask, *vectors)
    assert set(describe(node).split(", ")) == expected
    dense = mask(*vectors)
    visible = dense if dense.dtype is torch.bool else dense == 0
    assert torch.equal(implied(gm, node, *vectors), visible.expand(2, 2, S, S)[:, 0])


ATOMS: dict[str, Callable[..., Tensor]] = {
    **{f"causal {n}": lambda i, p, x, o, n=n: CAUSAL[n]() for n in list(CAUSAL)[::3]},
    **{f"ordered {n}": lambda i, p, x, o, f=f: f(*AXES["two dims"]()) for n, f in ORDERS.items()},
    **{f"window {n}": lambda i, p, x, o, f=f: f(*AXES["two dims"](), 3) for n, f in WINDOWS.items()},
    **{f"ids {n}": lambda i, p, x, o, f=f: f(*rows(i)) for n, f in EQUALITIES.items()},
    **{f"near miss {n}": lambda i, p, x, o, f=f: f() for n, f in NEAR_MISSES.items()},
    **{f"near miss of ids {n}": lambda i, p, x, o, f=f: f(i, o) for n, f in NEAR_MISSES_OF_VECTORS.items()},
    "packed": lambda i, p, x, o: packed(x)[:, None, :, None] == packed(x)[:, None, None, :],
    "positions in order": lambda i, p, x, o: x[:, None, None, :] <= x[:, None, :, None],
    "padding of keys": lambda i, p, x, o: p.bool()[:, None, None, :],
    "padding of queries": lambda i, p, x, o: p.bool()[:, None, :, None],
}
CONNECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **JOINS,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "without": lambda a, b: a & ~b,
    "where else": lambda a, b: torch.where(a, b, ~b),
}


@pytest.mark.always
@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(ATOMS)), st.sampled_from(sorted(CONNECTIVES)), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_is_recognised_means_the_dense_mask(steps: list[tuple[str, str, bool]]) -> None:
    def mask(*vectors: Tensor) -> Tensor:
        result = torch.ones(S, S, dtype=torch.bool)
        for atom, connective, is_negated in steps:
            part = ATOMS[atom](*vectors)
            result = CONNECTIVES[connective](result, ~part if is_negated else part)
        return result

    vectors = (IDS, PADDING, POSITIONS, OTHER_IDS)
    gm, node = attend(mask, *vectors)
    assert torch.equal(implied(gm, node, *vectors), mask(*vectors).expand(2, 2, S, S)[:, 0]), describe(node)


def grid(*, indexing: str) -> Any:
    return torch.meshgrid(torch.arange(S), torch.arange(S), indexing=indexing)


def written(rows: int, columns: int) -> Tensor:
    """Return a mask that is written in place."""
    mask, index = torch.zeros(S, S), torch.arange(S)
    mask[rows * index[None] > columns * index[:, None]] = float("-inf")
    return mask


Q, K = (lambda: torch.arange(S)[:, None]), (lambda: torch.arange(S))
OPERATORS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "meshgrid": ("causal", lambda i: grid(indexing="ij")[1] <= grid(indexing="ij")[0]),
    "meshgrid xy": ("causal", lambda i: grid(indexing="xy")[0] <= grid(indexing="xy")[1]),
    "meshgrid of one and the other": ("key padding", lambda i: 2 * grid(indexing="xy")[0] <= grid(indexing="ij")[1]),
    "repeat": ("causal", lambda i: (K() <= Q())[None, None].repeat(2, 1, 1, 1)),
    "tile": ("causal", lambda i: (K() <= Q())[None, None].tile(2, 1, 1, 1)),
    "repeat of rows": ("dense", lambda i: (K() <= Q())[:1].repeat(S, 1) | (K() == Q())),
    "repeat of ids": ("documents", lambda i: (i[:, None].repeat(1, S, 1) == i[:, :, None].repeat(1, 1, S))[:, None]),
    "repeat_interleave": ("documents", lambda i: (i[:, None].repeat_interleave(S, 1) == i[:, :, None])[:, None]),
    "written by condition": ("causal", lambda i: written(1, 1)),
    "written by another condition": ("dense", lambda i: written(2, 1)),
    "T": ("causal", lambda i: (Q() <= K()).T),
    "mT": ("causal", lambda i: (Q() <= K()).mT),
    "mT of the mask": ("window 1", lambda i: (K() <= Q()).mT),
    "swapaxes": ("causal", lambda i: (Q() <= K()).swapaxes(0, 1)),
    "movedim": ("causal", lambda i: (Q() <= K())[None].movedim(2, 1)),
    "exclusive or": ("causal", lambda i: (K() > Q()) ^ True),
    "exclusive or of ids": ("dense", lambda i: (rows(i)[0] == rows(i)[1]) ^ (K() <= Q())),
    "alpha": ("causal", lambda i: torch.sub(2 * K(), Q(), alpha=2) <= 0),
    "another alpha": ("dense", lambda i: torch.sub(K(), Q(), alpha=2) <= 0),
    "flip": ("causal", lambda i: torch.arange(S).flip(0) >= torch.arange(S).flip(0)[:, None]),
    "flip of the keys": ("dense", lambda i: torch.arange(S).flip(0) <= Q()),
    "narrow numbers": ("causal", lambda i: 1 - torch.triu(torch.ones(S, S, dtype=torch.uint8), 1) == 1),
    "numbers that wrap around": ("dense", lambda i: (torch.ones(S, S, dtype=torch.uint8).tril() * 200 + 100) < 100),
    "hidden twice": ("causal", lambda i: torch.full((S, S), LEAST).triu(1) * (K() > Q())),
    "hidden by either": ("causal", lambda i: torch.full((S, S), LEAST).triu(2) + (K() > Q()) * LEAST),
    "ids less those that end": ("documents", lambda i: same_rows((i == 3).cumsum(1) - (i == 3).long())),
    "ids in thirds": ("documents", lambda i: same_rows((i == 3).cumsum(1) * 2 + i // 3)),
    "ids of two makes": ("dense", lambda i: rows(i + 1)[0] - rows(2 * i)[1] == 0),
    "a sum of ids": ("dense", lambda i: rows(i)[0] + rows(i)[1] == 2),
    "hstack": ("causal", lambda i: torch.hstack([(K() <= Q())[:, :3], (K() + 3 <= Q())[:, : S - 3]])),
    "hstack with nothing": ("causal", lambda i: torch.hstack([torch.zeros(S, 0), torch.full((S, S), LEAST).triu(1)])),
    "hstack of another order": ("dense", lambda i: torch.hstack([(K() <= Q())[:, 3:], (K() <= Q())[:, :3]])),
    "vstack": ("causal", lambda i: torch.vstack([(K() <= Q())[:2], (K() <= Q() + 2)[: S - 2]])),
    "vstack of vectors": ("dense", lambda i: torch.vstack([K() <= row for row in range(S)])),
    "logarithm": ("causal", lambda i: torch.ones(S, S).tril().log()),
    "logarithm of twos": ("dense", lambda i: (2 * torch.ones(S, S)).tril().log()),
    "multiples of ids": ("documents", lambda i: 3 * rows(i)[0] == 3 * rows(i)[1]),
}


def same_rows(ids: Tensor) -> Tensor:
    return rows(ids)[0] == rows(ids)[1]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_masks_are_written_with(name: str) -> None:
    expected, mask = OPERATORS[name]
    q = torch.randn(2, 2, S, 4)

    def model(q: Tensor, ids: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, mask(ids))

    gm = make_fx(model, tracing_mode="fake", pre_dispatch=True)(q, IDS)
    functionalise_writes(gm)
    assert find_attention(gm) == 1
    lift_masks(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    assert describe(node).partition(" [")[0] == expected
    gm.recompile()
    torch.testing.assert_close(gm(q, IDS), model(q, IDS))


HALF = S // 2
NEARLY: dict[str, Callable[..., Tensor]] = {
    "causal in the first half": lambda q, k, ids, real: (k <= q) | (q >= HALF),
    "causal in the second half": lambda q, k, ids, real: (k <= q) | (q < HALF),
    "one diagonal less": lambda q, k, ids, real: (k < q) | ((k == 0) & (q == 0)),
    "a window that grows": lambda q, k, ids, real: (k <= q) & (2 * (q - k) <= q + 1),
    "a window of each sequence": lambda q, k, ids, real: (k <= q) & (q - k < 1 + ids[:, :1, None, None]),
    "ids in order": lambda q, k, ids, real: ids[:, None, None, :] <= ids[:, None, :, None],
    "ids of the neighbour": lambda q, k, ids, real: (k <= q) & (ids[:, None, None, :] >= ids[:, None, :, None] - 1),
    "padding of queries": lambda q, k, ids, real: (k <= q) & (real[:, None, :, None] | (k == q)),
    "padding of both": lambda q, k, ids, real: (
        (k <= q) & ((real[:, None, :, None] == real[:, None, None, :]) | (k == q))
    ),
    "causal or the same id": lambda q, k, ids, real: (k <= q) | (ids[:, None, :, None] == ids[:, None, None, :]),
    "every other key": lambda q, k, ids, real: (k <= q) & ((q - k) % 2 == 0),
    "the first key and a window": lambda q, k, ids, real: (k <= q) & ((q - k < 2) | (k == 0)),
    "not its own": lambda q, k, ids, real: (k != q) | (q == 0),
    "chunks that overlap": lambda q, k, ids, real: (k <= q) & (k // 2 >= q // 2 - 1),
}


class Masked(nn.Module):
    """One attention under a mask that a function of the indices, ids and padding makes."""

    def __init__(self, mask: Callable[..., Tensor], form: Callable[[Tensor], Tensor] = lambda m: m) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv, self.head = nn.Embedding(19, 16), nn.Linear(16, 48), nn.Linear(16, 19)
        self.mask, self.form = mask, form

    def forward(self, input_ids: Tensor, labels: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = self.form(self.mask(index[:, None], index[None, :], ids, real.bool()))
        x = self.embedding(input_ids)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def in_lockstep(mask: Callable[..., Tensor], batch_size: int, **options: Any) -> str:
    """Check a model under a mask on 2 ranks against one device; return the words for its attention."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(19, (batch_size, S + 4), generator=generator)
    documents = torch.randint(2, (batch_size, S + 4), generator=generator).cumsum(1)
    real = torch.arange(S + 4)[None] < torch.tensor([S + 4, S, S + 2])[:batch_size, None]
    inputs = {"input_ids": ids, "labels": ids.flip(1), "ids": documents, "real": real.long()}
    found = cpcompile.verify(
        Masked(mask).double(), inputs, world_size=2, dtype=torch.float64, token_dims={"input_ids": 1}, **options
    )
    found.raise_if_wrong()
    (node,) = found.transformed.analysed.graph.find_nodes(
        op="call_function", target=torch.ops.cpcompile.attention.default
    )
    return describe(node)


@pytest.mark.parametrize("name", NEARLY)
@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_a_near_miss_stays_dense_and_exact(name: str, strategy: str) -> None:
    assert in_lockstep(NEARLY[name], 2, strategy=strategy).startswith("dense")


RECOGNISED: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "causal": ("causal", lambda q, k, ids, real: ~(k - q > 0)),
    "window": ("causal, window 3", lambda q, k, ids, real: (q >= k) & (k + 3 > q)),
    "both sides": ("look-ahead 2, window 3", lambda q, k, ids, real: (k - q).abs() < 3),
    "chunks": ("causal, documents", lambda q, k, ids, real: (q // 4 == k // 4) & (q >= k)),
    "prefix": ("causal, prefix", lambda q, k, ids, real: (k <= q) | (k < 4)),
    "documents": (
        "causal, documents",
        lambda q, k, ids, real: (k <= q) & ~(ids[:, None, :, None] != ids[:, None, None]),
    ),
    "padding": ("causal, key padding", lambda q, k, ids, real: (k <= q) & real[:, None, None]),
    "all of them": (
        "causal, window 5, documents, key padding",
        lambda q, k, ids, real: (
            (k <= q) & (q - k < 5) & (ids[:, None, :, None] == ids[:, None, None]) & real[:, None, None]
        ),
    ),
}


@pytest.mark.parametrize("name", RECOGNISED)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_recognised_is_exact(name: str, batch_size: int) -> None:
    expected, mask = RECOGNISED[name]
    assert in_lockstep(mask, batch_size) == expected


def test_a_spelling_that_is_not_what_it_seems_is_seen() -> None:
    """The comparison above can fail: what is implied is not the mask of a neighbour."""
    gm, node = attend(lambda: torch.arange(S)[None] <= torch.arange(S)[:, None])
    assert not torch.equal(implied(gm, node), torch.ones(S, S).tril(-1).bool().expand(2, S, S))
    assert words(lambda: torch.ones(S, S).tril(-1).bool()).startswith("dense")
