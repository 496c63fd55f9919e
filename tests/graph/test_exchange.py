"""The operators that exchange tokens, without ranks: registration, one graph for all lengths, what travels, definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cpcompile.balance.layout import LAYOUTS, num_chunks
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Span
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.definitions.slices import join, split
from cpcompile.ir.placement import Sharded
from cpcompile.runtime.tokens.exchange import halo_spans
from cpcompile.runtime.tokens.moves import Move, Route
from cpcompile.runtime.traffic import Traffic, traffic

ops = torch.ops.cpcompile


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def operator_calls() -> dict[str, tuple[Any, ...]]:
    length, axis = 7, (7, "zig_zag", 1, "")
    x, wide = normal(3, 2 * 8, 2).requires_grad_(), normal(3, 2 * 8 * 3, 2).requires_grad_()
    mixed = normal(2, 16, 3).permute(2, 1, 0).requires_grad_()  # not contiguous
    values = normal(3, 2 * 2, 2).requires_grad_()
    return {
        "move_tokens": (wide, 1, 3, -1, 2 * length, True, 0.0, *axis),
        "halo_tokens": (mixed, 1, 9, 1, *axis),
        "rearrange_tokens": (mixed, 1, [5, 2, 3, 1], [13, 1], 0, True, "zig_zag", 1, ""),
        "arranged_positions": (mixed, [3, 2, 1, 1], "zig_zag", 1),
        "pick_tokens": (mixed, 1, 2, 3, *axis),
        "put_tokens": (mixed, values, 1, 5, *axis),
        "local_slots": (torch.tensor([[0, -1], [3, 6]], dtype=torch.int32), *axis),
        "positions": (x, *axis),
        "chunk_indices": (x, "zig_zag", 1, ""),
        "stack_ranks": (mixed, 1, ""),
    }


# opcheck of torch 2.14 reads the .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", operator_calls())
def test_registration_is_sound(name: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, operator_calls()[name])


def through_all(x: torch.Tensor) -> torch.Tensor:
    """Use every operator on `x` `[2, S, 3]`, with numbers that follow from its symbolic length."""
    length = x.shape[1]
    axis = (length, "zig_zag", 1, "")
    y = ops.move_tokens(ops.shard_tokens(x, 1, 1, *axis), 1, 1, -1, length - 1, False, 0.0, *axis)
    wide = ops.halo_tokens(y, 1, 3, 1, *axis).unflatten(1, (2, -1)).cumsum(2)[:, :, 3:-1].flatten(1, 2)
    last = ops.pick_tokens(wide, 1, length - 2, 2, *axis)
    put = ops.put_tokens(wide, last * 2, 1, 1, *axis)
    slots = ops.local_slots(torch.tensor([0, -1]), *axis)
    chunks = ops.chunk_indices(put, *axis[1:])
    stacked = ops.stack_ranks(put * ops.positions(put, *axis)[:, None], *axis[2:])
    result: torch.Tensor = stacked[0] + put[:, slots].sum() + chunks.sum()
    return result


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_for_all_lengths(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(through_all, backend=counter, dynamic=True, fullgraph=True)
    for length in (12, 13, 17, 22):
        x = normal(2, length, 3)
        results = []
        for function in (through_all, compiled):
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            results.append((out.detach(), *torch.autograd.grad(out, leaf, out.detach())))
        torch.testing.assert_close(results[1], results[0])
    assert counter.frame_count == 1


def test_moves_are_runs() -> None:
    held = [Span(0, 4, 4)]
    assert list(Route(1, (-1,)).moves([Span(0, 0, 4)], held)) == [Move(3, 0, 1)]
    assert list(Route(-1, (7,)).moves([Span(0, 0, 4)], held)) == [Move(0, 0, 4, is_reversed=True)]
    assert list(Route(1, (3, 3 - 8)).moves(held, held)) == [Move(3, 0, 1)]
    assert list(Route().moves([Span(5, 6, 0)], held)) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_of_a_halo_arrives_once(layout: str, world_size: int) -> None:
    length, before, after = 21, 9, 2
    sources = TokenOrder(length, world_size, layout).spans
    for rank in range(world_size):
        targets = halo_spans(before, after, length, rank, world_size, layout)
        filled = [
            slot
            for spans in sources
            for m in Route().moves(spans, targets)
            for slot in range(m.target, m.target + m.size)
        ]
        assert sorted(filled) == [slot for span in targets for slot in range(span.slot, span.slot + span.size)]


def test_traffic_is_what_changes_rank() -> None:
    x = torch.empty(3, 8, 5, dtype=torch.bfloat16)  # 30 bytes a token
    where = {"x": x, "dim": 1, "length": 31, "world_size": 4}

    def sent(name: str, layout: str, **arguments: Any) -> Traffic:
        return traffic(getattr(ops, name).default, {**where, "layout": layout, **arguments})

    shift = {"sign": 1, "offset": -2, "wrap": False}
    assert sent("move_tokens", "contiguous", **shift) == Traffic(2 * 30, 2 * 30)
    assert sent("move_tokens", "zig_zag", **shift) == Traffic(4 * 30, 4 * 30)
    assert sent("halo_tokens", "contiguous", before=3, after=0) == Traffic(3 * 30, 3 * 30)
    assert sent("halo_tokens", "contiguous", before=20, after=0) == Traffic(20 * 30, 20 * 30)
    assert sent("stack_ranks", "contiguous") == Traffic(3 * 8 * 30, 3 * 8 * 30)
    assert sent("pick_tokens", "contiguous", start=1, count=2) == Traffic(0, 0)


# The definitions, against what users write.


def defined(name: str, x: torch.Tensor, world_size: int, layout: str, **arguments: Any) -> list[torch.Tensor]:
    """Return what the definition says for the ranks' tokens of `x` `[S, 2]`."""
    length = len(x)
    axis = {"dim": 0, "inner": 1, "length": length, "layout": layout, "world_size": world_size, "group": ""}
    parts = split(x, Sharded(0), TokenOrder(length, world_size, layout))
    return COLLECTIVES[getattr(ops, name).default]([{"x": part, **axis, **arguments} for part in parts])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_definitions_are_what_users_write(world_size: int, layout: str) -> None:
    length = 13
    x = normal(length, 2)

    def moved(sign: int, offset: int, wrap: bool) -> torch.Tensor:
        parts = defined("move_tokens", x, world_size, layout, sign=sign, offset=offset, wrap=wrap, fill=0.5)
        return join(parts, Sharded(0), TokenOrder(length, world_size, layout))

    assert torch.equal(moved(1, -2, False), torch.nn.functional.pad(x, (0, 0, 2, 0), value=0.5)[:-2])
    assert torch.equal(moved(1, -2, True), x.roll(2, 0))
    assert torch.equal(moved(-1, length - 1, False), x.flip(0))
    picked = defined("pick_tokens", x, world_size, layout, start=4, count=5)
    assert torch.equal(torch.stack(picked).sum(0), x[4:9])
    put = defined("put_tokens", x, world_size, layout, start=4, values=x[:5])
    assert torch.equal(join(put, Sharded(0), TokenOrder(length, world_size, layout)), torch.cat([x[:4], x[:5], x[9:]]))
    # A causal convolution of every chunk with its halo.
    wide = defined("halo_tokens", x, world_size, layout, before=3, after=0)
    chunks = [chunk for part in wide for chunk in part.chunk(num_chunks(world_size, layout) // world_size)]
    sums = [chunk.unfold(0, 4, 1).sum(-1) for chunk in chunks]
    per_rank = len(sums) // world_size
    local = [torch.cat(sums[rank * per_rank : (rank + 1) * per_rank]) for rank in range(world_size)]
    expected = torch.nn.functional.pad(x, (0, 0, 3, 0)).unfold(0, 4, 1).sum(-1)
    torch.testing.assert_close(join(local, Sharded(0), TokenOrder(length, world_size, layout)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_join_of_a_range(layout: str) -> None:
    x = normal(13, 2)
    parts = split(x, Sharded(0), TokenOrder(13, 3, layout))
    assert torch.equal(join(parts, Sharded(0, front=1, back=2), TokenOrder(13, 3, layout)), x[1:-2])
    shifted = join(parts, Sharded(0, front=-2, back=2, outside=0.5), TokenOrder(13, 3, layout))
    assert torch.equal(shifted, torch.nn.functional.pad(x[:-2], (0, 0, 2, 0), value=0.5))
