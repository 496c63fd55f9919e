"""Magnitudes: how large the numbers of tensors are, read with few kernels and without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Magnitudes(NamedTuple):
    """The largest magnitude of each of some tensors: NaN or infinite where it holds such a number. Float64, on the device."""

    names: list[str]
    values: Tensor

    def kinds(self) -> dict[str, str]:
        """Return what is `NaN` or `infinite`; the host waits for the device."""
        pairs = zip(self.names, self.values.tolist(), strict=True)
        return {name: "NaN" if math.isnan(x) else "infinite" for name, x in pairs if not math.isfinite(x)}

    def and_those(self, other: Magnitudes) -> Magnitudes:
        """Return these, and others behind them."""
        return Magnitudes(self.names + other.names, torch.cat([self.values, other.values]))


def magnitudes(tensors: Mapping[str, Tensor], device: torch.device) -> Magnitudes:
    """Return the magnitudes of tensors, with few kernels."""
    kinds: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, x in tensors.items():
        if (x.is_floating_point() or x.is_complex()) and x.numel():
            kinds.setdefault((x.dtype, x.device), []).append(name)
    parts = [torch.zeros(0, dtype=torch.float64, device=device)]
    for (dtype, _), names in kinds.items():
        of_kind = [torch.view_as_real(tensors[n]) if dtype.is_complex else tensors[n] for n in names]
        parts.append(torch.stack(torch._foreach_norm(of_kind, math.inf)).to(device, torch.float64))
    return Magnitudes([name for names in kinds.values() for name in names], torch.cat(parts))
