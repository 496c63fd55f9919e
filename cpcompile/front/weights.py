"""Weights: every rank must hold the same parameters and buffers; compared, or sent from the axis's first rank to all.

Reading every weight takes a while, so it is done at the first call, after weights were replaced or loaded, and when one rank has
written its weights more often than another. An optimizer writes those of every rank.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import is_, sub

import torch
import torch.distributed as dist

from cpcompile import _torch
from cpcompile.front.fingerprint import joined, text_fingerprint, value_fingerprint
from cpcompile.runtime.record import recorded

REMEDY = (
    "Every rank must hold the same weights: call torch.manual_seed with the same seed on every rank before the model is made, or "
    "load the same file on every rank; or let the first rank of the axis send its own to all (sync_weights=True)."
)


def same_parts(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors behind a weight that must be the same on every rank.

    None for a weight without values (`meta`, or what stands in for one that FSDP shards), and none for a `DTensor` of which ranks
    hold shards, as they should.
    """
    distributed = sys.modules.get(
        "torch.distributed.tensor"
    )  # importing it takes seconds, and then there is no DTensor
    if distributed is not None and isinstance(x, distributed.DTensor):
        is_whole = all(placement.is_replicate() for placement in x.placements)
        return same_parts(x.to_local()) if is_whole else []
    inner = _torch.inner_tensors(x)
    if inner is not None:
        return [part for tensor in inner for part in same_parts(tensor)]
    has_no_values = x.is_meta or (x.numel() and not x.untyped_storage().nbytes())
    return [] if has_no_values else [x]


def describe_weight(x: torch.Tensor) -> str:
    """Return what ranks must agree on before the values of a weight can be compared: class of shards, dtype, whole shape."""
    placements = getattr(x, "placements", "")
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{placements or ''}"


def differing_weights(
    weights: Mapping[str, torch.Tensor], group: dist.ProcessGroup, device: torch.device
) -> dict[str, list[int]]:
    """Return the names of weights that are not the same on all ranks, with the ranks that differ from the first. Collective.

    Every rank must have the same names, shapes and dtypes. `device` is one whose tensors the group sends.
    """
    parts = {name: same_parts(x) for name, x in weights.items()}
    own = [joined([value_fingerprint(part).to(device) for part in of_one]) for of_one in parts.values() if of_one]
    if not own:
        return {}
    stacked = torch.stack(own)
    gathered = [torch.empty_like(stacked) for _ in range(group.size())]
    with recorded("compare_weights", group.group_name):
        dist.all_gather(gathered, stacked, group=group)
        differs = (torch.stack(gathered) != gathered[0]).T.tolist()
    names = [name for name, of_one in parts.items() if of_one]
    return {
        name: [rank for rank, is_other in enumerate(row) if is_other]
        for name, row in zip(names, differs, strict=True)
        if any(row)
    }


def send_weights(weights: Sequence[torch.Tensor], group: dist.ProcessGroup, device: torch.device) -> None:
    """Overwrite the weights of all ranks by those of the group's first rank. Collective."""
    with torch.no_grad():
        for part in (part for x in weights for part in same_parts(x)):
            sent = part.detach().to(device).contiguous()
            with recorded("send_weights", group.group_name, sent):
                dist.broadcast(sent, group=group, group_src=0)
            if sent.data_ptr() != part.data_ptr():
                part.copy_(sent)


class Watch:
    """Tells whether weights were replaced since they were last compared, and how often they were written."""

    def __init__(self) -> None:
        self.is_due = True  # not compared yet, or replaced, or loaded
        self.layout = 0  # a fingerprint of names, dtypes and shapes
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._places: list[int] = []
        self._writes: list[int] = []

    def look(self, names: Callable[[], Sequence[str]], weights: Sequence[torch.Tensor]) -> int:
        """Return a fingerprint of how often each weight was written since the last comparison; see `is_due` and `layout`."""
        places = addresses(weights)
        is_same = places == self._places and all(map(is_, weights, [seen() for seen in self._seen]))
        if not is_same:
            self.is_due = True
            self._seen, self._places = list(map(weakref.ref, weights)), places
            texts = [f"{name}: {describe_weight(x)}" for name, x in zip(names(), weights, strict=True)]
            self.layout = text_fingerprint(*(text.encode() for text in texts))
        writes = _torch.num_writes(weights)
        if self.is_due:
            return 0
        return hash(tuple(map(sub, writes, self._writes)))

    def compared(self, weights: Sequence[torch.Tensor]) -> None:
        """Remember that the ranks hold the same weights now."""
        self.is_due = False
        self._writes = _torch.num_writes(weights)


def addresses(weights: Sequence[torch.Tensor]) -> list[int]:
    """Return where the values of weights lie; 0 for a class of tensors that has no memory of its own."""
    try:
        return [x.data_ptr() for x in weights]
    except RuntimeError:
        return [0 if _torch.inner_tensors(x) is not None else x.data_ptr() for x in weights]
