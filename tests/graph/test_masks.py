"""Masks are read by meaning: every spelling of a mask is recognised as the same, and no near miss is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.ir.operator_call import Call
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.lift_masks import describe, lift_masks

Tensor = torch.Tensor
S = 7
ROWS, COLUMNS = torch.arange(S)[:, None], torch.arange(S)[None, :]
IDS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 5, 5, 5]])
OTHER_IDS = torch.tensor([[0, 1, 1, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5, 5]])
PADDING = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [4, 5, 6, 7, 0, 1, 9]])


def attend(mask: Callable[..., Tensor], *vectors: Tensor) -> Any:
    """Return the node of an attention under `mask(*vectors)`, after both passes, and its graph."""
    q = torch.randn(2, 2, S, 4)

    def model(q: Tensor, *vectors: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, mask(*vectors))

    gm = make_fx(model, tracing_mode="fake", pre_dispatch=True)(q, *vectors)
    assert find_attention(gm) == 1
    lift_masks(gm)
    gm.graph.lint()
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    return gm, node


def words(mask: Callable[..., Tensor], *vectors: Tensor) -> str:
    return describe(attend(mask, *vectors)[1])


class Arguments(fx.Interpreter):
    """Runs a graph up to its attention, and keeps the arguments."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.cpcompile.attention.default:
            self.seen = args
        return super().call_function(target, args, kwargs)


def implied(gm: fx.GraphModule, node: fx.Node, *vectors: Tensor) -> Tensor:
    """Return, by brute force, the mask `[2, S, S]` that the arguments of the attention mean."""
    interpreter = Arguments(gm)
    interpreter.run(torch.randn(2, 2, S, 4), *vectors)
    names = list(Call.of(node).arguments)
    given = dict(zip(names, interpreter.seen, strict=False))
    visible = torch.ones(2, S, S, dtype=torch.bool)
    if given["mask"] is not None:
        visible &= given["mask"].expand(2, 1, S, S)[:, 0]
    if given["documents"] is not None:
        visible &= given["documents"][:, :, None] == given["documents"][:, None, :]
    if given["key_padding"] is not None:
        visible &= given["key_padding"][:, None, :]
    ahead = 0 if given["is_causal"] else given.get("lookahead", -1)
    if ahead >= 0:
        before = given.get("prefix")
        shown = torch.zeros(1, S, S, dtype=torch.bool) if before is None else before[:, None, None] > COLUMNS
        visible &= (ahead >= COLUMNS - ROWS) | shown
    if given["window"]:
        visible &= ROWS - given["window"] < COLUMNS
    return visible


def q() -> Tensor:
    return torch.arange(S).view(S, 1)


def kv() -> Tensor:
    return torch.arange(0, S)


def ones() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool)


CAUSAL: dict[str, Callable[[], Tensor]] = {
    "kv <= q": lambda: kv() <= q(),
    "q >= kv": lambda: q() >= kv(),
    "not kv > q": lambda: ~(kv() > q()),
    "kv < q + 1": lambda: kv() < q() + 1,
    "q - kv >= 0": lambda: q() - kv() >= 0,
    "q - kv > -1": lambda: q().sub(kv()) > -1,
    "0 <= q - kv": lambda: torch.zeros(1, dtype=torch.long) <= q() - kv(),
    "tril of ones": lambda: torch.tril(ones()),
    "tril of floats": lambda: torch.tril(torch.ones(S, S)).bool(),
    "tril == 1": lambda: torch.tril(torch.ones(S, S)) == 1,
    "not triu": lambda: torch.triu(ones(), diagonal=1).logical_not(),
    "triu transposed": lambda: torch.triu(ones()).transpose(0, 1),
    "four dims": lambda: (torch.arange(S)[None, None, None, :] <= torch.arange(S).view(1, 1, -1, 1)).expand(2, 1, S, S),
    "reversed twice": lambda: (S - 1 - kv()) >= (S - 1 - q()),
    "where": lambda: torch.where(kv() > q(), 0, 1).bool(),
    "masked_fill": lambda: torch.zeros(S, S).masked_fill(kv() > q(), 1.0) == 0,
    "product of booleans": lambda: ones() * (kv() <= q()),
    "negative by rsub": lambda: (1 - (kv() > q()).long()).bool(),
    "twice the same": lambda: (kv() <= q()) & torch.tril(ones()),
    "select of a batch": lambda: torch.arange(S).expand(3, S)[1] <= q(),
    "slice": lambda: torch.arange(S + 3)[3:] - 3 <= q(),
    "cumsum of ones": lambda: torch.ones(S, dtype=torch.long).cumsum(0) - 1 <= q(),
    "stacked halves": lambda: torch.cat([torch.arange(3), torch.arange(3, S)]) <= q(),
    "padded": lambda: torch.nn.functional.pad(torch.tril(torch.ones(S, S, dtype=torch.long)), (0, 0)) != 0,
    "every index": lambda: (kv() <= q()) & (q() >= 0),
}


