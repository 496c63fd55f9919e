"""Attention by its formula, in blocks of rows: the float64 reference, and the stand-in for FlashAttention on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from attention_cases import HEAD_DIM, Problem, local_tokens

Tensor = torch.Tensor
ROWS = 256  # of scores held at once: 0.5 GiB in float64 at 8192 keys and 32 heads


def visible(rows: int, columns: int, is_causal: bool, left: int, right: int, device: torch.device) -> Tensor:
    """Return the bool mask `[rows, columns]` of FlashAttention: bands count from the bottom right, -1 is no bound."""
    distance = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None] - (columns - rows)
    right = 0 if is_causal else right
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def scores(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    """q `[R, H, D]`, k `[S, K, D]` -> `[K, H / K, R, S]`"""
    grouped = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    return (grouped @ k.permute(1, 2, 0)[:, None] * scale).masked_fill(~seen, -torch.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out `[R, H, D]`, lse `[H, R]`); a row that sees nothing gives 0 and -inf."""
    s = scores(q, k, scale, seen)
    lse = torch.logsumexp(s, -1)
    weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
    out = weights @ v.transpose(0, 1)[:, None]
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.flatten(0, 1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) from out and lse over all keys, of shapes like `forward`'s."""
    grouped = (k.shape[1], -1)
    lse = lse.unflatten(0, grouped)
    weights = torch.exp(scores(q, k, scale, seen) - lse.masked_fill(lse == -torch.inf, torch.inf).unsqueeze(-1))
    q_, dout_, out_ = (x.unflatten(1, grouped).permute(1, 2, 0, 3) for x in (q, dout, out))
    dv = (weights.transpose(-1, -2) @ dout_).sum(1).transpose(0, 1)
    dweights = dout_ @ v.permute(1, 2, 0)[:, None]
    dscores = weights * (dweights - (dout_ * out_).sum(-1, keepdim=True)) * scale
    dq = (dscores @ k.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    dk = (dscores.transpose(-1, -2) @ q_).sum(1).transpose(0, 1)
    return dq, dk, dv


def _blocks(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """Yield rows and the columns that some of them see, of each document."""
    for start, end in problem.documents:
        for row in range(start, end, ROWS):
            last = min(row + ROWS, end)
            first = max(start, row - problem.window + 1) if problem.window else start
            yield slice(row, last), slice(first, last)


@dataclass(frozen=True, slots=True)
class Reference:
    """Random inputs in the dtype of the benchmark, alike on all ranks, and what they give in float64."""

    problem: Problem
    inputs: tuple[Tensor, ...]
    expected: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem, seed: int) -> Reference:
        """Compute the reference on every rank."""
        generator = torch.Generator(problem.device).manual_seed(seed)
        inputs = []
        for shape in problem.shapes(problem.length):
            x = torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype)
            dist.broadcast(x, 0)
            inputs.append(x)
        q, k, v, dout = (x[0].double() for x in inputs)
        out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
        left = problem.window - 1 if problem.window else -1
        for rows, columns in _blocks(problem):
            size = rows.stop - rows.start, columns.stop - columns.start
            seen = visible(*size, True, left, 0, problem.device)
            scale = HEAD_DIM**-0.5
            out[rows], lse = forward(q[rows], k[columns], v[columns], scale, seen)
            grads = backward(dout[rows], q[rows], k[columns], v[columns], out[rows], lse, scale, seen)
            dq[rows] = grads[0]
            dk[columns] += grads[1]
            dv[columns] += grads[2]
        return cls(problem, tuple(inputs), {"out": out, "dq": dq, "dk": dk, "dv": dv})

    def local_inputs(self, layout: str) -> list[Tensor]:
        """Return q, k, v and dout of the rank."""
        tokens = local_tokens(self.problem, layout)
        return [x[:, tokens] for x in self.inputs]

    def errors(self, actual: dict[str, Tensor], layout: str) -> dict[str, dict[str, float]]:
        """Return the relative errors over all ranks: of the largest element and of the root mean square."""
        tokens = local_tokens(self.problem, layout)
        errors = {}
        for name, x in actual.items():
            whole = self.expected[name]
            difference = x[0].double() - whole[tokens]
            largest = difference.abs().max()
            squares = torch.stack([difference.square().sum(), whole[tokens].square().sum()])
            dist.all_reduce(squares)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            errors[name] = {
                "max": (largest / whole.abs().max()).item(),
                "rms": (squares[0] / squares[1]).sqrt().item(),
            }
        return errors
