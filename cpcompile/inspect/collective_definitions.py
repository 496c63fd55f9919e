"""The definitions of the collectives, for lockstep: ordinary differentiable code over the values of all ranks.

Each joins what it needs to whole tensors, does there what its operator promises, and splits again. They share
nothing with the runtime, so that they check the rewrite and the runtime alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cpcompile import runtime  # noqa: F401  (registers the operators)
from cpcompile.balance.layout import chunk_length, num_chunks, positions
from cpcompile.balance.token_order import TokenOrder
from cpcompile.ir.placement import Sharded
from cpcompile.runtime.tokens.dropout import is_kept

cp = torch.ops.cpcompile
Ranks = list[Any]
Calls = list[Mapping[str, Any]]  # the arguments of each rank's call, by name


def factors(x: torch.Tensor, at: Sharded, tokens: int) -> torch.Tensor:
    """Return `x` with the dim of the tokens viewed as (outer, tokens, inner)."""
    sizes = (x.shape[at.dim] // (tokens * at.inner), tokens, at.inner)
    return x.reshape(*x.shape[: at.dim], *sizes, *x.shape[at.dim + 1 :])


def join(values: Sequence[torch.Tensor], at: Sharded, order: TokenOrder) -> torch.Tensor:
    """Return the tokens of the range that the ranks hold, in the user's order; 0 where it is not known what is outside."""
    parts = [factors(v, at, order.local_length) for v in values]
    slots = order.inverse(values[0].device)[max(at.front, 0) : order.length - max(at.back, 0)]
    held = torch.cat(parts, at.dim + 1).index_select(at.dim + 1, slots)
    shape = list(held.shape)
    outside = [
        held.new_full((*shape[: at.dim + 1], max(-n, 0), *shape[at.dim + 2 :]), at.outside or 0.0)
        for n in (at.front, at.back)
    ]
    return torch.cat([outside[0], held, outside[1]], at.dim + 1).flatten(at.dim, at.dim + 2)


def split(whole: torch.Tensor, at: Sharded, order: TokenOrder) -> list[torch.Tensor]:
    """Return each rank's tokens of a whole tensor; padding slots repeat the last token."""
    whole = factors(whole, at, order.length)
    indices = (order.sources(rank, whole.device) for rank in range(order.world_size))
    return [whole.index_select(at.dim + 1, index).flatten(at.dim, at.dim + 2) for index in indices]


def _shard(calls: Calls) -> Ranks:
    return [split(c["x"], Sharded(c["dim"], c["inner"]), TokenOrder.of_call(c))[rank] for rank, c in enumerate(calls)]


def _gather(calls: Calls) -> Ranks:
    c = calls[0]
    return [join([c["x"] for c in calls], Sharded(c["dim"], c["inner"]), TokenOrder.of_call(c))] * len(calls)


def _fill(calls: Calls) -> Ranks:
    results = []
    for rank, c in enumerate(calls):
        x, dim, inner = c["x"], c["dim"], c["inner"]
        position = TokenOrder.of_call(c).positions(rank, x.device)
        padding = (position < c["front"]) | (position >= c["length"] - c["back"])
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        outer = x.shape[dim] // (len(padding) * inner)
        results.append(x.masked_fill(padding.repeat_interleave(inner).repeat(outer).view(shape), c["value"]))
    return results


def _all_reduce(calls: Calls) -> Ranks:
    return [sum((c["x"] for c in calls[1:]), calls[0]["x"])] * len(calls)


def _scale(calls: Calls) -> Ranks:
    return [_Scale.apply(c["x"], c["scale"]) for c in calls]  # type: ignore[no-untyped-call]


