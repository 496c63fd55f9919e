"""Layer ranges: each layer of the model is a range in the traces of torch's profiler, forward and backward.

    cpcompile.layer model.layers.7
    cpcompile.layer model.layers.7 backward
    cpcompile.layer model.layers.{0,1}          # these are one call of a function that is compiled once

Compiled code calls `enter_layer` between its kernels; ranges of one thread follow one another.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile import _torch

_RANGE = re.compile(r"cpcompile\.layer (?P<layer>\S+)(?P<backward> backward)?")
_PART = re.compile(r"\{[^}]*\}|[^.{]+")


@dataclass(frozen=True, slots=True)
class LayerRange:
    """What a range says: the path of a module, and whether this is the gradient."""

    layer: str
    is_backward: bool

    @classmethod
    def of(cls, name: str) -> LayerRange | None:
        """Return what the name of a range says; None for a range of others."""
        found = _RANGE.fullmatch(name)
        return None if found is None else cls(found[1], found[2] is not None)

    def __str__(self) -> str:
        return f"cpcompile.layer {self.layer}{' backward' if self.is_backward else ''}"


class Open(threading.local):
    """The range that is open in a thread, and the layer that it is of."""

    range: Any = None
    layer: str = ""


_OPEN = Open()


def enter_layer(name: str) -> None:
    """Begin the range of a layer, in the place of the one that is open; '' only ends that. Without a profiler, nothing begins."""
    if _OPEN.range is not None:
        range_, _OPEN.range, _OPEN.layer = _OPEN.range, None, ""
        if _torch.is_profiled():
            range_.__exit__(None, None, None)
    if name and _torch.is_profiled():
        _OPEN.layer = name.removesuffix(_torch.BACKWARD)
        _OPEN.range = torch.profiler.record_function(f"cpcompile.layer {name}")
        _OPEN.range.__enter__()


def path_here(shared: str) -> str:
    """Return the path of a module in the layer whose range is open, out of one that stands for those of several layers.

    In `model.layers.7`, `model.layers.{0..31}.self_attn` is `model.layers.7.self_attn`.
    """
    parts, here = _PART.findall(shared), _PART.findall(_OPEN.layer)
    matches = [a == b or (a.startswith("{") and b.isdigit()) for a, b in zip(parts, here, strict=False)]
    return ".".join([*here, *parts[len(here) :]]) if here and len(here) <= len(parts) and all(matches) else shared
