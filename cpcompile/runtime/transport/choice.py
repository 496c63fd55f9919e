"""Choice of transport: whether the ranks of a process group copy from symmetric memory or send and receive.

`auto` takes symmetric memory where it works: GPUs of one host that can read each other's memory. All ranks decide alike, once,
when the first message of a group is laid.
"""

from __future__ import annotations

import logging
import socket
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from cpcompile._torch import resolve_group, shares_gpus
from cpcompile.names import TRANSPORTS
from cpcompile.runtime.transport.symmetric import GRANULE, CudaDevice, Device, Lane
from cpcompile.runtime.transport.transfer import Ring

T = TypeVar("T")
DEVICES: dict[str, Callable[[torch.device], Device]] = {"cuda": CudaDevice}

_log = logging.getLogger(__name__)
_wanted: dict[str, str] = {}  # by the name of the group
_chosen: dict[tuple[str, torch.device], _Choice] = {}


@dataclass(frozen=True, slots=True)
class _Choice:
    """What was decided for a group: a lane, or None to send and receive. Names of groups are used again, groups are not."""

    group: weakref.ref[dist.ProcessGroup]
    lane: Lane | None


@dataclass(frozen=True, slots=True)
class _Rank:
    """What the ranks tell each other in order to decide."""

    wanted: str
    host: str
    device: int | None


def set_transport(group: str, transport: str) -> None:
    """Choose how the ranks of a group exchange messages: `auto`, `symmetric` (an error if it cannot) or `p2p`.

    All ranks choose the same, between operators. The symmetric memory of the group is given back, with which CUDA graphs that
    captured operators become invalid.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport {transport!r} is not known: choose one of {', '.join(map(repr, TRANSPORTS))}.")
    _wanted[group] = transport
    for key in [key for key in _chosen if key[0] == group]:
        del _chosen[key]


def transport_of(group: str) -> str:
    """Return how the ranks of a group exchange messages: `symmetric` or `p2p` once it is decided, before what was chosen."""
    found = {"p2p" if choice.lane is None else "symmetric" for (name, _), choice in _chosen.items() if name == group}
    return "symmetric" if "symmetric" in found else min(found, default=_wanted.get(group, "auto"))


def lane_of(ring: Ring, device: torch.device) -> Lane | None:
    """Return the lane of a group on a device; None: send and receive."""
    key, group = (ring.group, device), resolve_group(ring.group)
    known = _chosen.get(key)
    if known is None or known.group() is not group:
        lane = _choose(ring, device)
        # The memory is given back with the group.
        known = _chosen[key] = _Choice(weakref.ref(group, lambda _: _chosen.pop(key, None)), lane)
    return known.lane


def _choose(ring: Ring, device: torch.device) -> Lane | None:
    wanted, make = _wanted.get(ring.group, "auto"), DEVICES.get(device.type)
    if make is None and wanted == "symmetric":
        raise ValueError(f"transport 'symmetric' needs memory that ranks share, and {device.type} tensors have none.")
    if make is None:
        return None
    ranks = _gathered(_Rank(wanted, socket.gethostname(), device.index), ring)
    if len({rank.wanted for rank in ranks}) > 1:
        raise ValueError(f"the ranks of a group chose different transports: {[rank.wanted for rank in ranks]}.")
    if wanted == "p2p":
        return None
    here = make(device)
    reason = next(filter(None, _gathered(_obstacle(ranks, device), ring)), "")
    # Only when all of them may succeed do the ranks wait for each other.
    reason = reason or next(filter(None, _gathered(_failure(here, ring), ring)), "")
    if not reason:
        return Lane(ring, here)
    if wanted == "symmetric":
        raise ValueError(f"transport 'symmetric' does not work for this group: {reason}. Choose 'auto' or 'p2p'.")
    _log.info("messages of group %r are sent and received: no symmetric memory, because %s", ring.group, reason)
    return None


def _gathered(x: T, ring: Ring) -> list[T]:
    """Return what each rank has, on the host."""
    everyone: list[T] = [x] * ring.size
    dist.all_gather_object(everyone, x, group=resolve_group(ring.group))
    return everyone


def _obstacle(ranks: list[_Rank], device: torch.device) -> str:
    """Return why the ranks cannot read each other's memory, as far as that is known beforehand, or ''."""
    hosts = sorted({rank.host for rank in ranks})
    if len(hosts) > 1:
        return f"its ranks are on {len(hosts)} hosts ({', '.join(hosts)})"
    if device.type != "cuda":
        return ""
    others = [rank.device for rank in ranks if rank.device is not None]
    if len(set(others)) < len(ranks) and not shares_gpus():
        return "its ranks see their GPUs by the same number"
    if max(others) >= torch.cuda.device_count():
        return "a rank does not see the GPUs of all others"
    blocked = [n for n in others if n != device.index and not torch.cuda.can_device_access_peer(device, n)]
    return f"GPU {device.index} cannot read the memory of GPU {blocked[0]}" if blocked else ""


def _failure(device: Device, ring: Ring) -> str:
    """Return why a small piece of symmetric memory could not be had, or ''."""
    try:
        device.memory(GRANULE, ring.group)
    except (RuntimeError, ImportError) as error:
        return str(error).partition("\n")[0]
    return ""
