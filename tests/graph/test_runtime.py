"""The operators on one rank: merge, schedule, registration, and compilation with one graph for all lengths."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Segments, Span
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.ir.operator_call import Call
from cpcompile.runtime import kernels
from cpcompile.runtime.attention.heads import heads_of, storage
from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.merge import merge_
from cpcompile.runtime.schedule import Band, Piece, Visible, pieces, whole

ops = torch.ops.cpcompile
STRATEGIES = ("ring", "gather", "halo", "ulysses", "usp")


def axis_of(strategy: str, length: Any) -> dict[str, Any]:
    """Return the keyword arguments of a strategy on one rank."""
    axis = {"length": length, "layout": "zig_zag", "world_size": 1, "group": ""}
    return axis if strategy != "usp" else axis | {"inner_size": 1, "inner_group": "", "outer_group": ""}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def test_merge_of_halves_is_the_whole() -> None:
    q, k, v = normal(2, 4, 6, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 8)
    expected = kernels.forward(q, k, v, Block(0.3))
    out, lse = torch.zeros(2, 4, 6, 8, dtype=torch.float64), torch.full((2, 4, 6), -torch.inf, dtype=torch.float64)
    for keys in (slice(0, 4), slice(4, 9)):
        merge_(out, lse, *kernels.forward(q, k[:, :, keys], v[:, :, keys], Block(0.3)))
    torch.testing.assert_close((out, lse), expected, rtol=1e-12, atol=1e-12)


def test_merge_of_rows_without_keys_stays_finite() -> None:
    out, lse = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf)
    merge_(out, lse, torch.zeros(1, 1, 2, 3), torch.tensor([[[-torch.inf, -torch.inf]]]))
    assert not out.any() and (lse == -torch.inf).all()
    merge_(out, lse, torch.ones(1, 1, 2, 3), torch.tensor([[[2.0, -torch.inf]]]))
    assert out.tolist() == [[[[1.0] * 3, [0.0] * 3]]] and lse.tolist() == [[[2.0, -torch.inf]]]


BANDS = {
    "causal": Band(None, 0),
    "window": Band(-4, 0),
    "both sides": Band(-4, 3),
    "ahead": Band(None, 5),
    "all": Band(),
}
STARTS = {"none": None, "documents": ((0, 3, 4, 20),), "documents by row": ((0, 3, 4, 20), (0, 17))}


def seen_by_band(band: Band, starts: tuple[int, ...] | None, length: int = 30) -> torch.Tensor:
    """Return, by brute force, which column each row sees."""
    at = torch.arange(length)
    distance, seen = at - at[:, None], torch.ones(length, length, dtype=torch.bool)
    if band.low is not None:
        seen &= distance >= band.low
    if band.high is not None:
        seen &= distance <= band.high
    if starts is not None:
        ids = torch.bucketize(at, torch.tensor(starts), right=True)
        seen &= ids == ids[:, None]
    return seen


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
def test_pieces_cover_what_is_visible_once(layout: str, starts: str, band: str) -> None:
    length, world_size, rows_of_batch = 30, 4, STARTS[starts] or (None,)
    visible = Visible(BANDS[band], Segments.of(STARTS[starts]) if STARTS[starts] else None)  # type: ignore[arg-type]
    covered = torch.zeros(len(rows_of_batch), length, length, dtype=torch.int64)
    for rank, source in itertools.product(range(world_size), repeat=2):
        rows, columns = (TokenOrder(length, world_size, layout).spans[r] for r in (rank, source))
        for piece in pieces(rows, columns, visible):
            q, k = slots(rows, piece.rows), slots(columns, piece.columns)
            covered[slice(None) if piece.batch is None else piece.batch, q[:, None], k] += seen_in(piece).long()
    wanted = torch.stack([seen_by_band(BANDS[band], row) for row in rows_of_batch])
    assert torch.equal(covered, wanted.long())


def seen_in(piece: Piece) -> torch.Tensor:
    """Return which of its columns each row of a piece sees."""
    block = Block(1.0, low=piece.low, high=piece.high, lengths=piece.lengths)
    seen = block.visible(piece.rows.size, piece.columns.size, torch.device("cpu"))
    return torch.ones(piece.rows.size, piece.columns.size, dtype=torch.bool) if seen is None else seen[0, 0]


def slots(spans: tuple[Span, ...], part: Span) -> torch.Tensor:
    """Return the positions of the slots of `part`."""
    return torch.cat([torch.arange(span.position, span.end) for span in spans])[part.slots]


CAUSAL = Visible(Band(None, 0))


def test_zig_zag_computes_half_a_block_at_each_step() -> None:
    for rank, source in itertools.product(range(4), repeat=2):
        (piece,) = pieces(TokenOrder(64, 4, "zig_zag").spans[rank], TokenOrder(64, 4, "zig_zag").spans[source], CAUSAL)
        assert (piece.low, piece.high) == (None, 0 if rank == source else None)
        assert piece.high == 0 or piece.rows.size * piece.columns.size == 16 * 16 // 2


def test_gathered_causal_rows_need_no_mask() -> None:
    found = pieces(TokenOrder(31, 4, "zig_zag").spans[1], whole(31), CAUSAL)
    assert [(piece.rows.size, piece.columns.size, piece.high) for piece in found] == [
        (4, 4, None),
        (4, 4, 0),
        (4, 24, None),
        (4, 4, 0),
    ]


def test_heads_are_spread_evenly() -> None:
    ranks = [heads_of(rank, 2, 9, 3) for rank in range(2)]
    assert [(r.start, r.stop, r.key_start, r.key_stop) for r in ranks] == [(0, 5, 0, 2), (5, 9, 1, 3)]
    assert ranks[0].key_index() == [0, 0, 0, 1, 1]
    assert heads_of(0, 3, 9, 3).key_index() is None
    assert [heads_of(rank, 4, 2, 1).num_query for rank in range(4)] == [1, 1, 0, 0]
    assert storage(2, 9, 3) == (5, 2)


def operator_calls() -> list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]:
    q, k, v = (normal(2, heads, 6, 8, dtype=torch.float32).requires_grad_() for heads in (4, 2, 2))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    bounds = ops.document_bounds(documents)
    sinks, seed = normal(4, dtype=torch.float32).requires_grad_(), torch.tensor(3)
    terms = (None, documents, None, 0.3, True, 0, 0.0)
    tokens = (1, 2, 6, "zig_zag", 1, "")
    x = normal(3, 12, 2).requires_grad_()
    strategies = [(s, getattr(ops, f"{s}_attention").default, axis_of(s, 6)) for s in STRATEGIES]
    return [
        *((name, target, (q, k, v, *terms), axis) for name, target, axis in strategies),
        *(
            (
                f"{name} with all",
                target,
                (q, k, v, *terms, 0.2, -1, bounds, None, sinks.detach(), sinks, seed, 1),
                axis,
            )
            for name, target, axis in strategies
        ),
        ("attention", ops.attention_forward.default, (q, k, v, None, None, None, 0.3, True, 3, 0.0), {}),
        ("document_bounds", ops.document_bounds.default, (documents,), {}),
        ("shard_tokens", ops.shard_tokens.default, (x, *tokens), {}),
        ("gather_tokens", ops.gather_tokens.default, (x, *tokens), {}),
        ("fill_padding", ops.fill_padding.default, (x, 1, 2, 0.0, 1, 2, 6, "zig_zag", 1, ""), {}),
        ("all_reduce", ops.all_reduce.default, (x, 1, ""), {}),
        ("scale_gradient", ops.scale_gradient.default, (x, 0.5), {}),
        ("show", ops.show.default, (x, "x", True), {}),
        ("show_tokens", ops.show_tokens.default, (x, "x", True, 1, 2, 0, 0, 6, "zig_zag", 1, ""), {}),
    ]


# opcheck of torch 2.14 reads the .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize(
    "name, operator, arguments, axis", operator_calls(), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_registration_is_sound(name: str, operator: Any, arguments: tuple[Any, ...], axis: dict[str, Any]) -> None:
    torch.library.opcheck(operator, arguments, axis)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_graph_for_all_lengths(strategy: str) -> None:
    counter = CompileCounter()
    operator = getattr(ops, f"{strategy}_attention")

    def model(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.sin(), x[:, :2], x[:, 2:]
        y: torch.Tensor = operator(q, k, v, None, None, None, 0.3, True, 0, 0.0, **axis_of(strategy, x.shape[2]))[0]
        where = (2, 1, x.shape[2], "zig_zag", 1, "")
        z: torch.Tensor = ops.gather_tokens(ops.shard_tokens(y, *where), *where)
        return z * 2

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        counter(gm, inputs)
        return torch._dynamo.lookup_backend("inductor")(gm, inputs)  # type: ignore[attr-defined]

    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for length in (12, 16, 20):
        x, y = (normal(2, 4, length, 8, dtype=torch.float32) for _ in range(2))
        results = []
        for function in (model, compiled):
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            results.append((out.detach(), *torch.autograd.grad(out, leaf, y)))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1


def test_dropout_keeps_the_mean_and_the_gradient() -> None:
    torch.manual_seed(0)
    q = normal(1, 2, 16, 4).requires_grad_()
    v = torch.ones(1, 2, 16, 4, dtype=torch.float64)
    terms = (None, None, None, 0.5, True, 0, 0.0)
    out = torch.stack([ops.attention(q, q, v, *terms, 0.25) for _ in range(300)]).mean(0)
    torch.testing.assert_close(out, torch.ones_like(out), atol=0.15, rtol=0)
    (grad,) = torch.autograd.grad(ops.attention(q, q, v, *terms, 0.25).sum(), q)
    assert grad.abs().max() > 0


TERMS: dict[str, dict[str, Any]] = {
    "lookahead": {"is_causal": False, "lookahead": 2},
    "window": {"window": 3},
    "prefix": {"prefix": torch.tensor([3, 0])},
    "prefix in a window": {"prefix": torch.tensor([4]), "window": 2},
    "prefix within documents": {"prefix": torch.tensor([5, 2]), "documents": torch.tensor([[0, 0, 0, 1, 1, 1, 0]])},
    "slopes": {"slopes": torch.rand(4, dtype=torch.float64)},
    "slopes ahead": {"slopes": torch.rand(4, dtype=torch.float64), "is_causal": False},
    "sinks": {"sinks": torch.randn(4, dtype=torch.float64)},
    "sinks of hidden rows": {"sinks": torch.zeros(4), "key_padding": torch.zeros(1, 7, dtype=torch.bool)},
    "dropout": {"dropout": 0.4, "seed": torch.tensor(5), "site": 3},
    "softcap and bias": {"softcap": 1.5, "mask": torch.randn(1, 1, 7, 7, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", TERMS)
def test_lockstep_defines_what_operators_compute(name: str) -> None:
    q, k, v = normal(2, 4, 7, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 8)
    given = {"scale": 0.3, "is_causal": True, "window": 0, "softcap": 0.0}
    arguments = {"q": q, "k": k, "v": v, **dict.fromkeys(("mask", "documents", "key_padding")), **given, **TERMS[name]}
    arguments |= axis_of("gather", 7) | {"layout": "contiguous"}
    node = torch.fx.Graph().call_function(ops.gather_attention.default, (), arguments)
    call = dict(Call.of(node).arguments) | {"target": "cpcompile.gather_attention.default"}
    ((expected, _),) = COLLECTIVES[ops.gather_attention.default]([call])
    torch.testing.assert_close(ops.gather_attention(**arguments)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_learned_bias_is_refused() -> None:
    q = normal(1, 2, 4, 8)
    bias = normal(1, 2, 4, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="learned mask"):
        ops.attention(q, q, q, bias, None, None, 0.3, False, 0, 0.0)
