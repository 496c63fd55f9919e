"""Chunked loss: a head and what is computed of its logits, a chunk of tokens at a time, so that few logits are in memory.

A chunk's logits, losses and gradients are computed at once, where a loss is one sum: logits are needed by their own gradient
only, and that is what a sum over tokens needs of them (Hsu et al., Liger Kernel, 2024; Wijmans et al., Cut Your Losses, 2024).
Other results need the gradient that arrives in backward, where the logits of each chunk are computed again.

Gradients of weights are added up over chunks in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cpcompile.runtime.tiles.by_rows import tiles, wide
from cpcompile.runtime.tiles.loss_body import Body, body_of

Tensor = torch.Tensor

_LIBRARY = torch.library.Library("cpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "chunked_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor[] rows, Tensor[] others, str body, int chunk, "
    "bool compiled) -> Tensor[]"
)


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[Tensor],
    others: Sequence[Tensor],
    body: str,
    chunk: int,
    compiled: bool,
) -> list[Tensor]:
    """Return what a body computes of `hidden @ weight.T + bias`.

    Args:
        hidden: `[..., features]`.
        weight, bias: of the head, `[classes, features]` and `[classes]`.
        rows: tensors of one row a token, `[T, ...]`; no gradient reaches them.
        others: what all tokens share, without gradients too.
        body: the key of the body.
        chunk: how many tokens at once.
        compiled: whether Inductor compiles what is done with the logits.
    """
    operands = [hidden, weight, *([] if bias is None else [bias]), *[x.contiguous() for x in (*rows, *others)]]
    with_gradients = torch.is_grad_enabled()
    options = body, chunk, compiled, with_gradients, bias is not None, len(rows)
    return list(_ChunkedLoss.apply(*options, *operands))  # type: ignore[no-untyped-call]


# Composite: autograd and the compiler see the operators below.
_LIBRARY.impl("chunked_loss", chunked_loss, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        key: str,
        chunk: int,
        compiled: bool,
        with_gradients: bool,
        has_bias: bool,
        num_rows: int,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        body, num_heads = body_of(key), 2 + has_bias
        head, rows, others = operands[:num_heads], operands[num_heads:][:num_rows], operands[num_heads + num_rows :]
        ctx.needs = list(ctx.needs_input_grad[6 : 6 + num_heads])
        ctx.arguments = key, chunk, compiled
        ctx.sizes, ctx.dtypes = (num_heads, num_rows), [x.dtype for x in head]
        bias = head[2] if has_bias else None
        ctx.is_done = with_gradients and body.is_one_sum and any(ctx.needs)
        if ctx.is_done:
            found = loss_and_gradients(
                head[0], head[1], bias, [], list(rows), list(others), key, chunk, compiled, ctx.needs
            )
            results, grads = found[: len(body.results)], found[len(body.results) :]
            ctx.save_for_backward(*grads)
        else:
            results = loss_chunks(head[0], head[1], bias, list(rows), list(others), key, chunk)
            ctx.save_for_backward(*operands)
        ctx.mark_non_differentiable(*[x for x, of in zip(results, body.results, strict=True) if not of.has_gradient])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        key, chunk, compiled = ctx.arguments
        body = body_of(key)
        smooth = [g for g, of in zip(grads, body.results, strict=True) if of.has_gradient]
        if ctx.is_done:
            (scale,) = smooth
            # A mean over no token at all arrives as infinity, which leaves gradients of 0 alone on one device.
            found = [torch.where(grad == 0, 0, grad * scale) for grad in ctx.saved_tensors]
        else:
            num_heads, num_rows = ctx.sizes
            head, rest = ctx.saved_tensors[:num_heads], ctx.saved_tensors[num_heads:]
            bias = head[2] if num_heads == 3 else None
            rows, others = list(rest[:num_rows]), list(rest[num_rows:])
            found = loss_and_gradients(head[0], head[1], bias, smooth, rows, others, key, chunk, compiled, ctx.needs)[
                len(body.results) :
            ]
        given = iter(found)
        of_head = [next(given).to(of) if needed else None for needed, of in zip(ctx.needs, ctx.dtypes, strict=True)]
        return *[None] * 6, *of_head, *[None] * (len(ctx.needs_input_grad) - 6 - len(of_head))


@torch.library.custom_op("cpcompile::loss_chunks", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def loss_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: list[Tensor],
    others: list[Tensor],
    body: str,
    chunk: int,
) -> list[Tensor]:
    """Return the results of a body without gradients."""
    of = body_of(body)
    total = _Total(of, hidden)
    if of.provider:
        total.add(of.function(hidden.reshape(-1, hidden.shape[-1]), weight, bias, *rows, *others))
        return total.results
    for _, x, mine in _chunks(hidden, rows, chunk):
        logits = torch.nn.functional.linear(x, weight, bias)
        total.add(of.function(logits, *mine, *others))
    return total.results


@loss_chunks.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, rows: Any, others: Any, body: str, chunk: int) -> list[Tensor]:
    return _empty_results(body_of(body), hidden)


@torch.library.custom_op("cpcompile::loss_and_gradients", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grads: list[Tensor],
    rows: list[Tensor],
    others: list[Tensor],
    body: str,
    chunk: int,
    compiled: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Return the results of a body, and the gradients of those of hidden states, weight and bias that `needs` says.

    Args:
        grads: the gradients of the results that have one; none for one sum, whose gradient is 1.
    """
    of = body_of(body)
    total = _Total(of, hidden)
    sums = (
        [torch.ones((), dtype=r.dtype, device=hidden.device) for r in of.results if r.has_gradient] if not grads else []
    )
    of_rows = [r.inner is not None for r in of.results if r.has_gradient]
    rows_of = hidden.shape[:-1]  # counted, since a result may have no element in each
    given = sums or [
        g.reshape(rows_of.numel(), *g.shape[len(rows_of) :]) if by else g for g, by in zip(grads, of_rows, strict=True)
    ]
    if of.provider:
        head = hidden.reshape(-1, hidden.shape[-1]), weight, bias
        results, found = of.differentiated(head, [*needs, False][:3], given, rows, others)
        total.add(results)
        made = zip((hidden, weight, bias), found, strict=True)
        return [*total.results, *[g.contiguous().view(x.shape) for x, g in made if x is not None and g is not None]]
    of_hidden, of_weight, *of_bias = _empty_gradients(hidden, weight, bias, needs)
    is_first = True
    for part, x, mine in _chunks(hidden, rows, chunk):
        logits = torch.nn.functional.linear(x, weight, bias)
        own = [g[part] if by else g for g, by in zip(given, of_rows, strict=True)]
        total.add(of.step(compiled, logits, own, mine, others))
        if of_hidden is not None:
            _product(logits, weight, of_hidden.view(-1, hidden.shape[-1])[part])
        if of_weight is not None:
            _product(logits.t(), x, of_weight, adds=not is_first)
        for bias_grad in of_bias:
            if bias_grad is not None:
                bias_grad += logits.sum(0, dtype=bias_grad.dtype)
        del logits
        is_first = False
    return [*total.results, *[x for x in (of_hidden, of_weight, *of_bias) if x is not None]]


