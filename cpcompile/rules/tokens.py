"""Operators that shift, turn round and look up tokens: only tokens that change their rank are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from cpcompile.ir.operator_call import Call, expression, size_hint
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.rules import dims, reduction  # noqa: F401  (the rules that are extended here)
from cpcompile.rules.along_tokens import added_up, addend_of, along_tokens, before_end, holds_tokens_only, moved
from cpcompile.rules.ranges import picked
from cpcompile.rules.registry import Decision, Lowering

aten, cp = torch.ops.aten, torch.ops.cpcompile


@along_tokens(aten.roll.default)
def roll(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the tokens that go past a rank's chunks are exchanged"""
    at = operands["self"]
    rank = len(call.shape("self"))
    shifts, rolled = list(call["shifts"]), [int(d) % rank for d in call["dims"]]
    if not rolled or not at.covers_all or not holds_tokens_only(call, "self", at, length):
        return None
    shift = sum(s for s, d in zip(shifts, rolled, strict=True) if d == at.dim)
    others = [(s, d) for s, d in zip(shifts, rolled, strict=True) if d != at.dim]
    if not isinstance(shift, int):
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = writer.call["self"]
        if others:
            x = writer.insert(aten.roll.default, x, [s for s, _ in others], [d for _, d in others])
        return [moved(writer, x, at, -shift, wrap=True)]

    return Decision({"self": at}, (at,), lower=lower)


@along_tokens(aten.repeat_interleave.self_int)
def repeat_interleave(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each token is repeated where it is, and they are counted together as one"""
    at = operands["self"]
    if (
        call["dim"] is None
        or at.dim != call.dim("dim", "self")
        or not isinstance(call["repeats"], int)
        or not at.covers_all
    ):
        return None
    return Decision({"self": at}, (replace(at, inner=at.inner * call["repeats"]),), {"output_size": None})


@along_tokens(aten.flip.default)
def flip(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the ranks that hold mirrored tokens exchange them"""
    at = operands["self"]
    rank = len(call.shape("self"))
    others = [int(d) % rank for d in call["dims"] if int(d) % rank != at.dim]
    if at.reaches_outside or not holds_tokens_only(call, "self", at, length):
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = writer.call["self"]
        if others:
            x = writer.insert(aten.flip.default, x, others)
        return [moved(writer, x, at, before_end(writer, 1), sign=-1)]

    return Decision({"self": at}, (at.with_range(at.back, at.front),), lower=lower)


@along_tokens(aten.diff.default)
def diff(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each token less the one before it, which comes from a neighbour at the edge of a chunk"""
    at = operands.get("self")
    if at is None or call["n"] != 1 or call["prepend"] is not None or call["append"] is not None:
        return None
    if at.reaches_outside or not holds_tokens_only(call, "self", at, length):
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = writer.call["self"]
        previous = moved(writer, x, at, -1)
        is_bool = call.result.dtype == torch.bool
        return [writer.insert(aten.logical_xor.default if is_bool else aten.sub.Tensor, x, previous)]

    return Decision({"self": at}, (at.with_range(at.front + 1, at.back),), lower=lower)


@along_tokens(aten.select.int)
def select(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the owner of the token sends it to all ranks"""
    at, index = operands["self"], call["index"]
    if not holds_tokens_only(call, "self", at, length):
        return None
    index = index.meta["val"] if isinstance(index, fx.Node) else index
    start = expression(index) + (expression(at.count(length)) if isinstance(index, int) and index < 0 else 0)
    return picked(call, at, start, 1, length, squeezed=True)


@along_tokens(aten.gather.default, aten.index_select.default)
def look_up(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the owners of the tokens that are looked up send them to all ranks, or all tokens where these are fewer"""
    if set(operands) != {"self"} or not is_short(call, "index", length):
        return None
    at = operands["self"]
    if at.dim != call.dim("dim", "self") or not at.covers_all or not holds_tokens_only(call, "self", at, length):
        return None
    if size_hint(call.result.numel()) > size_hint(call.tensor("self").numel()):
        return Decision({"self": FULL, "index": FULL}, (FULL,), gathers=frozenset({"self"}))
    is_gather = call.target is aten.gather.default

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x, index = writer.call["self"], writer.call["index"]
        slot = writer.insert(cp.local_slots.default, index, writer.length, *writer.axis)
        safe = writer.insert(aten.clamp.default, slot, 0)
        found = writer.insert(call.target, x, at.dim, safe)
        num_behind = 0 if is_gather else len(call.shape("self")) - at.dim - 1
        return [added_up(writer, of_owner(writer, slot, found, num_behind))]

    return Decision({"self": at, "index": FULL}, (addend_of(call.result),), lower=lower)


@along_tokens(aten.index.Tensor)
def index(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the owners of the tokens that are looked up send them to all ranks, or all tokens where these are fewer"""
    at = operands.get("self")
    if at is None or len(operands) > 1 or not at.covers_all or not holds_tokens_only(call, "self", at, length):
        return None
    given = [d for d, node in enumerate(call["indices"]) if node is not None]
    names = [f"indices.{d}" for d in given]
    are_numbers = all(call.tensor(name).dtype not in (torch.bool, torch.uint8) for name in names)
    if at.dim not in given or not are_numbers or not all(is_short(call, name, length) for name in names):
        return None
    if size_hint(call.result.numel()) > size_hint(call.tensor("self").numel()):
        return Decision({"self": FULL, **dict.fromkeys(names, FULL)}, (FULL,), gathers=frozenset({"self"}))
    is_run = given == list(range(given[0], given[0] + len(given)))
    num_behind = len(call.shape("self")) - (given[-1] + 1 if is_run else len(given))

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        indices = list(writer.call["indices"])
        slot = writer.insert(cp.local_slots.default, indices[at.dim], writer.length, *writer.axis)
        indices[at.dim] = writer.insert(aten.clamp.default, slot, 0)
        found = writer.insert(aten.index.Tensor, writer.call["self"], indices)
        return [added_up(writer, of_owner(writer, slot, found, num_behind))]

    return Decision({"self": at, **dict.fromkeys(names, FULL)}, (addend_of(call.result),), lower=lower)


def of_owner(writer: Lowering, slot: fx.Node, found: fx.Node, num_behind: int) -> fx.Node:
    """Write what was found where this rank has the slot, 0 elsewhere; `found` has `num_behind` dims more at the end."""
    own = writer.insert(aten.ge.Scalar, slot, 0)
    for _ in range(num_behind):
        own = writer.insert(aten.unsqueeze.default, own, -1)
    if found.meta["val"].dtype == torch.bool:
        return writer.insert(aten.logical_and.default, own, found)
    return writer.insert(aten.where.ScalarOther, own, found, 0)


def is_short(call: Call, name: str, length: Any) -> bool:
    """Tell whether an index looks up a few tokens, not as many as the sequence has nor as many as values say."""
    tokens = expression(length)
    sizes = [expression(size) for size in call.shape(name)]
    depends = any(free_unbacked_symbols(size) for size in call.shape(name))
    return not depends and not any(size.has(*tokens.free_symbols) or size == tokens for size in sizes)
