"""Operators that spread each token over results which overlap: transposed convolutions, and patches that are folded.

    result   0   1 | 2   3 | 4   5 |         stride 2, kernel 4, padding 1: token t gives to results 2t - 1 .. 2t + 2
    token    0 0 0   1 1 1 1   2 2 2

The results of a chunk are those of its own tokens and of a few around it: a halo, as of a convolution, whose gradient this is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from cpcompile.errors import LengthDependent, where
from cpcompile.ir.operator_call import Call, expression
from cpcompile.ir.placement import FULL, Placement, Sharded
from cpcompile.rules import groups
from cpcompile.rules.along_tokens import along_tokens, holds_tokens_only
from cpcompile.rules.convolution import (
    TRANSPOSED,
    is_transposed,
    reaches,
    spatial,
    with_chunks_as_rows,
)
from cpcompile.rules.registry import Decision, Indices, Lowering, Names, rule

aten, cp = torch.ops.aten, torch.ops.cpcompile


@dataclass(frozen=True, slots=True)
class Spread:
    """How tokens are spread along their dim: token t gives to the results from `t * stride - pad` to `reach` behind that."""

    stride: int
    reach: int
    pad: int

    @property
    def before(self) -> int:
        """How many tokens before a chunk give to its results."""
        return max((self.reach - self.pad) // self.stride, 0)

    @property
    def after(self) -> int:
        """How many tokens behind a chunk give to its results, or make its last results exist."""
        return max((self.stride - 1 + self.pad) // self.stride, -((self.reach + 1 - self.pad) // self.stride) + 1)

    def own(self, writer: Lowering, x: fx.Node, dim: int) -> fx.Node:
        """Return the results of a chunk, of those that its extended tokens give without padding."""
        first = self.before * self.stride + self.pad
        last = (self.after - 1) * self.stride + self.reach + 1 - self.pad
        return writer.insert(aten.slice.Tensor, x, dim, first, -last if last else None)

    def result(self, at: Sharded, tokens: Any, results: Any) -> Sharded | None:
        """Return the placement of the results, so many for each token; None if some are left over."""
        more = sympy.expand(expression(results) - expression(tokens) * self.stride)
        if not more.is_Integer or more % self.stride:
            return None
        return replace(at, inner=self.stride, back=-int(more) // self.stride, outside=None)

    def extended(
        self, writer: Lowering, x: fx.Node, dim: int, to: int, run: Callable[[fx.Node], fx.Node]
    ) -> Sequence[fx.Node]:
        """Return what `run` makes of extended chunks without padding, cut to their own results, which are along `to`."""
        x = writer.insert(cp.halo_tokens.default, x, dim, self.before, self.after, writer.length, *writer.axis)

        def run_and_cut(x: fx.Node) -> fx.Node:
            return self.own(writer, run(x), to)

        return [with_chunks_as_rows(writer, x, dim, to, writer.chunks, run_and_cut)]


@along_tokens(*TRANSPOSED, aten.convolution.default)
def transposed(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each chunk is extended by the tokens that give to its results, where these overlap"""
    at, shape = operands.get("input"), call.shape("input")
    if not is_transposed(call) or at is None or len(operands) > 1 or len(shape) != len(reaches(call)) + 2:
        return None
    i = at.dim - 2
    if i < 0 or not at.covers_all or not holds_tokens_only(call, "input", at, length):
        return None
    spread = Spread(int(spatial(call, "stride")[i]), reaches(call)[i], int(spatial(call, "padding")[i]))
    result = spread.result(at, shape[at.dim], call.results[0].shape[at.dim])
    if result is None:
        return None
    padding, added = (
        [0 if j == i else n for j, n in enumerate(spatial(call, name))] for name in ("padding", "output_padding")
    )

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        call = writer.call
        stride, dilation = spatial(call, "stride"), spatial(call, "dilation")

        def run(x: fx.Node) -> fx.Node:
            others = (stride, padding, dilation, True, added, call["groups"])
            return writer.insert(aten.convolution.default, x, call["weight"], call["bias"], *others)

        return spread.extended(writer, call["input"], at.dim, at.dim, run)

    others: dict[str, Placement] = {name: FULL for name, _ in call.operands() if name != "input"}
    return Decision({"input": at, **others}, (result,), lower=lower)


@rule(aten.col2im.default)
def fold(call: Call) -> Indices:
    """[n (c k) l] -> [n c h w], mixing all but n"""
    batch: Names = ("n",) if len(call.shape("self")) == 3 else ()
    return Indices({"self": (*batch, None, None)}, ((*batch, None, None, None),))


@along_tokens(aten.col2im.default)
def fold_along(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each chunk of rows of patches is extended by those that overlap its results"""
    at, shape = operands["self"], call.shape("self")
    if len(shape) != 3 or at.dim != 2 or not at.covers_all:
        return None
    if not isinstance(shape[2], int):
        raise LengthDependent(f"{call.target}: rows of patches need their number.\n\n{where(call.node)}")
    counts = groups.patches_of(call)
    i = 0 if counts[0] > 1 else 1
    spreads = [Spread(*each) for each in zip(call["stride"], groups.patch_reaches(call), call["padding"], strict=True)]
    result = spreads[i].result(at, counts[i], call["output_size"][i])
    if at.inner != groups.tokens_of_row(call) or result is None:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        rows = writer.insert(aten.unflatten.int, writer.call["self"], 2, [-1, counts[1]] if i == 0 else [1, -1])

        def run(x: fx.Node) -> fx.Node:
            size, padding = list(call["output_size"]), list(call["padding"])
            size[i] = (x.meta["val"].shape[2 + i] - 1) * spreads[i].stride + spreads[i].reach + 1
            padding[i] = 0
            x = writer.insert(aten.flatten.using_ints, x, 2, 3)
            return writer.insert(call.target, x, size, call["kernel_size"], call["dilation"], padding, call["stride"])

        return spreads[i].extended(writer, rows, 2 + i, 2 + i, run)

    return Decision({"self": at}, (replace(result, dim=2 + i),), lower=lower)
