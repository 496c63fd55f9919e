"""Outputs: what a transformed graph returns of each output of the model, this rank's tokens or all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from cpcompile.errors import source_place
from cpcompile.ir.operator_call import expression, is_tensor, size_hint
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.passes.finish_outputs import output_placements

cp = torch.ops.cpcompile
_FINISHING = (cp.all_reduce.default, cp.gather_tokens.default, cp.scale_gradient.default)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that a model returns.

    Attributes:
        value: its name in the graph.
        shape: of the whole.
        dim: the dim of this rank's tokens; None where every rank returns all of it.
        line: the user's line.
        more_tokens: how many tokens more than the first input its sequence has: joined, cut or grouped ones are another one.
            None where that depends on the length.
    """

    value: str
    shape: tuple[int, ...]
    dim: int | None
    line: str
    more_tokens: int | None = 0

    @property
    def held(self) -> str:
        """What a rank returns, in words."""
        return "whole" if self.dim is None else f"local tokens of this rank along dim {self.dim}"

    def __str__(self) -> str:
        return f"{self.value} {list(self.shape)} {self.held}"


def outputs_of(gm: fx.GraphModule) -> tuple[Output, ...]:
    """Return the tensors that a finished graph returns, in order."""
    (output,) = gm.graph.find_nodes(op="output")
    found = []
    for node, placement in zip(output.args[0], output_placements(gm), strict=True):
        if not is_tensor(node):
            continue
        source, shape = node, tuple(size_hint(n) for n in node.meta["val"].shape)
        while source.target in _FINISHING:
            source = source.args[0]
        if isinstance(placement, Sharded):
            more = expression(Lengths.of(gm, placement.sequence).value) - expression(Lengths.of(gm).value)
            more_tokens = int(more) if more.is_Integer else None
            found.append(Output(source.name, shape, placement.dim, source_place(source), more_tokens))
        else:
            found.append(Output(source.name, shape, None, source_place(source)))
    return tuple(found)
