"""The kernels alone on one GPU, without autograd: what context parallelism over P ranks could at best divide by P."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from attention_cases import HEAD_DIM, Problem
from attention_reference import visible
from attention_systems import Autograd, Runner, System

from cpcompile.runtime import kernels
from cpcompile.runtime.kernels.block import Block

Tensor = torch.Tensor
aten = torch.ops.aten
SCALE = HEAD_DIM**-0.5


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of `BLHD` tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=SCALE)
    return out, lse


def cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Sequence[Tensor]:
    """Gradients of `cudnn_forward`, `[B, H, L, D]`."""
    dout, q, k, v = (x.transpose(1, 2) for x in (dout, q, k, v))
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    sizes = (None, None, q.shape[2], k.shape[2])
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, unused, unused, None, *sizes, 0.0, True, scale=SCALE
    )


def flash_forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, longest: int, window: int) -> tuple[Tensor, ...]:
    """Causal attention: `BLHD` tensors, or `[tokens, heads, head_dim]` with the bounds of documents."""
    left = window - 1 if window else -1
    out, lse, state, unused, _ = aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=SCALE, window_size_left=left, window_size_right=0
    )
    return out, lse, state, unused


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: tuple[Tensor, ...],
    cu: Tensor | None,
    longest: int,
    window: int,
) -> Sequence[Tensor]:
    """Gradients of `flash_forward`."""
    out, lse, state, unused = saved
    left = window - 1 if window else -1
    return aten._flash_attention_backward(
        *(dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, True, state, unused),
        scale=SCALE,
        window_size_left=left,
        window_size_right=0,
    )


@dataclass(frozen=True, slots=True)
class Cudnn:
    """The dense cuDNN kernel."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Run it."""
        return q, k, v, cudnn_forward(q, k, v)

    def backward(self, saved: tuple[Any, ...], dout: Tensor) -> Sequence[Tensor]:
        """Run its backward."""
        q, k, v, result = saved
        return cudnn_backward(dout, q, k, v, *result)

    def tensors(self, saved: tuple[Any, ...], grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Transpose back."""
        parts = (saved[3][0], *grads)
        return {name: x.transpose(1, 2) for name, x in zip(("out", "dq", "dk", "dv"), parts, strict=True)}


@dataclass(frozen=True, slots=True)
class Flash:
    """The dense FlashAttention 2 kernel that torch bundles."""

    length: int
    window: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Run it."""
        return q, k, v, flash_forward(q, k, v, None, self.length, self.window)

    def backward(self, saved: tuple[Any, ...], dout: Tensor) -> Sequence[Tensor]:
        """Run its backward."""
        q, k, v, result = saved
        return flash_backward(dout, q, k, v, result, None, self.length, self.window)

    def tensors(self, saved: tuple[Any, ...], grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Name them."""
        return dict(zip(("out", "dq", "dk", "dv"), (saved[3][0], *grads), strict=True))


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring documents that one kernel call computes: cuDNN without `cu`, else FlashAttention."""

    tokens: slice
    cu: Tensor | None
    longest: int


def segments(problem: Problem, threshold: float) -> list[Segment]:
    """Give each document of at least `threshold` tokens to cuDNN, each run of shorter ones to one varlen call."""
    runs: list[tuple[bool, list[int]]] = []
    for start, end in problem.documents:
        is_long = end - start >= threshold
        if runs and not is_long and not runs[-1][0]:
            runs[-1][1].append(end)
        else:
            runs.append((is_long, [start, end]))
    found = []
    for is_long, bounds in runs:
        cu = None if is_long else torch.tensor(bounds, dtype=torch.int32, device=problem.device) - bounds[0]
        longest = max(b - a for a, b in pairwise(bounds))
        found.append(Segment(slice(bounds[0], bounds[-1]), cu, longest))
    return found


@dataclass(frozen=True, slots=True)
class Packed:
    """One kernel call for each segment."""

    parts: list[Segment]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Run each; the results stay apart."""
        results = []
        for part in self.parts:
            q_, k_, v_ = (x[:, part.tokens] for x in (q, k, v))
            if part.cu is None:
                results.append(cudnn_forward(q_, k_, v_))
            else:
                results.append(flash_forward(q_[0], k_[0], v_[0], part.cu, part.longest, 0))
        return q, k, v, results

    def backward(self, saved: tuple[Any, ...], dout: Tensor) -> list[Sequence[Tensor]]:
        """Run each backward."""
        *operands, results = saved
        grads = []
        for part, result in zip(self.parts, results, strict=True):
            dout_, q_, k_, v_ = (x[:, part.tokens] for x in (dout, *operands))
            if part.cu is None:
                grads.append(cudnn_backward(dout_, q_, k_, v_, *result))
            else:
                grads.append(flash_backward(dout_[0], q_[0], k_[0], v_[0], result, part.cu, part.longest, 0))
        return grads

    def tensors(self, saved: tuple[Any, ...], grads: list[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Join the segments."""
        rows = [(result[0], *grad) for result, grad in zip(saved[3], grads, strict=True)]
        rows = [
            tuple(x.transpose(1, 2) if part.cu is None else x[None] for x in row)
            for part, row in zip(self.parts, rows, strict=True)
        ]
        return {
            name: torch.cat(parts, 1)
            for name, parts in zip(("out", "dq", "dk", "dv"), zip(*rows, strict=True), strict=True)
        }


@dataclass(frozen=True, slots=True)
class OneBlock:
    """A kernel of this project's for a window, or for documents of some lengths."""

    kernel: str
    low: int | None
    lengths: tuple[int, ...]

    @property
    def block(self) -> Block:
        """What it computes."""
        return Block(SCALE, low=self.low, high=0, lengths=self.lengths)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
        """Run the forward."""
        tensors = [x.transpose(1, 2) for x in (q, k, v)]
        return tensors, kernels.forward(*tensors, self.block, self.kernel)

    def backward(self, saved: tuple[Any, ...], dout: Tensor) -> Sequence[Tensor]:
        """Run the backward."""
        tensors, result = saved
        return kernels.backward(dout.transpose(1, 2), *tensors, *result, self.block, self.kernel)

    def tensors(self, saved: tuple[Any, ...], grads: Sequence[Tensor]) -> dict[str, Tensor]:
        """Transpose back."""
        parts = (saved[1][0], *grads)
        return {name: x.transpose(1, 2) for name, x in zip(("out", "dq", "dk", "dv"), parts, strict=True)}


def on_cpu(problem: Problem) -> Runner:
    """Attention with a dense mask, for trying the benchmark out."""
    size = problem.length
    seen = visible(size, size, True, problem.window - 1 if problem.window else -1, 0, problem.device)
    documents = torch.bucketize(torch.arange(size), torch.tensor(problem.bounds[1:]), right=True)
    seen &= documents[:, None] == documents

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2)

    return Autograd(attend)


def _limit(kernel: str, make: Any, is_head_major: bool = False) -> System:
    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        yield make(problem)

    return System("one GPU", "limit", "whole", kernel, open_, is_head_major)


def limits(kind: str, device: str) -> list[System]:
    """Return the kernels that can compute a kind of problem alone."""
    if device == "cpu":
        return [_limit("cpu", on_cpu)]
    if kind == "window":
        return [
            _limit("fa2", lambda problem: Flash(problem.length, problem.window)),
            *(
                _limit(name, lambda problem, name=name: OneBlock(name, 1 - problem.window, ()))
                for name in ("triton", "cudnn_varlen")
            ),
        ]
    if kind == "packed":
        shares = {"fa2 varlen": 2, "cudnn per document": 0, "cudnn from 1/32": 1 / 32, "cudnn from 1/8": 1 / 8}
        return [
            _limit(name, lambda problem, share=share: Packed(segments(problem, share * problem.length)))
            for name, share in shares.items()
        ] + [
            _limit(name, lambda problem, name=name: OneBlock(name, None, tuple(b - a for a, b in problem.documents)))
            for name in ("triton", "cudnn_varlen")
        ]
    return [
        _limit("cudnn", lambda problem: Cudnn()),
        _limit("cudnn head major", lambda problem: Cudnn(), is_head_major=True),
        _limit("fa2", lambda problem: Flash(problem.length, 0)),
    ]
