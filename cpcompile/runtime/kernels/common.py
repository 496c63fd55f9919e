"""What the kernels that torch ships have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from cpcompile.runtime.kernels.block import Block

Tensor = torch.Tensor


def finite_reciprocal(lse: Tensor) -> Tensor:
    """Return lse with +inf for rows without a key, so that exp(score - lse) is 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def without_empty_rows(lse: Tensor, mask: Tensor | None) -> Tensor:
    """Set lse to -inf where the mask hides every key: the kernels return finite numbers there."""
    return lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)


@contextlib.contextmanager
def determinism(block: Block) -> Iterator[None]:
    """Ask torch's kernels for the same bits at each run where the block asks for them; they read torch's global mode."""
    is_on = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not block.is_deterministic or (is_on and not only_warns):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=only_warns)


def on_device(numbers: Sequence[int], device: torch.device | int) -> tuple[Tensor, torch.cuda.Event]:
    """Return int64 numbers in the memory of a GPU and the event after which they are there; the host waits for nothing."""
    held = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
    return held.to(device, non_blocking=True), torch.cuda.current_stream(device).record_event()