@pytest.mark.parametrize("spelling", CAUSAL)
def test_every_spelling_of_causal(spelling: str) -> None:
    assert words(CAUSAL[spelling]) == "causal"


@pytest.mark.parametrize("spelling", CAUSAL)
@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_every_spelling_of_causal_as_a_float(spelling: str, fill: float) -> None:
    assert words(lambda: torch.where(CAUSAL[spelling](), 0.0, fill)) == "causal"
    assert words(lambda: torch.zeros(S, S).masked_fill(~CAUSAL[spelling](), fill)) == "causal"


def test_an_inverted_mask_times_the_least_number() -> None:
    assert words(lambda: (1.0 - (kv() <= q()).float()) * torch.finfo(torch.float32).min) == "causal"
    assert words(lambda: torch.full((S, S), float("-inf")).triu(1)) == "causal"


WINDOWS: dict[str, Callable[[], Tensor]] = {
    "causal, window 3": lambda: (kv() <= q()) & (kv() > q() - 3),
    "causal, window 4": lambda: (kv() <= q()) & (q() - kv() <= 3),
    "causal, window 2": lambda: (kv() <= q()) & ~(q() - kv() >= 2),
    "causal, window 5": lambda: torch.tril(ones()) & torch.triu(ones(), diagonal=-4),
    "causal, window 1": lambda: (q() - kv()) == 0,
}


