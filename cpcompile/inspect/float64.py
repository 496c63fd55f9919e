"""Float64: run a model in float64 although it casts to float32 or half precision here and there (logits, softmax, norms).

Such casts round, and rounding hides errors of another order of summation. Both sides of a comparison are
widened alike: the untouched model by modes that see each call, a captured graph by its dtype arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

WIDER = dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), torch.float64)
WIDER |= {torch.complex64: torch.complex128}
_CASTS = (torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.float)


def widened(arguments: Any) -> Any:
    """Return arguments with narrower floating-point dtypes replaced by float64, and complex numbers likewise."""
    return tree_map(lambda x: WIDER.get(x, x) if isinstance(x, torch.dtype) else x, arguments)


class _WidenScripted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What `torch.jit.script` compiled calls the operators themselves, which a function mode does not see."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return func(*widened(tuple(args)), **widened(dict(kwargs or {})))


class Widen(TorchFunctionMode):
    """While active, casts to narrower floating-point dtypes are casts to float64."""

    def __init__(self) -> None:
        super().__init__()
        self._scripted = _WidenScripted()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Widen:
        self._scripted.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._scripted.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _CASTS:
            func = torch.Tensor.double
        return func(*widened(tuple(args)), **widened(dict(kwargs or {})))


def widen_graph(gm: fx.GraphModule) -> None:
    """Make the casts of a captured graph to narrower dtypes casts to float64, and widen its constants and known values."""
    values = _WideValues()
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = widened(node.args), widened(node.kwargs)
        elif node.op == "get_attr" and isinstance(constant := getattr(gm, str(node.target)), torch.Tensor):
            setattr(gm, str(node.target), constant.to(WIDER.get(constant.dtype, constant.dtype)))
        if node.op in ("call_function", "get_attr"):
            node.meta["val"] = tree_map(values.of, node.meta.get("val"))
    gm.recompile()


class _WideValues:
    """Wide values in the place of recorded ones: those that share memory share it still."""

    def __init__(self) -> None:
        self._memories: dict[int, torch.Tensor] = {}

    def of(self, value: Any) -> Any:
        """Return the wide value, or what is none."""
        if not isinstance(value, torch.Tensor) or value.dtype not in WIDER:
            return value
        storage = value.untyped_storage()
        with value.fake_mode:  # type: ignore[attr-defined]
            if storage._cdata not in self._memories:
                numbers = storage.nbytes() // value.dtype.itemsize
                self._memories[storage._cdata] = torch.empty(numbers, dtype=WIDER[value.dtype], device=value.device)
            memory = self._memories[storage._cdata].view(WIDER[value.dtype])
            wide = memory.as_strided(value.shape, value.stride(), value.storage_offset())
            return wide.requires_grad_(value.requires_grad)
