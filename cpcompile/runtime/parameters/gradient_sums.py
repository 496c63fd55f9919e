"""Gradients of what every rank holds whole: each sum over the ranks begins as soon as backward has the gradient.

Gradients travel in buckets (Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, 2020), whose
members stay where they are: one launch sums them all. Ranks run one graph, so that they sum in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from cpcompile._torch import Work, all_reduce_together
from cpcompile.runtime.record import Row, begin, ending

Tensor = torch.Tensor

BUCKET_BYTES = 64 << 20  # large enough for full bandwidth, small beside the gradients themselves

_LIBRARY = torch.library.Library("cpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("sum_gradient(Tensor x, int site, int index) -> Tensor")  # type: ignore[no-untyped-call]


class GradientSums:
    """The sums of gradients of one model.

    Attributes:
        group: the ranks.
        scale: what each sum is multiplied by.
        enabled: whether gradients are summed now, or kept until they are.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.group: dist.ProcessGroup | None = None
        self.scale, self.enabled = scale, True
        self._unsummed: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._works: list[tuple[Work, list[Tensor], Row]] = []
        self._pending: dict[torch.dtype, list[Tensor]] = {}
        self._num_pending = Counter[torch.dtype]()  # bytes

    def start(self, grad: Tensor, key: Tensor | None) -> Tensor:
        """Return what will be the sum of a gradient once `finish` has returned; a copy of the gradient where none is due."""
        if not self.enabled:
            return grad.clone(memory_format=torch.contiguous_format)
        earlier = self._taken(key) if key is not None else None
        if earlier is None:
            total = grad.clone(memory_format=torch.contiguous_format)
        else:
            total = torch.add(grad, earlier, out=torch.empty_like(grad, memory_format=torch.contiguous_format))
        self._add(total)
        return total

    def finish(self, keys: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the sums of gradients that `start` returned, or None for all while none are due."""
        if not self.enabled:
            for key, grad in zip(keys, grads, strict=True):
                earlier = self._taken(key)
                total = grad if earlier is None else earlier if grad is None else earlier + grad
                if total is not None:
                    self._unsummed[key] = total
            return [None] * len(grads)
        sums = list(grads)
        late = {i: x for i, key in enumerate(keys) if (x := self._taken(key)) is not None}  # no part in this backward
        for x in late.values():
            self._add(x)
        self._wait()
        for i, x in late.items():
            own = sums[i]
            sums[i] = x if own is None else own + x
        return sums

    def kept(self, key: Tensor) -> Tensor | None:
        """Return the gradient that is kept until gradients are summed, if there is one."""
        kept: Tensor | None = self._unsummed.get(key)  # type: ignore[no-untyped-call]
        return kept

    def _add(self, total: Tensor) -> None:
        """Put what is summed into a bucket of its dtype, and send that if it is full."""
        if not total.numel():
            return
        bucket = self._pending.setdefault(total.dtype, [])
        bucket.append(total)
        self._num_pending[total.dtype] += total.nbytes
        if self._num_pending[total.dtype] >= BUCKET_BYTES:
            self._send(total.dtype)

    def _send(self, dtype: torch.dtype) -> None:
        bucket = self._pending.pop(dtype)
        del self._num_pending[dtype]
        # It stays open until the host has waited for the sum, at the end of backward.
        row = begin("sum_gradients", "" if self.group is None else self.group.group_name, bucket[0])
        self._works.append((all_reduce_together(bucket, self.group), bucket, row))

    def _wait(self) -> None:
        while self._pending:
            self._send(next(iter(self._pending)))
        works, self._works = self._works, []
        for work, _, row in works:
            with ending(row):
                work.wait()
        if self.scale != 1 and works:
            torch._foreach_mul_([x for _, bucket, _ in works for x in bucket], self.scale)

    def _taken(self, key: Tensor) -> Tensor | None:
        """Return what was kept of an earlier backward, and keep it no longer."""
        earlier: Tensor | None = self._unsummed.get(key)  # type: ignore[no-untyped-call]
        self._unsummed.pop(key, None)  # type: ignore[no-untyped-call]
        return earlier


class Site:
    """The inputs of one graph whose gradients are summed.

    Attributes:
        sums: of the model.
        number: of this graph in the process, for its operators.
        keys: the parameters of the newest call, in order; None for what is no parameter.
    """

    def __init__(self, sums: GradientSums) -> None:
        self.sums, self.number = sums, len(_SITES)
        self.keys: list[Tensor | None] = []
        _SITES.append(self)

    def set_keys(self, keys: Iterable[Tensor]) -> None:
        """Say which tensors the graph is called with."""
        self.keys = [x if isinstance(x, torch.nn.Parameter) else None for x in keys]


_SITES: list[Site] = []


def sum_gradient(x: Tensor, site: int, index: int) -> Tensor:
    """Return `x`; its gradient is summed over the ranks, see `GradientSums`.

    Args:
        site, index: which graph, and which of its summed inputs.
    """
    return _Sum.apply(x, site, index)  # type: ignore[no-any-return, no-untyped-call]


# Composite: autograd and the compiler see what it is made of.
_LIBRARY.impl("sum_gradient", sum_gradient, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, site: int, index: int) -> Tensor:
        ctx.place = site, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return start_sum(grads[0], *ctx.place), None, None


@torch.library.custom_op("cpcompile::start_sum", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def start_sum(grad: Tensor, site: int, index: int) -> Tensor:
    """Return memory that holds the sum of a gradient when the whole backward of the graph is done."""
    of = _SITES[site]
    return of.sums.start(grad, of.keys[index])


@start_sum.register_fake
def _(grad: Tensor, site: int, index: int) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@torch.library.custom_op("cpcompile::kept_copy", mutates_args=())
def kept_copy(x: torch.Tensor) -> torch.Tensor:
    """Return a copy that no compiler takes for what it was copied from, as Inductor takes `clone`. Without a gradient."""
    return x.clone()


@kept_copy.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)
