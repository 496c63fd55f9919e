"""Tensor programs: random operators on random tensors of any shape, where models seldom go.

Each line is tried on the spot; one that fails on these shapes, or whose values are of no use, is left out.
Sizes that happen to be equal (7 tokens, 7 rows) meet each other, as they do in real programs.
"""

from __future__ import annotations

import re
from random import Random
from string import Template
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.fuzz.grammar import sizes
from tests.fuzz.program import INPUTS, Program, has_gradients

SETUP = (
    "self.embed = nn.Embedding(13, 8)",
    "self.l = nn.Linear(8, 8)",
    "self.n = nn.Linear(8, 3)",
    "self.p = nn.Parameter(torch.randn(8))",
    "self.places = nn.Parameter(torch.randn(64, 8))",
)

# What every program starts from: the tokens, and whole values with and without tokens.
FIRST = {
    "e": "self.embed(input_ids)",
    "h": "self.l(self.embed(input_ids))",
    "i": "input_ids * 0.1",
    "m": "mask",
    "s": "torch.arange(input_ids.shape[1]) * 0.1",
    "p": "self.p",
    "r": "self.places[: input_ids.shape[1]]",
    "o": "memory",
    "d": "documents",
}

# `$t` and `$u` are tensors, `$k` and `$j` dims.
UNARY = """
$t.tanh() | $t * 2.5 | $t + 0.5 | -$t | $t.sigmoid() | $t.abs() | $t.square() | $t.clamp(max=0.3)
($t > 0.123) | $t.masked_fill($t > 0.123, 0.7) | torch.where($t > 0.123, $t, 0.25) | $t.detach()
torch.ones_like($t) | torch.zeros_like($t) + 0.5 | $t.new_ones($t.shape) * $t | $t.double()
$t.cos().exp() | $t.transpose($k, $j) | $t.flatten($k, $j) | $t.flatten() | $t.reshape($t.shape[0], -1)
$t.reshape(-1, $t.shape[-1]) | $t.unsqueeze($k) | $t.squeeze($k) | $t.mT | $t.movedim($k, $j)
$t.view(B, S, -1) | $t.view(S, B, -1) | $t.reshape(B * S, -1) | $t.unflatten($k, (B, S))
$t.unflatten($k, (S, B)) | $t.unflatten($k, (S, -1)) | $t.unflatten($k, (2, -1))
$t.unflatten($k, (-1, 2)) | $t.reshape(B, -1) | $t.contiguous().view($t.shape) | $t[:, None] | $t[None]
$t[..., None] | $t[..., 1:] | $t[:, 1:] | $t[:, :-1] | $t[:, :-2] | $t[1:] | $t[..., :3] | $t[:, ::2]
$t[:, -1] | $t[:, 0] | $t[..., -1] | $t[:, -1:] | $t[-1] | $t.narrow($k, 1, 2) | $t.select($k, 1)
$t.sum($k) | $t.sum($k, keepdim=True) | $t.mean($k) | $t.mean($k, keepdim=True) | $t.sum() | $t.mean()
$t.sum(($k, $j)) | $t.mean(($k, $j), keepdim=True) | $t.amax($k) | $t.amax($k, keepdim=True)
$t.amin($k) | $t.logsumexp($k) | $t.var($k) | $t.norm(dim=$k) | $t.cumsum($k) | $t.flip($k)
$t.roll(1, $k) | $t.roll(-2, $k) | $t.softmax($k) | $t.log_softmax($k) | $t.diff(dim=$k)
$t.cummax($k).values | $t.cumprod($k) | $t.repeat_interleave(2, $k) | $t.repeat(2, *[1] * ($t.dim() - 1))
$t.repeat(*[1] * ($t.dim() - 1), 2) | $t.expand(3, *$t.shape) | $t.chunk(2, $k)[0] | $t.chunk(2, $k)[1]
$t.split(3, $k)[0] | $t.unbind($k)[1] | $t.tril() | $t.triu(1) | $t.tile(2) | F.pad($t, (1, 0))
F.pad($t, (0, 0, 1, 0)) | F.pad($t, (0, 0, 1, -1)) | F.pad($t, (0, 2), value=0.5)
F.pad($t, (0, 0, 0, 2)) | self.l($t) | self.n($t) | F.layer_norm($t, ($t.shape[-1],))
F.normalize($t, dim=$k) | F.gelu($t) | $t @ self.l.weight | $t @ self.p
$t.index_select($k, torch.arange(2)) | $t[:, torch.arange(S - 1, -1, -1)] | $t[torch.arange(B), 1]
$t.gather($k, torch.zeros_like($t, dtype=torch.long)) | $t.argmax($k) | $t.sort($k).values
$t.topk(1, $k).values | $t.max($k).values | $t.argsort($k) | (lambda c: c.add_(1))($t.clone())
(lambda c: c.mul_(2.0))($t * 1.5) | self.embed((input_ids + 1) % 13) * $t
torch.einsum('ij...->ji...', $t)
"""
BINARY = """
$t + $u | $t - $u | $t * $u | torch.maximum($t, $u) | torch.where($t > 0.123, $t, $u)
torch.where($u > 0.123, $t, 0.5) | $t.masked_fill($u > 0.123, 0.2) | $t / ($u.abs() + 0.7)
torch.cat([$t, $u], $k) | torch.stack([$t, $u], $k) | torch.cat([$t[:, :1], $u[:, 1:]], 1) | $t @ $u
$t @ $u.mT | $t.mT @ $u | torch.bmm($t, $u.transpose(1, 2)) | F.linear($t, $u) | $t.expand_as($u)
$t.view_as($u) | torch.einsum('b...,b...->b...', $t, $u) | $t[..., None] * $u[..., None, :]
$t.unsqueeze($k) == $u.unsqueeze($j) | $t.addcmul($u, $u) | torch.lerp($t, $u, 0.3) | F.mse_loss($t, $u)
F.cosine_similarity($t, $u, dim=-1) | (lambda c: c.add_($u))($t.clone()) | torch.outer($t, $u)
F.softmax($t @ $u.mT, -1) @ $u
"""
LINES = [line for text in (UNARY, BINARY) for row in text.strip().splitlines() for line in row.split(" | ")]
# Their results jump where values are equal up to rounding.
NEEDS_DISTINCT = re.compile(r"arg|sort|topk|\.max\(|cummax")


