"""How the benchmark runs an attention: a system opens a problem and gives a runner with a forward and a backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from attention_cases import Problem

Tensor = torch.Tensor


class Runner(Protocol):
    """Runs the local part of a problem."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """Return what `backward` and `tensors` take."""

    def backward(self, saved: Any, dout: Tensor) -> Any:
        """Return the gradients, as they come."""

    def tensors(self, saved: Any, grads: Any) -> dict[str, Tensor]:
        """Return out, dq, dk and dv, each `BLHD`. Not timed."""


@dataclass(frozen=True, slots=True)
class Autograd:
    """A runner for a differentiable function of `BLHD` tensors."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Run the function on leaves of their own."""
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return q, k, v, self.attend(q, k, v)

    def backward(self, saved: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
        """Differentiate it. `grad` and not `backward`: accumulating would copy gradients of other strides."""
        q, k, v, out = saved
        return torch.autograd.grad(out, (q, k, v), dout)

    def tensors(self, saved: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Name them."""
        return dict(zip(("out", "dq", "dk", "dv"), (saved[3], *grads), strict=True))


@dataclass(frozen=True, slots=True)
class System:
    """Something that computes attention.

    `layout` says which tokens a rank holds, `whole` that every rank computes the whole problem. `is_head_major` asks for
    inputs whose memory is `[batch, heads, tokens, head_dim]`. What is `risky` runs last: it may hang.
    """

    name: str
    strategy: str
    layout: str
    kernel: str
    open: Callable[[Problem], AbstractContextManager[Runner]]
    is_head_major: bool = False
    risky: bool = False

    @property
    def key(self) -> str:
        """A name for one row of a case."""
        return "/".join((self.name, self.strategy, self.layout, self.kernel))

    @property
    def is_limit(self) -> bool:
        """Whether this is one kernel on one GPU."""
        return self.layout == "whole"