BANDS: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "one ahead": ("look-ahead 1", lambda: kv() <= q() + 1),
    "tril two up": ("look-ahead 2", lambda: torch.tril(ones(), diagonal=2)),
    "triu": ("window 1", lambda: torch.triu(ones())),
    "window alone": ("window 3", lambda: q() - kv() < 3),
    "both sides": ("look-ahead 1, window 3", lambda: (q() - kv() < 3) & (kv() - q() < 2)),
    "a distance": ("look-ahead 2, window 3", lambda: (q() - kv()).abs() <= 2),
    "less than a distance": ("look-ahead 1, window 2", lambda: ~(abs(kv() - q()) >= 2)),
    "a distance and causal": ("causal, window 3", lambda: (abs(q() - kv()) < 3) & (kv() <= q())),
    "two look-aheads": ("look-ahead 1", lambda: (kv() <= q() + 1) & (kv() <= q() + 3)),
    "from a longer row": ("look-ahead 1", lambda: torch.arange(S)[None] <= torch.arange(1, S + 1)[:, None]),
    "prefix": ("causal, prefix", lambda: (kv() <= q()) | (kv() < 2)),
    "prefix and look-ahead": ("prefix, look-ahead 1", lambda: ~((kv() > q() + 1) & (kv() >= 3))),
    "prefix that is hidden": ("causal", lambda: ((kv() <= q()) | (kv() < 2)) & torch.tril(ones())),
    "prefix beside a wider bound": ("causal", lambda: ((kv() <= q() + 2) | (kv() < 4)) & torch.tril(ones())),
    "prefix and window": ("causal, prefix, window 3", lambda: ((kv() <= q()) | (kv() < 4)) & (q() - kv() < 3)),
    "chunks": ("causal, documents", lambda: (kv() <= q()) & (kv() // 2 == q() // 2)),
    "chunks by div": (
        "documents",
        lambda: torch.div(kv() + 1, 3, rounding_mode="floor") == torch.div(q() + 1, 3, rounding_mode="floor"),
    ),
    "chunks of two sizes": ("documents", lambda: (kv() // 2 == q() // 2) & (kv() // 3 == q() // 3)),
}


@pytest.mark.parametrize("expected", WINDOWS)
def test_windows_have_their_exact_width(expected: str) -> None:
    gm, node = attend(WINDOWS[expected])
    assert describe(node) == expected
    assert torch.equal(implied(gm, node), WINDOWS[expected]().expand(2, S, S))


@pytest.mark.parametrize("name", BANDS)
def test_bands_prefixes_and_chunks(name: str) -> None:
    expected, mask = BANDS[name]
    gm, node = attend(mask)
    assert describe(node) == expected
    assert torch.equal(implied(gm, node), mask().expand(2, S, S))


NEAR_MISSES: dict[str, Callable[..., Tensor]] = {
    "strict": lambda: kv() < q(),
    "tril one down": lambda: torch.tril(ones(), diagonal=-1),
    "twice as steep": lambda: 2 * kv() <= q(),
    "nothing": lambda: ones().logical_not(),
    "only later keys": lambda: kv() > q(),
    "of a shorter row": lambda: torch.arange(1, S + 1)[None] <= torch.arange(S)[:, None],
    "prefix of queries": lambda: (kv() <= q()) | (q() < 2),
    "suffix": lambda: (kv() <= q()) | (kv() > 4),
    "prefix of another bound": lambda: ((kv() <= q()) | (kv() < 4)) & (kv() <= q() + 2),
    "two prefixes": lambda: (kv() <= q()) | (kv() < 4) | (q() + kv() < 5),
    "chunks of others": lambda: kv() // 2 == q() // 3,
    "shifted chunks": lambda: kv() // 2 == q() // 2 + 1,
    "ordered chunks": lambda: kv() // 2 <= q() // 2,
    "far away": lambda: abs(q() - kv()) >= 2,
}
MASKS_OF_KEYS: dict[str, Callable[[], Tensor]] = {
    "of the key alone": lambda: (kv() < 5) & (q() >= 0),
    "a distance from the middle": lambda: (abs(kv() - 3) <= 2) & (q() >= 0),
}
NEAR_MISSES_OF_VECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "two ids": lambda a, b: a[:, None, :, None] == b[:, None, None, :],
    "prefix of tokens": lambda a, b: (kv() <= q()) | (kv() < a[:, None, None, :]),
    "chunks of two": lambda a, b: a[:, None, :, None] // 2 == b[:, None, None, :] // 2,
    "one sequence's ids": lambda a, b: a[1][:, None] == a[1],
    "different ids": lambda a, b: a[:, None, :, None] != a[:, None, None, :],
    "ordered ids": lambda a, b: a[:, None, :, None] >= a[:, None, None, :],
    "shifted ids": lambda a, b: a[:, None, :, None] == a[:, None, None, :] + 1,
    "query padding": lambda a, b: (a != 0)[:, None, :, None] & (kv() <= q()),
    "either padding": lambda a, b: (a != 0)[:, None, None, :] | (b != 0)[:, None, None, :],
    "positions without documents": lambda a, b: a[:, None, None, :] <= a[:, None, :, None],
    "another sequence's padding": lambda a, b: (a[1] != 0)[None, None, None, :] & (a != 0)[0, 0],
    "ids of an unread form": lambda a, b: same(a.repeat(1, 1, 1)[0]) & (b[0, 0] != 0),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_dense(name: str) -> None:
    assert words(NEAR_MISSES[name]) == f"dense [{S}, {S}]"


@pytest.mark.parametrize("name", MASKS_OF_KEYS)
def test_masks_of_keys_are_key_padding(name: str) -> None:
    assert words(MASKS_OF_KEYS[name]) == "key padding"


@pytest.mark.parametrize("name", NEAR_MISSES_OF_VECTORS)
def test_near_misses_of_vectors_stay_dense(name: str) -> None:
    assert words(NEAR_MISSES_OF_VECTORS[name], IDS, OTHER_IDS).startswith("dense")


def test_everything_visible_is_no_mask() -> None:
    assert words(ones) == "all"
    assert words(lambda: torch.arange(S)[:, None] + torch.zeros(S, dtype=torch.long) >= 0) == "all"
    assert words(lambda: torch.zeros(S, S)) == "all"


def packed(positions: Tensor) -> Tensor:
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def same(ids: Tensor) -> Tensor:
    return ids[:, None, :, None] == ids[:, None, None, :]


VECTORS: dict[str, tuple[str, Callable[[Tensor], Tensor], Tensor]] = {
    "documents": ("documents", same, IDS),
    "documents by difference": ("documents", lambda a: a[:, None, :, None] - a[:, None, None, :] == 0, IDS),
    "one row of documents": ("documents", same, IDS[:1]),
    "documents without a batch": ("documents", lambda a: a[:, None] == a, IDS[0]),
    "causal documents": ("causal, documents", lambda a: same(a) & (kv() <= q()), IDS),
    "padding": ("key padding", lambda a: a.bool()[:, None, None, :], PADDING),
    "padding == 1": ("key padding", lambda a: (a == 1)[:, None, None], PADDING),
    "padding > 0": ("key padding", lambda a: a[:, None, None, :] > 0, PADDING),
    "padding < 1, inverted": ("key padding", lambda a: ~(a < 1)[:, None, None, :], PADDING),
    "padding of booleans": ("key padding", lambda a: a[:, None, None, :].expand(2, 1, S, S), PADDING.bool()),
    "inverted padding of booleans": ("key padding", lambda a: ~a[:, None, None, :], PADDING.bool()),
    "padding without a batch": ("causal, key padding", lambda a: (a != 0) & (kv() <= q()), PADDING[0]),
    "two paddings": ("key padding", lambda a: ((a != 0) & (a < 2))[:, None, None, :], PADDING),
    "padding by indices": (
        "causal, key padding",
        lambda a: (kv() <= q()) & a.bool()[torch.arange(2)[:, None, None, None], torch.arange(S)[None, None, None]],
        PADDING,
    ),
    "packed": ("documents", lambda p: same(packed(p)), POSITIONS),
    "packed and causal": ("causal, documents", lambda p: same(packed(p)) & (kv() <= q()), POSITIONS),
    "packed and causal by positions": (
        "causal, documents",
        lambda p: same(packed(p)) & (p[:, None, None, :] <= p[:, None, :, None]),
        POSITIONS,
    ),
    "packed and a window by positions": (
        "causal, window 2, documents",
        lambda p: same(packed(p)) & (kv() <= q()) & (p[:, None, None, :] > p[:, None, :, None] - 2),
        POSITIONS,
    ),
    "packed by padding": (
        "causal, documents",
        lambda p: same(torch.nn.functional.pad(p[:, 1:] - p[:, :-1] != 1, (1, 0)).cumsum(-1)) & (kv() <= q()),
        POSITIONS,
    ),
}


PREFIX = torch.tensor([2, 5])
VECTORS |= {
    "prefix lengths": (
        "causal, prefix",
        lambda p: (kv() <= q()) | (kv() < p[:, None, None, None]),
        PREFIX,
    ),
    "prefix lengths in a column": (
        "causal, prefix",
        lambda p: (kv() <= q()) | (torch.arange(S)[None, None, None] <= p[:, :, None, None] - 1),
        PREFIX[:, None],
    ),
    "one prefix length": ("causal, prefix", lambda p: (kv() <= q()) | (kv() < p), PREFIX[1]),
    "prefix within documents": (
        "causal, prefix, documents",
        lambda a: same(a) & ((kv() <= q()) | (kv() < a.sum(-1)[:, None, None, None])),
        IDS - 2,
    ),
    "chunks after left padding": (
        "causal, documents",
        lambda p: (
            ((torch.arange(S) - p[:, None, None, None]) // 3 == (q() - p[:, None, None, None]) // 3) & (kv() <= q())
        ),
        PREFIX,
    ),
    "chunks of positions": (
        "causal, documents",
        lambda p: (
            same(packed(p))
            & (p[:, None, None, :] // 2 == p[:, None, :, None] // 2)
            & (p[:, None, None, :] <= p[:, None, :, None])
        ),
        POSITIONS,
    ),
    "documents and chunks": ("documents", lambda a: same(a) & (kv() // 4 == q() // 4), IDS),
    "two ids": ("documents", lambda a: same(a) & same(a % 2), IDS * 2**61),
}


@pytest.mark.parametrize("name", VECTORS)
def test_masks_of_vectors(name: str) -> None:
    expected, mask, vector = VECTORS[name]
    gm, node = attend(mask, vector)
    assert describe(node) == expected
    assert torch.equal(implied(gm, node, vector), mask(vector).expand(2, 1, S, S)[:, 0])


def test_positions_that_count_up_are_one_document() -> None:
    assert words(lambda: same(packed(torch.arange(S).expand(2, S))) & (kv() <= q())) == "causal"
    assert words(lambda: same(packed(torch.arange(5, 5 + S)[None])) & (kv() <= q())) == "causal"
    assert words(lambda: same(packed(2 * torch.arange(S)[None])) & (kv() <= q())) == "causal, documents"


def test_a_finite_fill_needs_a_key_in_every_row() -> None:
    least = torch.finfo(torch.float32).min
    assert words(lambda a: torch.where(same(a), 0.0, least), IDS) == "documents"
    assert words(lambda a: torch.where((a != 0)[:, None, None], 0.0, least), PADDING).startswith("dense")
    assert words(lambda a: torch.where((a != 0)[:, None, None], 0.0, float("-inf")), PADDING) == "key padding"


def test_a_score_bias_stays() -> None:
    assert words(lambda: torch.where(kv() <= q(), 0.0, -1.0)).startswith("dense")
    assert words(lambda: torch.where(kv() <= q(), 1.0, float("-inf"))).startswith("dense")
    assert words(lambda: (kv() - q()).float()).startswith("dense")
    assert words(lambda: (kv() <= q()).float()).startswith("dense")


def test_cross_attention_is_not_causal() -> None:
    def model(q_BHSD: Tensor, k_BHSD: Tensor) -> Tensor:
        mask = torch.arange(S + 2) <= torch.arange(S)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q_BHSD, k_BHSD, k_BHSD, mask)

    gm = make_fx(model, tracing_mode="fake", pre_dispatch=True)(torch.randn(2, 2, S, 4), torch.randn(2, 2, S + 2, 4))
    assert (find_attention(gm), lift_masks(gm)) == (1, 0)


PARTS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    *(lambda ids, padding, positions, make=make: make() for make in [*CAUSAL.values()][:8]),
    *(lambda ids, padding, positions, w=w: kv() > q() - w for w in range(4)),
    *(lambda ids, padding, positions, w=w: q() - kv() <= w for w in range(3)),
    *(lambda ids, padding, positions, d=d: torch.triu(ones(), d) for d in (-2, -1, 0, 1)),
    lambda ids, padding, positions: same(ids),
    lambda ids, padding, positions: same(packed(positions)),
    lambda ids, padding, positions: positions[:, None, None, :] <= positions[:, None, :, None],
    lambda ids, padding, positions: padding.bool()[:, None, None, :],
    lambda ids, padding, positions: padding[:, None, None, :] > 0,
    lambda ids, padding, positions: ids[:, None, None, :] <= 3,
    lambda ids, padding, positions: kv() <= q() + 1,
]


def random_mask(seed: int) -> Callable[..., Tensor]:
    """Return a mask of random parts, joined and negated at random, mostly by conjunction."""

    def mask(*vectors: Tensor) -> Tensor:
        choose = random.Random(seed)
        result = choose.choice(PARTS)(*vectors)
        for _ in range(choose.randrange(4)):
            part = choose.choice(PARTS)(*vectors)
            how = choose.random()
            if how < 0.1:
                result = result | part
            elif how < 0.2:
                result = ~(~result | ~part)
            elif how < 0.25:
                result = result & ~part
            else:
                result = result & part
        return result

    return mask


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_mean_what_they_meant(seed: int) -> None:
    lifted = 0
    for i in range(40):
        mask = random_mask(100 * seed + i)
        vectors = (IDS, PADDING, POSITIONS)
        gm, node = attend(mask, *vectors)
        assert torch.equal(implied(gm, node, *vectors), mask(*vectors).expand(2, 1, S, S)[:, 0]), describe(node)
        lifted += not describe(node).startswith("dense")
    assert lifted >= 8, lifted