class Sizes:
    """The modules that the lines call, with weights of the right shapes."""

    def __init__(self) -> None:
        self.embed, self.l, self.n = torch.nn.Embedding(13, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
        self.p, self.places = torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.randn(64, 8))
        for module in (self.embed, self.l, self.n):
            module.double()
        self.p.data, self.places.data = self.p.data.double(), self.places.data.double()


def is_useful(value: Any) -> bool:
    """Tell whether a value is a tensor that can be compared: small, finite, not empty."""
    if not isinstance(value, Tensor) or value.dim() > 5 or not 0 < value.numel() <= 4000:
        return False
    return not value.is_floating_point() or bool(value.isfinite().all() and (value.abs() < 1e4).all())


def tried(code: str, space: dict[str, Any]) -> Any:
    """Return the value of a line, or None when it does not run on these shapes."""
    try:
        return eval(code, {"torch": torch, "F": F, **space})
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError, Warning):
        return None


@st.composite
def tensor_programs(draw: st.DrawFn) -> Program:
    """Return up to seven operators on random tensors; what no other line reads is returned."""
    given = draw(sizes())
    torch.manual_seed(0)
    format_sizes = {"V": 13, "D": 8, "B": given["batch"], "S": given["length"], "M": given["memory"]}
    space: dict[str, Any] = {name: eval(code.format(**format_sizes), {"torch": torch}) for name, code in INPUTS.items()}
    space |= {"self": Sizes(), "B": given["batch"], "S": given["length"]}
    space |= {name: tried(code, space) for name, code in FIRST.items()}
    names, code = list(FIRST), dict(FIRST)
    # In another order each time: hypothesis repeats itself, and draws the first of a list most often.
    lines_in_order = Random(draw(st.integers(0, 2**24))).sample(LINES, len(LINES))
    choice = st.tuples(
        st.sampled_from(lines_in_order), st.integers(0, 5), st.integers(0, 8), st.integers(-3, 3), st.integers(-3, 3)
    )
    for template, t, u, k, j in draw(st.lists(choice, min_size=2, max_size=16)):
        recent = names[::-1] if len(names) > len(FIRST) else names
        values = {"t": recent[t], "u": recent[u % len(recent)], "k": str(k), "j": str(j)}
        line = Template(template).substitute(values)
        if NEEDS_DISTINCT.search(line) and not is_distinct(space[values["t"]]):
            continue
        value = tried(line, space)
        if is_useful(value) and len(names) < len(FIRST) + 7:
            name = f"t{len(names)}"
            space[name], code[name] = value, line
            names.append(name)
    lines, outputs = needed(names[len(FIRST) :], code)
    assume(any(space[name].requires_grad for name in outputs) and any("input_ids)" in line for line in lines))
    program = Program(setup=SETUP, forward=(*lines, f"return {', '.join(outputs)},"), **given)
    assume(has_gradients(program))
    return program


def is_distinct(value: Tensor) -> bool:
    """Tell whether all elements of a tensor differ by more than rounding."""
    return value.numel() < 2 or bool((value.flatten().double().sort().values.diff() > 1e-9).all())


def needed(names: list[str], code: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the lines that compute the values that nothing else reads, and their names."""
    used = {word for name in names for word in re.findall(r"\b\w+\b", code[name]) if word in code}
    outputs = [name for name in names if name not in used] or ["e"]
    first = [name for name in FIRST if name in used or name in outputs]
    body = [f"{name} = {code[name]}" for name in [*first, *names]]
    is_sized = any(re.search(r"\b[BS]\b", line) for line in body)
    return (["B, S = input_ids.shape"] if is_sized else []) + body, outputs
