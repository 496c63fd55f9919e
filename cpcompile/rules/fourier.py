"""Fourier transforms: along the tokens, a rank has all tokens of some channels, which it gets for its tokens of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import CHANNELS, Sharded
from cpcompile.rules.along_tokens import along_tokens, holds_tokens_only
from cpcompile.rules.registry import Decision, Indices, Names, rule

aten = torch.ops.aten

TRANSFORMS = (
    aten.fft_fft.default,
    aten.fft_ifft.default,
    aten.fft_rfft.default,
    aten.fft_irfft.default,
    aten.fft_hfft.default,
    aten.fft_ihfft.default,
)


@rule(*TRANSFORMS)
def transform(call: Call) -> Indices:
    """[... s ...] -> [... f ...], mixing s"""
    dim = call.dim("dim", "self")
    names: Names = tuple(None if d == dim else f"d{d}" for d in range(len(call.shape("self"))))
    return Indices({"self": names}, (names,))


@rule(aten.fft_fftshift.default, aten.fft_ifftshift.default)
def shift(call: Call) -> Indices:
    """[... f ...] -> [... f' ...], mixing f"""
    rank = len(call.shape("self"))
    dims = range(rank) if call["dim"] is None else [int(d) % rank for d in call["dim"]]
    names: Names = tuple(None if d in dims else f"d{d}" for d in range(rank))
    return Indices({"self": names}, (names,))


@along_tokens(*TRANSFORMS)
def for_channels(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank gets all tokens of some channels for its tokens of the others"""
    at, shape = operands["self"], call.shape("self")
    sizes = {d: size for d, size in enumerate(shape) if d != at.dim and isinstance(size, int) and size > 1}
    if not sizes or not at.covers_all or not holds_tokens_only(call, "self", at, length):
        return None
    longest = max(sizes, key=lambda d: (sizes[d], d))
    return Decision({}, (), exchanges={"self": Sharded(longest, sequence=CHANNELS)})
