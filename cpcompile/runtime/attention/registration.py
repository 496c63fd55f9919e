"""Registration: an attention and its gradient become an operator each, so that they trace whole and have a name.

forward(q, k, v, *terms, **axis) -> out, lse, *kept
backward(dout, q, k, v, out, lse, kept, *terms, **axis) -> dq, dk, dv, dsinks
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cpcompile.runtime.attention.arguments import NAMES, SCHEMA

Tensor = torch.Tensor
# Plans are made on the host at each call, so that no CUDA graph may hold one.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_TENSORS = [i for i, argument in enumerate(SCHEMA.split(",")) if argument.strip().startswith("Tensor")]
_SINKS = NAMES.index("sinks")


def define(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]],
    results: Callable[..., tuple[Tensor, ...]],
    num_kept: int,
    axis: str = "",
) -> None:
    """Register `cpcompile::{name}` and `cpcompile::{name}_backward`.

    Args:
        name: of the operator.
        forward, backward: as above.
        results: returns what `forward` returns, without values, for tracing.
        num_kept: how many tensors `forward` returns behind out and lse.
        axis: the keyword arguments of the operator, as a schema.
    """
    keywords = f", *, {axis}" if axis else ""
    _register(
        name, f"(Tensor q, Tensor k, Tensor v, {SCHEMA}{keywords}) -> ({_tensors(2 + num_kept)})", forward, results
    )

    def run(*args: Any, **axis: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, dsinks = backward(*args, **axis)
        return dq, dk, dv, dq.new_empty(0) if dsinks is None else dsinks

    def gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **axis: Any) -> tuple[Tensor, ...]:
        sinks = rest[3 + _SINKS] if len(rest) > 3 + _SINKS else None
        return (*(torch.empty_like(x) for x in (q, k, v)), q.new_empty(0) if sinks is None else torch.empty_like(sinks))

    tensors = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept"
    _register(f"{name}_backward", f"({tensors}, {SCHEMA}{keywords}) -> ({_tensors(4)})", run, gradients)
    overload = getattr(torch.ops.cpcompile, f"{name}_backward").default

    def keep(
        ctx: Any,
        inputs: tuple[Any, ...],
        output: tuple[Tensor, ...],
        keyword_only_inputs: Mapping[str, Any] | None = None,
    ) -> None:
        terms = inputs[3:]
        # torch leaves trailing arguments with their defaults out of what needs gradients, though not out of the inputs.
        for argument, is_learned in zip(NAMES, ctx.needs_input_grad[3:], strict=False):
            if argument != "sinks" and is_learned:
                raise NotImplementedError(f"{name} has no gradient for a learned {argument}: detach it")
        ctx.num_terms, ctx.axis = len(terms), dict(keyword_only_inputs or {})
        ctx.settings = [None if i in _TENSORS else x for i, x in enumerate(terms)]
        ctx.places = [i for i, x in enumerate(terms) if i in _TENSORS and x is not None]
        ctx.save_for_backward(*inputs[:3], *output, *(terms[i] for i in ctx.places))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, dout: Tensor, *unused: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        terms = list(ctx.settings)
        for index, x in zip(ctx.places, rest[num_kept:], strict=True):
            terms[index] = x
        *grads, dsinks = overload(dout, q, k, v, out, lse, rest[:num_kept], *terms, **ctx.axis)
        of_terms = [dsinks if i == _SINKS and x is not None else None for i, x in enumerate(terms)]
        return *grads, *of_terms

    torch.library.register_autograd(f"cpcompile::{name}", gradient, setup_context=keep)


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _register(name: str, schema: str, run: Callable[..., Any], results: Callable[..., Any]) -> None:
    qualname = f"cpcompile::{name}"
    torch.library.define(qualname, schema, tags=TAGS)
    torch.library.impl(qualname, ("cpu", "cuda"), run)
    torch.library.register_fake(qualname, results)
