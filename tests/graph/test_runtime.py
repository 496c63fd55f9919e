"""The operators on one rank: merge, schedule, registration, and compilation with one graph for all lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.runtime import kernels
from cpcompile.runtime.block import Block
from cpcompile.runtime.heads import heads_of, storage
from cpcompile.runtime.merge import merge_
from cpcompile.runtime.schedule import Span, local_spans, pieces, whole
from cpcompile.runtime.traffic import Traffic, traffic

ops = torch.ops.cpcompile
STRATEGIES = ("ring", "gather", "ulysses")


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


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
def test_pieces_cover_what_is_visible_once(layout: str, window: int) -> None:
    length, world_size = 30, 4
    covered = torch.zeros(length, length, dtype=torch.int64)
    at = torch.arange(length)
    visible = (at <= at[:, None]) & ((at[:, None] - at < window) | (window == 0))
    for rank in range(world_size):
        for source in range(world_size):
            rows = local_spans(length, rank, world_size, layout)
            columns = local_spans(length, source, world_size, layout)
            for piece in pieces(rows, columns, is_causal=True, window=window, needs_mask=False):
                q, k = (
                    slots(spans, piece_span) for spans, piece_span in ((rows, piece.rows), (columns, piece.columns))
                )
                seen = visible[q][:, k] if piece.is_causal or piece.is_masked else torch.ones(len(q), len(k))
                covered[q[:, None], k] += seen.long()
    assert torch.equal(covered, visible.long())


def slots(spans: tuple[Span, ...], part: Span) -> torch.Tensor:
    """Return the positions of the slots of `part`."""
    return torch.cat([torch.arange(span.position, span.end) for span in spans])[part.slots]


def test_zig_zag_computes_half_a_block_at_each_step() -> None:
    for rank in range(4):
        for source in range(4):
            found = pieces(
                local_spans(64, rank, 4, "zig_zag"),
                local_spans(64, source, 4, "zig_zag"),
                is_causal=True,
                window=0,
                needs_mask=False,
            )
            (piece,) = found
            assert piece.is_causal == (rank == source) and not piece.is_masked
            assert piece.is_causal or piece.rows.size * piece.columns.size == 16 * 16 // 2


def test_gathered_causal_rows_need_no_mask() -> None:
    found = pieces(local_spans(31, 1, 4, "zig_zag"), whole(31), is_causal=True, window=0, needs_mask=False)
    assert [(piece.rows.size, piece.columns.size, piece.is_causal) for piece in found] == [
        (4, 4, False),
        (4, 4, True),
        (4, 24, False),
        (4, 4, True),
    ]


def test_heads_are_spread_evenly() -> None:
    ranks = [heads_of(rank, 2, 9, 3) for rank in range(2)]
    assert [(r.start, r.stop, r.key_start, r.key_stop) for r in ranks] == [(0, 5, 0, 2), (5, 9, 1, 3)]
    assert ranks[0].key_index() == [0, 0, 0, 1, 1]
    assert heads_of(0, 3, 9, 3).key_index() is None
    assert [heads_of(rank, 4, 2, 1).num_query for rank in range(4)] == [1, 1, 0, 0]
    assert storage(2, 9, 3) == (5, 2)


def operator_calls() -> list[tuple[str, Any, tuple[Any, ...]]]:
    q, k, v = (normal(2, heads, 6, 8, dtype=torch.float32).requires_grad_() for heads in (4, 2, 2))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    tokens = (1, 2, 6, "zig_zag", 1, "")
    x = normal(3, 12, 2).requires_grad_()
    calls = [
        (
            s,
            getattr(ops, f"{s}_attention").default,
            (q, k, v, None, documents, None, 0.3, True, 0, 0.0, 6, "zig_zag", 1, ""),
        )
        for s in STRATEGIES
    ]
    return [
        *calls,
        ("attention", ops.attention_forward.default, (q, k, v, None, None, None, 0.3, True, 3, 0.0)),
        ("shard_tokens", ops.shard_tokens.default, (x, *tokens)),
        ("gather_tokens", ops.gather_tokens.default, (x, *tokens)),
        ("fill_padding", ops.fill_padding.default, (x, 1, 2, 0.0, 1, 2, 6, "zig_zag", 1, "")),
        ("all_reduce", ops.all_reduce.default, (x, 1, "")),
        ("scale_gradient", ops.scale_gradient.default, (x, 0.5)),
    ]


# opcheck of torch 2.14 reads the .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize(
    "name, operator, arguments", operator_calls(), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_registration_is_sound(name: str, operator: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_graph_for_all_lengths(strategy: str) -> None:
    counter = CompileCounter()
    operator = getattr(ops, f"{strategy}_attention")

    def model(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.sin(), x[:, :2], x[:, 2:]
        y: torch.Tensor = operator(q, k, v, None, None, None, 0.3, True, 0, 0.0, x.shape[2], "zig_zag", 1, "")[0]
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


def test_a_learned_bias_is_refused() -> None:
    q = normal(1, 2, 4, 8)
    bias = normal(1, 2, 4, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="learned score bias"):
        ops.attention(q, q, q, bias, None, None, 0.3, False, 0, 0.0, 0.0)


def test_traffic_counts_bytes() -> None:
    q, k = torch.empty(1, 8, 16, 4, dtype=torch.bfloat16), torch.empty(1, 2, 16, 4, dtype=torch.bfloat16)
    arguments = {"q": q, "k": k, "v": k, "length": 64, "layout": "zig_zag", "world_size": 4}
    block_bytes = 2 * 2 * 16 * 4 * 2
    assert traffic(ops.ring_attention.default, arguments) == Traffic(
        3 * block_bytes, 3 * block_bytes + 4 * 2 * block_bytes
    )
    assert traffic(ops.gather_attention.default, arguments) == Traffic(3 * block_bytes, 3 * 3 * block_bytes)
    token_bytes = 16 * 4 * 2
    assert traffic(ops.ulysses_attention.default, arguments) == Traffic(
        3 * (4 + 2) * token_bytes, 3 * (2 + 4) * token_bytes
    )
    assert traffic(ops.shard_tokens.default, {"x": q, "world_size": 4}) == Traffic(0, 0)