class _Scale(torch.autograd.Function):
    """Identity, with a scaled gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.scale, None


def _padded(order: TokenOrder) -> int:
    """Return the tokens of all ranks, padding included."""
    return order.world_size * order.local_length


def _slots(whole: torch.Tensor, at: Sharded, order: TokenOrder) -> list[torch.Tensor]:
    """Return what each rank holds of a tensor that has a value for padding slots too."""
    whole = factors(whole, at, _padded(order))
    held = (order.positions(rank, whole.device) for rank in range(order.world_size))
    return [whole.index_select(at.dim + 1, index).flatten(at.dim, at.dim + 2) for index in held]


def _move(calls: Calls) -> Ranks:
    c = calls[0]
    at, length, order = Sharded(c["dim"], c["inner"]), c["length"], TokenOrder.of_call(c)
    whole = factors(join([c["x"] for c in calls], at, order), at, length)
    target = torch.arange(_padded(order), device=whole.device)
    source = c["sign"] * target + c["offset"]
    if c["wrap"]:
        source = source % length
    outside = (source < 0) | (source >= length) | (target >= length)
    moved = whole.index_select(at.dim + 1, source.clamp(0, length - 1))
    moved = moved.masked_fill(outside.view(-1, *[1] * (whole.dim() - at.dim - 2)), c["fill"])
    return _slots(moved.flatten(at.dim, at.dim + 2), at, order)


def _halo(calls: Calls) -> Ranks:
    c = calls[0]
    at, length, layout, world_size = Sharded(c["dim"]), c["length"], c["layout"], c["world_size"]
    order = TokenOrder.of(length, world_size, layout)
    whole = factors(join([c["x"] for c in calls], at, order), at, length)

    def zeros(count: int) -> torch.Tensor:
        return whole.new_zeros(*whole.shape[: at.dim + 1], count, *whole.shape[at.dim + 2 :])

    wide = torch.cat([zeros(c["before"]), whole, zeros(_padded(order) - length + c["after"])], at.dim + 1)
    results = []
    for rank in range(world_size):
        size = chunk_length(length, world_size, layout)
        starts = positions(length, rank, world_size, layout)[::size].tolist()
        chunks = [wide.narrow(at.dim + 1, start, c["before"] + size + c["after"]) for start in starts]
        results.append(torch.cat(chunks, at.dim + 1).flatten(at.dim, at.dim + 2))
    return results


def _pick(calls: Calls) -> Ranks:
    results = []
    for rank, c in enumerate(calls):
        at = Sharded(c["dim"])
        alone = [c["x"] if other == rank else torch.zeros_like(c["x"]) for other in range(len(calls))]
        whole = factors(join(alone, at, TokenOrder.of_call(c)), at, c["length"])
        results.append(whole.narrow(at.dim + 1, c["start"], c["count"]).flatten(at.dim, at.dim + 2))
    return results


def _put(calls: Calls) -> Ranks:
    results = []
    order = TokenOrder.of_call(calls[0])
    padded = _padded(order)
    for rank, c in enumerate(calls):
        at, start = Sharded(c["dim"]), c["start"]
        parts = torch.cat([factors(c["x"], at, order.local_length) for c in calls], at.dim + 1)
        held = torch.cat([order.positions(r, parts.device) for r in range(len(calls))])
        whole = parts.index_select(at.dim + 1, held.argsort())
        count = c["values"].shape[at.dim] // whole.shape[at.dim]
        front = whole.narrow(at.dim + 1, 0, start)
        back = whole.narrow(at.dim + 1, start + count, padded - start - count)
        put = torch.cat([front, factors(c["values"], at, count), back], at.dim + 1).flatten(at.dim, at.dim + 2)
        results.append(_slots(put, at, order)[rank])
    return results


def _local_slots(calls: Calls) -> Ranks:
    results = []
    order = TokenOrder.of_call(calls[0])
    for rank, c in enumerate(calls):
        held = order.positions(rank, c["index"].device)
        slots = held.new_full((_padded(order),), -1)
        slots[held] = torch.arange(len(held), device=held.device)
        results.append(slots[: c["length"]][c["index"]])
    return results


def _positions(calls: Calls) -> Ranks:
    return [TokenOrder.of_call(c).positions(rank, c["like"].device) for rank, c in enumerate(calls)]


def _chunk_indices(calls: Calls) -> Ranks:
    """With one token a chunk, a chunk's number is its token's position."""
    c = calls[0]
    length = num_chunks(c["world_size"], c["layout"])
    return [positions(length, rank, c["world_size"], c["layout"], c["like"].device) for rank in range(len(calls))]


def _stack_ranks(calls: Calls) -> Ranks:
    return [torch.stack([c["x"] for c in calls])] * len(calls)


def _attention(calls: Calls) -> Ranks:
    c = calls[0]
    order, at = TokenOrder.of_call(c), Sharded(2)
    q, k, v = (join([c[name] for c in calls], at, order) for name in "qkv")
    mask = c["mask"]
    exchanges_heads = any(name in c["target"] for name in ("ulysses", "usp"))
    if mask is not None and mask.shape[-2] != 1 and not exchanges_heads:  # the others hold their query rows
        mask = join([c["mask"] for c in calls], Sharded(mask.dim() - 2), order)
    out = reference_attention(q, k, v, mask, c)
    return [(part, None) for part in split(out, at, order)]


def _latent_attention(calls: Calls) -> Ranks:
    """Each rank has keys of all tokens, made by itself."""
    c = calls[0]
    order, at, mask = TokenOrder.of_call(c), Sharded(2), c["mask"]
    q = join([c["q"] for c in calls], at, order)
    if mask is not None and mask.shape[-2] != 1:
        mask = join([c["mask"] for c in calls], Sharded(mask.dim() - 2), order)
    outs = [reference_attention(q, own["k"], own["v"], mask, own) for own in calls]
    return [(split(out, at, order)[rank], None) for rank, out in enumerate(outs)]


def _latent_heads_attention(calls: Calls) -> Ranks:
    """Each rank has keys of all tokens for its own heads, made by itself."""
    c = calls[0]
    order, at = TokenOrder.of_call(c), Sharded(2)
    k, v = (torch.cat([own[name] for own in calls], 1) for name in "kv")
    out = reference_attention(join([own["q"] for own in calls], at, order), k, v, c["mask"], c)
    return [(part, None) for part in split(out, at, order)]


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, c: Mapping[str, Any]
) -> torch.Tensor:
    """Return attention as its definition says, whole, `[B, H, S, D]`; rows that see no key are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * c["scale"]
    if c["softcap"]:
        scores = c["softcap"] * torch.tanh(scores / c["softcap"])
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[None, :]
    if c["slopes"] is not None:
        scores = scores - c["slopes"].to(scores.dtype)[:, None, None] * (row - column).abs()
    seen = reference_mask(row, column, c)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    blind = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & ~blind, float("-inf"))
    if c["sinks"] is not None:
        sinks = c["sinks"].to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].masked_fill(blind, 0.0)
    if c["dropout"]:
        index = torch.arange(weights.numel(), device=q.device).view(weights.shape)
        weights = weights * is_kept(c["seed"], c["site"], index, c["dropout"]) / (1 - c["dropout"])
    out: torch.Tensor = weights.to(v.dtype) @ v
    return out


