"""Registration: an attention and its gradient become an operator each, so that they trace whole and have a name.

forward(q, k, v, *terms, **axis) -> out, lse, *kept
backward(dout, q, k, v, out, lse, kept, *terms, **axis) -> dq, dk, dv, dsinks

Where `kept` takes the place of some of q, k, v and out, backward gets tensors without tokens for these, which say how many heads
there are and how wide they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile.runtime.attention.arguments import NAMES, SCHEMA
from cpcompile.runtime.attention.profiling import attention_range
from cpcompile.runtime.record import RECORDED, call

Tensor = torch.Tensor
# Plans are made on the host at each call, so that no CUDA graph may hold one.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
LAYER = "layer"  # the argument that names the module whose attention this is, for profiles: no result depends on it
LAYER_SCHEMA = f"str {LAYER}=''"
_TENSORS = [i for i, argument in enumerate(SCHEMA.split(",")) if argument.strip().startswith("Tensor")]
_SINKS = NAMES.index("sinks")
_OPERANDS = ("q", "k", "v", "out")


@dataclass(frozen=True, slots=True)
class Kept:
    """What a forward returns behind out and lse, for backward.

    Attributes:
        count: how many tensors.
        replaces: of which of q, k, v and out backward then needs the sizes only. Their gradients lie tokens first.
        is_wanted: tells by the keyword arguments of a call whether they are kept; otherwise they are empty.
    """

    count: int = 0
    replaces: tuple[str, ...] = ()
    is_wanted: Callable[[Mapping[str, Any]], bool] = bool


NOTHING = Kept()


def define(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]],
    results: Callable[..., tuple[Tensor, ...]],
    axis: str = "",
    kept: Kept = NOTHING,
    *,
    sends: bool = True,
) -> None:
    """Register `cpcompile::{name}` and `cpcompile::{name}_backward`.

    Args:
        name: of the operator.
        forward, backward: as above.
        results: returns what `forward` returns, without values, for tracing.
        axis: the keyword arguments of the operator, as a schema, beside its layer.
        kept: what `forward` returns behind out and lse.
        sends: whether ranks exchange something, where there are several.
    """
    keywords = f", *, {LAYER_SCHEMA}{', ' * bool(axis)}{axis}"
    sends = sends and "world_size" in axis
    schema = f"(Tensor q, Tensor k, Tensor v, {SCHEMA}{keywords}) -> ({_tensors(2 + kept.count)})"
    _register(name, schema, forward, results, sends)

    def run(*args: Any, **axis: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, dsinks = backward(*args, **axis)
        return dq, dk, dv, dq.new_empty(0) if dsinks is None else dsinks

    def gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **axis: Any) -> tuple[Tensor, ...]:
        sinks = rest[3 + _SINKS] if len(rest) > 3 + _SINKS else None
        found = [
            _tokens_first(dout, x) if of in kept.replaces else torch.empty_like(x)
            for of, x in zip(_OPERANDS, (q, k, v), strict=False)
        ]
        return *found, q.new_empty(0) if sinks is None else torch.empty_like(sinks)

    tensors = "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] kept"
    _register(f"{name}_backward", f"({tensors}, {SCHEMA}{keywords}) -> ({_tensors(4)})", run, gradients, sends)
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
        operands = dict(zip(_OPERANDS, (*inputs[:3], output[0]), strict=True))
        replaced = kept.replaces if kept.is_wanted(ctx.axis) else ()
        ctx.sizes = {of: (x.shape[0], x.shape[1], 0, x.shape[3]) for of, x in operands.items() if of in replaced}
        read = [None if of in replaced else x for of, x in operands.items()]
        ctx.num_kept = kept.count if replaced else 0
        ctx.save_for_backward(*read, output[1], *output[2 : 2 + ctx.num_kept], *(terms[i] for i in ctx.places))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def gradient(ctx: Any, dout: Tensor, *unused: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        operands = [
            x if x is not None else dout.new_empty(ctx.sizes[of])
            for of, x in zip(_OPERANDS, (q, k, v, out), strict=True)
        ]
        terms = list(ctx.settings)
        for index, x in zip(ctx.places, rest[ctx.num_kept :], strict=True):
            terms[index] = x
        *grads, dsinks = overload(dout, *operands, lse, rest[: ctx.num_kept], *terms, **ctx.axis)
        of_terms = [dsinks if i == _SINKS and x is not None else None for i, x in enumerate(terms)]
        return *grads, *of_terms

    torch.library.register_autograd(f"cpcompile::{name}", gradient, setup_context=keep)


def _tokens_first(dout: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of `x`, without values, `[B, H, S, D]` over `[B, S, H, D]` memory; `x` may have no tokens."""
    return x.new_empty(x.shape[0], dout.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _tensors(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _register(name: str, schema: str, run: Callable[..., Any], results: Callable[..., Any], sends: bool) -> None:
    def run_in_range(*args: Any, layer: str = "", **axis: Any) -> Any:
        with attention_range(name, axis.get("layout", ""), layer):
            if not sends or axis["world_size"] == 1:
                return run(*args, **axis)
            return call(name, axis["group"], args[0], layer, run, args, axis)

    if sends:
        RECORDED.add(name)

    def results_of(*args: Any, layer: str = "", **axis: Any) -> Any:
        return results(*args, **axis)

    qualname = f"cpcompile::{name}"
    torch.library.define(qualname, schema, tags=TAGS)
    torch.library.impl(qualname, ("cpu", "cuda"), run_in_range)
    torch.library.register_fake(qualname, results_of)
