"""Profiling: each attention is a range in the traces of torch's profiler, which says how it is computed, and where.

    cpcompile.ring zig_zag model.layers.3.self_attn
    cpcompile.ring zig_zag model.layers.3.self_attn backward
    cpcompile.local whole model.layers.3.cross_attn            # all keys are here: nothing is exchanged

Layers that are compiled once share an operator, which knows them as `model.layers.{0..31}.self_attn`: the range of the layer
that it runs in says which it is.
"""

from __future__ import annotations

import contextlib
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from cpcompile import _torch
from cpcompile.runtime.layer_ranges import path_here

_RANGE = re.compile(r"cpcompile\.(?!layer )(?P<strategy>\w+) (?P<layout>\S+) (?P<layer>\S+)(?P<backward> backward)?")
NO_LAYER = "-"


@dataclass(frozen=True, slots=True)
class AttentionRange:
    """What a range says.

    Attributes:
        strategy: how ranks share the attention; `local` where nothing is exchanged.
        layout: which tokens each rank holds; `whole` where that is of no account.
        layer: the path of its module, or of all modules that share the range.
        is_backward: this is the gradient.
    """

    strategy: str
    layout: str
    layer: str
    is_backward: bool

    @classmethod
    def of(cls, name: str) -> AttentionRange | None:
        """Return what the name of a range says; None for a range of others."""
        found = _RANGE.fullmatch(name)
        return None if found is None else cls(found[1], found[2], found[3], found[4] is not None)

    def __str__(self) -> str:
        return f"cpcompile.{self.strategy} {self.layout} {self.layer}{' backward' if self.is_backward else ''}"


def attention_range(operator: str, layout: str, layer: str) -> AbstractContextManager[object]:
    """Return a context in which an operator runs: a range while a profiler runs, nothing otherwise."""
    if not _torch.is_profiled():
        return contextlib.nullcontext()
    forward = operator.removesuffix("_backward")
    strategy = "local" if forward == "attention_forward" else forward.removesuffix("_attention")
    name = AttentionRange(strategy, layout or "whole", path_here(layer) or NO_LAYER, operator != forward)
    return torch.profiler.record_function(str(name))
