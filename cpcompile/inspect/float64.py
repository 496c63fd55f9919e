"""Float64: run a model in float64 although it casts to float32 here and there (logits, softmax, norms).

Such casts round, and rounding hides errors of another order of summation. Both sides of a comparison are
widened alike: the untouched model by a torch function mode, a captured graph by its dtype arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def widened(arguments: Any) -> Any:
    """Return arguments with float32 replaced by float64 where it is a dtype, and complex numbers likewise."""
    return tree_map(lambda x: WIDER.get(x, x) if isinstance(x, torch.dtype) else x, arguments)


class Widen(TorchFunctionMode):
    """While active, casts to float32 are casts to float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*widened(tuple(args)), **widened(dict(kwargs or {})))


def _wide_value(value: Any) -> Any:
    return value.to(WIDER[value.dtype]) if isinstance(value, torch.Tensor) and value.dtype in WIDER else value


def widen_graph(gm: fx.GraphModule) -> None:
    """Make the casts to float32 of a captured graph casts to float64, and what is known of their values as well."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = widened(node.args), widened(node.kwargs)
            node.meta["val"] = tree_map(_wide_value, node.meta.get("val"))
    gm.recompile()
