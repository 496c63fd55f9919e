"""Host memory: values that wait there for backward, copied on a stream beside computation.

Operators say that they write what only has to come after them, which keeps a compiler from moving one behind the other:

    host = to_host(x, [])            # begins the copy; what reads x is ordered behind it
    ...                              # computes the block that x enters
    wait_copy(host, x, [y])          # behind y, what the block returns: from here on the memory of x may be used again
    ...
    x = from_host(host, device, [])  # begins the copy, a block before it is needed
    ...                              # computes the block behind in backward
    wait_copy(x, host, [])           # what reads x is ordered behind it

Host memory is pinned, and kept by torch's allocator from one step to the next. Devices other than GPUs copy at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpcompile.errors import CPError
from cpcompile.runtime.transport.streams import Side

Tensor = torch.Tensor

_sides: dict[torch.device, Side] = {}
# By the address of a copy: that of its source, and what is recorded when it is made, if that is not at once.
_under_way: dict[int, tuple[int, torch.cuda.Event | None]] = {}


@torch.library.custom_op("cpcompile::to_host", mutates_args=("x",))
def to_host(x: Tensor, after: Sequence[Tensor]) -> Tensor:
    """Begin a copy in host memory, of the same strides, behind `after`. `x` is not changed."""
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    _begin(host, x, x.device)
    return host


@to_host.register_fake
def _(x: Tensor, after: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(x, device="cpu")


@torch.library.custom_op("cpcompile::from_host", mutates_args=())
def from_host(host: Tensor, device: torch.device, after: Sequence[Tensor]) -> Tensor:
    """Begin a copy on a device, behind `after`."""
    x = torch.empty_like(host, device=device)
    _begin(x, host, device)
    return x


@from_host.register_fake
def _(host: Tensor, device: torch.device, after: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(host, device=device)


@torch.library.custom_op("cpcompile::wait_copy", mutates_args=("copy",))
def wait_copy(copy: Tensor, source: Tensor, after: Sequence[Tensor]) -> None:
    """Let the current stream, behind `after`, wait until a copy is made. It holds the memory of `source` until then."""
    _wait(copy, source)


@wait_copy.register_fake
def _(copy: Tensor, source: Tensor, after: Sequence[Tensor]) -> None:
    return None


def _begin(copy: Tensor, source: Tensor, device: torch.device) -> None:
    done = None
    if device.type != "cuda":
        copy.copy_(source)
    else:
        if device not in _sides:
            _sides[device] = Side(device)
        _, done = _sides[device].run(lambda: copy.copy_(source, non_blocking=True))
    if copy.numel():
        _under_way[copy.data_ptr()] = source.data_ptr(), done


def _wait(copy: Tensor, source: Tensor) -> None:
    if not copy.numel():
        return
    address, done = _under_way.pop(copy.data_ptr())
    # A compiler that had copied the source would use that memory again while it is read.
    if address != source.data_ptr():
        raise CPError(
            "offload: the compiler laid out a kept value anew between its copy to host memory and the wait for it. Use "
            "offload='none', or inner_options={'comprehensive_padding': False}."
        )
    if done is not None:
        torch.cuda.current_stream(copy.device if copy.is_cuda else source.device).wait_event(done)