def reference_mask(row: torch.Tensor, column: torch.Tensor, c: Mapping[str, Any]) -> torch.Tensor:
    """Return which key `column` each query `row` sees, bool `[B|1, 1, S, S]`, a dense mask apart."""
    seen = torch.ones(1, 1, len(row), column.shape[1], dtype=torch.bool, device=row.device)
    if c["is_causal"]:
        seen = seen & (column <= row)
    if c["lookahead"] >= 0:
        seen = seen & (column - row <= c["lookahead"])
    if c["prefix"] is not None:
        seen = seen | (column < c["prefix"][:, None, None, None])
    if c["window"]:
        seen = seen & (row - column < c["window"])
    if c["documents"] is not None:
        seen = seen & (c["documents"][:, None, :, None] == c["documents"][:, None, None, :])
    if c["key_padding"] is not None:
        seen = seen & c["key_padding"][:, None, None, :]
    return seen


def _shared_seed(calls: Calls) -> Ranks:
    return [torch.randint(-(1 << 63), (1 << 63) - 1, (), device=calls[0]["device"])] * len(calls)


def _dropout(calls: Calls) -> Ranks:
    c, at = calls[0], Sharded(calls[0]["dim"], calls[0]["inner"])
    whole = torch.empty_like(c["x"]) if at.dim < 0 else join([c["x"] for c in calls], at, TokenOrder.of_call(c))
    index = torch.arange(whole.numel(), device=whole.device).view(whole.shape)
    kept = is_kept(c["seed"], c["site"], index, c["p"])
    return [c["x"] * mask / (1 - c["p"]) for c, mask in zip(calls, _of_ranks(kept, at, c, len(calls)), strict=True)]


def _draw_kept(calls: Calls) -> Ranks:
    c, at = calls[0], Sharded(calls[0]["dim"], calls[0]["inner"], calls[0]["front"], calls[0]["back"])
    x = c["x"] if at.dim < 0 else join([c["x"] for c in calls], at, TokenOrder.of_call(c))
    if c["of_features"]:
        x = x[(slice(None), slice(None), *[slice(1)] * (x.dim() - 2))]
    like = torch.empty([x.shape[d] for d in c["order"]], dtype=x.dtype, device=x.device)
    ones = torch.ones_like(like.permute([c["order"].index(d) for d in range(x.dim())]))
    drop = torch.feature_dropout if c["of_features"] else torch.dropout
    return _of_ranks(drop(ones, c["p"], True) != 0, at, c, len(calls))


def _of_ranks(kept: torch.Tensor, at: Sharded, c: Mapping[str, Any], world_size: int) -> Ranks:
    """Return each rank's part of a mask; tokens outside the range are dropped."""
    if at.dim < 0:
        return [kept] * world_size
    pads = [0, 0] * (kept.dim() - at.dim - 1) + [at.front * at.inner, at.back * at.inner]
    whole = torch.nn.functional.pad(kept, pads) if at.front or at.back else kept
    return split(whole, at, TokenOrder.of_call(c))


COLLECTIVES: dict[Any, Callable[[Calls], Ranks]] = {
    cp.shard_tokens.default: _shard,
    cp.gather_tokens.default: _gather,
    cp.fill_padding.default: _fill,
    cp.all_reduce.default: _all_reduce,
    cp.scale_gradient.default: _scale,
    cp.move_tokens.default: _move,
    cp.halo_tokens.default: _halo,
    cp.pick_tokens.default: _pick,
    cp.put_tokens.default: _put,
    cp.local_slots.default: _local_slots,
    cp.positions.default: _positions,
    cp.chunk_indices.default: _chunk_indices,
    cp.stack_ranks.default: _stack_ranks,
    cp.shared_seed.default: _shared_seed,
    cp.dropout_tokens.default: _dropout,
    cp.draw_kept.default: _draw_kept,
    cp.latent_attention.default: _latent_attention,
    cp.latent_heads_attention.default: _latent_heads_attention,
    **{
        getattr(cp, f"{strategy}_attention").default: _attention
        for strategy in ("ring", "gather", "halo", "ulysses", "usp")
    },
}
