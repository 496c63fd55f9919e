"""Show: an identity that prints what it is given, for people who look at the values of a running model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime.tokens.pause import pause
from cpcompile.runtime.tokens.shard import factors
from cpcompile.runtime.transport import process_group

Tensor = torch.Tensor
_IS_QUIET: ContextVar[bool] = ContextVar("nothing is printed", default=False)
FIRST, RUNS = 4, 4  # values and runs of tokens that are printed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While active, nothing is printed: the model runs again and again, to be compared."""
    token = _IS_QUIET.set(True)
    try:
        yield
    finally:
        _IS_QUIET.reset(token)


@torch.library.custom_op("cpcompile::show", mutates_args=())
def show(
    x: Tensor, name: str, gradient: bool = False, pauses: bool = False, world_size: int = 1, group: str = ""
) -> Tensor:
    """Return a copy of `x`, and print what it is; with `gradient`, print its gradient in backward; `pauses`: see `pause`."""
    say(name, "", x)
    if pauses and not _IS_QUIET.get():
        pause(name, x, None, world_size, group)
    return x.clone()


@torch.library.custom_op("cpcompile::show_tokens", mutates_args=())
def show_tokens(
    x: Tensor,
    name: str,
    gradient: bool,
    pauses: bool,
    dim: int,
    inner: int,
    front: int,
    back: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: Tensor | None = None,
) -> Tensor:
    """Do the same for a rank's tokens, and print which they are, of all but the first `front` and last `back`; no padding."""
    order = TokenOrder.of(length, world_size, layout, bounds)
    positions = order.positions(process_group.rank_in(world_size, group))
    slots = ((positions >= front) & (positions < length - max(back, 0))).nonzero().flatten()
    held = factors(x, dim, inner, order.local_length).index_select(dim + 1, slots.to(x.device)).flatten(dim, dim + 2)
    tokens = positions[slots] - front
    say(name, f", tokens {runs(tokens)} of {length - front - back} along dim {dim}", held)
    if pauses and not _IS_QUIET.get():
        pause(name, held, tokens, world_size, group)
    return x.clone()


@show.register_fake
def _(x: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(x)


@show_tokens.register_fake
def _(x: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, name, gradient, ctx.pauses, *ctx.axis = inputs
    ctx.name = f"gradient of {name}" if gradient and not _IS_QUIET.get() else ""  # backward may run in another thread


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    shown = show_tokens if len(ctx.axis) > 2 else show
    return shown(grad, ctx.name, False, ctx.pauses, *ctx.axis) if ctx.name else grad, *(None,) * (3 + len(ctx.axis))


show.register_autograd(_backward, setup_context=_keep)
show_tokens.register_autograd(_backward, setup_context=_keep)


def say(name: str, held: str, x: Tensor) -> None:
    """Print a value of this rank."""
    if not _IS_QUIET.get():
        rank = f", rank {dist.get_rank()}" if dist.is_initialized() else ""
        print(f"{name}{rank}{held}: {summary(x)}", flush=True)


def summary(x: Tensor) -> str:
    """Return dtype and shape of a tensor, its range and mean as far as they are finite, and its first values."""
    x = x.detach()
    head = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    if not x.numel() or x.is_complex():
        return head
    first = " ".join(f"{value:.4g}" for value in x.flatten()[:FIRST].tolist())
    finite = x[x.isfinite()]
    others = x.numel() - finite.numel()
    values = finite.to(torch.promote_types(x.dtype, torch.float32))
    middle = f", from {values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}" if finite.numel() else ""
    return f"{head}{middle}, first {first}" + (f", {others} NaN or infinite" if others else "")


def runs(tokens: Tensor) -> str:
    """Return ascending numbers as runs: `0:4 12:16`."""
    if not len(tokens):
        return "none"
    is_first = torch.cat([torch.tensor([True]), tokens.diff() != 1])
    starts = tokens[is_first].tolist()
    ends = [*(tokens[:-1][is_first[1:]] + 1).tolist(), int(tokens[-1]) + 1]
    more = " ..." if len(starts) > RUNS else ""
    return " ".join(f"{start}:{end}" for start, end in list(zip(starts, ends, strict=True))[:RUNS]) + more