@loss_and_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    grads: Any,
    rows: Any,
    others: Any,
    body: str,
    chunk: int,
    compiled: bool,
    needs: list[bool],
) -> list[Tensor]:
    made = _empty_gradients(hidden, weight, bias, needs, widens=not body_of(body).provider)
    return [*_empty_results(body_of(body), hidden), *[x for x in made if x is not None]]


class _Total:
    """The results of all chunks: sums are added up, in float32 at least, rows put in their places."""

    def __init__(self, body: Body, hidden: Tensor) -> None:
        self._body, self._lead = body, hidden.shape[:-1]
        self._parts: list[list[Tensor]] = [[] for _ in body.results]

    def add(self, results: Sequence[Tensor]) -> None:
        """Add those of a chunk."""
        for parts, result in zip(self._parts, results, strict=True):
            parts.append(result)

    @property
    def results(self) -> list[Tensor]:
        """What the body would return for all tokens."""
        found = []
        for parts, of in zip(self._parts, self._body.results, strict=True):
            if of.inner is None:
                found.append(torch.stack(parts).sum(dtype=wide(of.dtype)).to(of.dtype))
            else:
                found.append(torch.cat(parts).reshape(*self._lead, *of.inner))
        return found


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], widens: bool = True
) -> list[Tensor | None]:
    """Return memory for the gradients that are needed, in float32 at least (`widens`); that of the bias is 0."""
    made = [
        torch.empty_like(x, dtype=wide(x.dtype) if widens else x.dtype, memory_format=torch.contiguous_format)
        if needed
        else None
        for x, needed in zip((hidden, weight), needs, strict=False)
    ]
    if bias is None:
        return made
    return [*made, torch.zeros_like(bias, dtype=wide(bias.dtype) if widens else bias.dtype) if needs[2] else None]


def _product(a: Tensor, b: Tensor, out: Tensor, adds: bool = False) -> None:
    """Write `a @ b` to `out`, or add it there; GPUs add products of 16-bit numbers to float32 ones themselves."""
    if out.dtype == a.dtype:
        out.addmm_(a, b) if adds else torch.mm(a, b, out=out)
    elif not out.is_cuda:
        out.add_(a @ b) if adds else out.copy_(a @ b)
    elif adds:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _chunks(hidden: Tensor, rows: Sequence[Tensor], chunk: int) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Yield (the slice of tokens, their hidden states, their rows) of chunks of about the same size."""
    x = hidden.reshape(-1, hidden.shape[-1])
    for part in tiles(x.shape[0], chunk):
        yield part, x[part], [row[part] for row in rows]


def _empty_results(body: Body, hidden: Tensor) -> list[Tensor]:
    lead = hidden.shape[:-1]
    return [hidden.new_empty([] if r.inner is None else [*lead, *r.inner], dtype=r.dtype) for r in body.results]
