"""Deferred tensor: one that is made when its values are first read, which may be never."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

Tensor = torch.Tensor

# What is known without the values.
_PROPERTIES = [
    "shape",
    "dtype",
    "device",
    "layout",
    "requires_grad",
    "ndim",
    "is_cuda",
    "is_cpu",
    "is_sparse",
    "is_meta",
]
_METHODS = [
    "size",
    "dim",
    "numel",
    "nelement",
    "is_floating_point",
    "is_complex",
    "element_size",
    "__len__",
    "ndimension",
]
_KNOWN = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
_REQUIRES_GRAD = vars(torch._C.TensorBase)["requires_grad"].__get__
# What may be put off as well.
_CASTS = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.detach}


class DeferredTensor(Tensor):
    """A tensor whose values `make` returns. It is called with gradients recorded, or not, as where they are read."""

    _make: Callable[[], Tensor]
    _needs_grad: bool
    _made: dict[bool, Tensor]

    @staticmethod
    def of(
        make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device, needs_grad: bool
    ) -> DeferredTensor:
        """Return a tensor of this shape, dtype and device that has no values yet."""
        made: DeferredTensor = Tensor._make_wrapper_subclass(DeferredTensor, tuple(shape), dtype=dtype, device=device)
        made._make, made._needs_grad, made._made = make, needs_grad, {}
        return made

    def values(self) -> Tensor:
        """Return the tensor itself."""
        has_grad = torch.is_grad_enabled() and self._needs_grad
        if True in self._made and not has_grad:
            return self._made[True].detach()
        if has_grad not in self._made:
            self._made[has_grad] = self._make()
        return self._made[has_grad]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what is known; put off casts; make the values for all else."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, DeferredTensor) and func in _KNOWN:
            if func == _REQUIRES_GRAD:
                return first._needs_grad
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, DeferredTensor) and func in _CASTS:
            return first._cast(func, args[1:], kwargs)
        given = tree_map_only(DeferredTensor, DeferredTensor.values, (tuple(args), dict(kwargs)))
        return func(*given[0], **given[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Make the values: what comes here has not passed `__torch_function__`."""
        given = tree_map_only(DeferredTensor, DeferredTensor.values, (tuple(args), dict(kwargs or {})))
        return func(*given[0], **given[1])

    def _cast(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> DeferredTensor:
        like = func(torch.empty(0, dtype=self.dtype, device=self.device), *args, **kwargs)
        needs_grad = self._needs_grad and func is not Tensor.detach and torch.is_grad_enabled()
        return DeferredTensor.of(
            lambda: func(self.values(), *args, **kwargs), self.shape, like.dtype, like.device, needs_grad
        )
