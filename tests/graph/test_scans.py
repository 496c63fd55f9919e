"""Recurrences and convolutions along sharded tokens, as models write them: in chunks, in logarithms, in loops, by strides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

import cpcompile
from cpcompile.errors import NoRule

WIDTH, HEADS, CHUNK = 8, 2, 4


class Model(nn.Module):
    """An embedding, a mixer of `[B, S, D]`, and the loss of the next token."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed, self.mixer, self.head = nn.Embedding(17, WIDTH), mixer, nn.Linear(WIDTH, 17)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        logits = self.head(x + self.mixer(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def segment_sums(x: Tensor) -> Tensor:
    """Return the sums of `x` between any two places, minus infinity above the diagonal."""
    length = x.size(-1)
    x = x[..., None].expand(*x.size(), length)
    below = torch.tril(torch.ones(length, length, dtype=torch.bool), diagonal=-1)
    sums = torch.cumsum(x.masked_fill(~below, 0), dim=-2)
    return sums.masked_fill(~torch.tril(torch.ones(length, length, dtype=torch.bool)), -torch.inf)


class StateSpace(nn.Module):
    """Mamba-2 in padded chunks: states of chunks are passed on by a product with all sums of decays."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 4 * WIDTH + HEADS), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 4, padding=3, groups=3 * WIDTH)
        self.skip = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        gate, mixed, step = self.project(x).split([WIDTH, 3 * WIDTH, HEADS], dim=-1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[:, :, :length].transpose(1, 2))
        v, b, c = (t.reshape(batch, length, HEADS, -1) for t in mixed.split(WIDTH, dim=-1))
        step, pad = F.softplus(step), (CHUNK - length % CHUNK) % CHUNK
        skipped = self.skip[..., None] * F.pad(v, (0, 0, 0, 0, 0, pad))

        def in_chunks(t: Tensor) -> Tensor:
            t = F.pad(t, (0, 0, 0, 0, 0, pad) if t.dim() == 4 else (0, 0, 0, pad))
            return t.reshape(batch, -1, CHUNK, *t.shape[2:])

        v, a, b, c = (in_chunks(t) for t in (v * step[..., None], -step, b, c))
        a = a.permute(0, 3, 1, 2)
        sums = a.cumsum(-1)
        scores = torch.einsum("bclhn,bcshn->bclsh", c, b) * segment_sums(a).exp().permute(0, 2, 3, 4, 1)
        inside = torch.einsum("bclsh,bcshp->bclhp", scores, v)
        carried = b * (sums[:, :, :, -1:] - sums).exp().permute(0, -2, -1, 1)[..., None]
        states = torch.einsum("bclhn,bclhp->bchpn", carried, v)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
        decay = segment_sums(F.pad(sums[:, :, :, -1], (1, 0))).exp().transpose(1, 3)
        states = torch.einsum("bzch,bzhpn->bchpn", decay, states)[:, :-1]
        before = torch.einsum("bclhn,bchpn->bclhp", c, states) * sums.exp().permute(0, 2, 3, 1)[..., None]
        y = (inside + before).contiguous().reshape(batch, -1, HEADS, WIDTH // HEADS) + skipped
        if pad > 0:
            y = y[:, :length]
        return self.out(y.flatten(2) * F.silu(gate))


class GatedDelta(nn.Module):
    """The gated delta rule in padded chunks: a triangular system inside of each, and a loop that carries the state.

    A state that is kept in bounds is not linear in the one before.
    """

    def __init__(self, is_bounded: bool = False) -> None:
        super().__init__()
        self.is_bounded = is_bounded
        self.qkv, self.gates, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 2 * HEADS),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous() for t in self.qkv(x).chunk(3, dim=-1))
        decay, beta = self.gates(x).transpose(1, 2).chunk(2, dim=1)
        q, k, decay, beta = F.normalize(q, dim=-1), F.normalize(k, dim=-1), F.logsigmoid(decay), beta.sigmoid()
        pad = (CHUNK - length % CHUNK) % CHUNK
        q, k, v = (F.pad(t, (0, 0, 0, pad)) for t in (q, k, v))
        decay, beta = (F.pad(t, (0, pad)) for t in (decay, beta))
        scaled = [t * beta.unsqueeze(-1) for t in (v, k)]
        q, k, v, w = (t.reshape(batch, HEADS, -1, CHUNK, t.shape[-1]) for t in (q, k, *scaled))
        sums = decay.reshape(batch, HEADS, -1, CHUNK).cumsum(-1)
        above = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
        ratio = (sums.unsqueeze(4) - sums.unsqueeze(3)).masked_fill(above, float("-inf")).exp()
        system, scores = (w @ k.transpose(-1, -2)) * ratio, (q @ k.transpose(-1, -2)) * ratio
        new = torch.linalg.solve_triangular(system, v, upper=False, unitriangular=True)
        seen = torch.linalg.solve_triangular(system, w * sums.exp().unsqueeze(-1), upper=False, unitriangular=True)
        state, y = torch.zeros(batch, HEADS, q.shape[-1], v.shape[-1], dtype=v.dtype), torch.zeros_like(new)
        q = q * sums.exp().unsqueeze(-1)
        k = k * (sums[..., -1:] - sums).exp().unsqueeze(-1)
        last = sums[..., -1].exp()[..., None, None]
        for i in range((length + pad) // CHUNK):
            value = new[:, :, i] - seen[:, :, i] @ state
            y[:, :, i] = q[:, :, i] @ state + scores[:, :, i] @ value
            state = state * last[:, :, i] + k[:, :, i].transpose(-1, -2) @ value
            state = state.tanh() if self.is_bounded else state
        y = y.reshape(batch, HEADS, -1, v.shape[-1])[:, :, :length]
        return self.out(y.transpose(1, 2).flatten(2))


class Frames(nn.Module):
    """A stem of strided convolutions that overlap, on embedded tokens, then attention-free mixing of the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.stem = nn.ModuleList(
            [nn.Conv1d(WIDTH, WIDTH, 3, stride=2), nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)]
        )
        self.last = nn.Conv1d(WIDTH, WIDTH, 5, stride=3, dilation=2, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(1, 2)
        for layer in self.stem:
            h = F.gelu(layer(h))
        h = h + h.cumsum(-1)
        return self.out(self.last(h).transpose(1, 2)).pow(2).mean()


class Pools(nn.Module):
    """Pools whose windows overlap, every second token, sorted channels, and norms over all tokens of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.norm = nn.InstanceNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        h = h + h.sort(dim=1).values
        short = F.max_pool1d(h.transpose(1, 2), 3, 2, 1).transpose(1, 2)
        short = self.out(short)
        return self.out(h).pow(2).mean() + short.pow(2).mean() + self.out(h[:, 1::2]).exp().mean()


class Packed(nn.Module):
    """Convolutions, a scan and chunks between attentions that keep documents apart; the layout follows these."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(17, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.conv, self.space = nn.Conv1d(WIDTH, WIDTH, 3, padding=2), StateSpace()
        self.frames, self.head = nn.Conv1d(WIDTH, WIDTH, 3, stride=2), nn.Linear(WIDTH, 17)

    def forward(self, input_ids: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
        x, length = self.embed(input_ids), input_ids.shape[1]
        mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        for _ in range(2):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = x + F.silu(self.conv(x.mT)[..., :length]).mT
        x = x + self.space(x)
        loss = F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss + self.frames(x.mT).pow(2).mean()


def packed(length: int) -> dict[str, Tensor]:
    starts = torch.tensor([[0, 5, 6, 17], [0, 11, 12, 19]])
    documents = (torch.arange(length)[None, :, None] >= starts[:, None]).sum(-1)
    tokens = text(length)
    return {**tokens, "labels": tokens["labels"].clone(), "documents": documents}


def floats(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(shape, dtype=torch.float64)}


class MinGRU(nn.Module):
    """A scan in logarithms that begins with a state, as the package minGRU-pytorch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first = nn.Parameter(torch.rand(1, 1, WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.project(x).chunk(2, dim=-1)
        decays = -F.softplus(gate)
        values = -F.softplus(-gate) + torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
        values = torch.cat((self.first.expand(x.shape[0], -1, -1).log(), values), dim=1)
        decays = F.pad(decays, (0, 0, 1, 0))
        sums = decays.cumsum(dim=1)
        states = (sums + (values - sums).logcumsumexp(dim=1)).exp()[:, -x.shape[1] :]
        return self.out(states) * states[:, -1:]


class Associative(nn.Module):
    """A recurrence by torch's associative scan; paths of whole rows are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.project(x).chunk(2, dim=-1)

        def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, states = associative_scan(combine, (gate.sigmoid(), value), 1, combine_mode="generic")
        kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5).div_(0.5)
        return self.out(states) * kept


class Selective(nn.Module):
    """Mamba as a listing: a causal convolution, then a loop over the tokens, of which one value has no channels."""

    def __init__(self, is_bounded: bool = False) -> None:
        super().__init__()
        self.is_bounded = is_bounded
        self.project, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, padding=3, groups=WIDTH)
        self.gates, self.rates = nn.Linear(WIDTH, 1 + 2 * 3), nn.Parameter(torch.randn(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, gate = self.project(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        step, b, c = self.gates(u).split([1, 3, 3], dim=-1)
        step = F.softplus(step)[..., None]
        decay, given = torch.exp(-step * self.rates.exp()), step * b[:, :, None, :] * u[..., None]
        state, outputs = torch.zeros_like(given[:, 0]), torch.zeros_like(u)
        for t in range(length):
            state = decay[:, t] * state + given[:, t]
            state = state.tanh() if self.is_bounded else state
            outputs[:, t] = (state * c[:, t, None, :]).sum(-1)
        return self.out(outputs * F.silu(gate))


class KeepsState(nn.Module):
    """Keeps the state `[B, heads, D]` that its loop leaves, and begins with it the next time."""

    def __init__(self, is_bounded: bool) -> None:
        super().__init__()
        self.is_bounded, self.state = is_bounded, None
        self.gate, self.value, self.queries = (nn.Linear(WIDTH, n) for n in (HEADS, HEADS * WIDTH, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate(x).sigmoid()[..., None], self.value(x).unflatten(-1, (HEADS, WIDTH))
        state = torch.zeros_like(value[:, 0]) if self.state is None else self.state
        y = torch.zeros_like(value)
        for t in range(x.shape[1]):
            state = gate[:, t] * state + value[:, t]
            state = state.tanh() if self.is_bounded else state
            y[:, t] = state
        self.state = state
        return (y * self.queries(x)[..., None]).sum(-2)


class Delta(nn.Module):
    """The gated delta rule token by token, in products and sums, from a state that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gates = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * HEADS)
        self.out, self.first = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(HEADS, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        decay, beta = self.gates(x).sigmoid().transpose(1, 2).chunk(2, dim=1)
        k, y = F.normalize(k, dim=-1), torch.zeros_like(v)
        state = self.first.expand(x.shape[0], -1, -1, -1)
        for t in range(x.shape[1]):
            state = state * decay[:, :, t, None, None]
            read = (state * k[:, :, t, :, None]).sum(-2)
            state = state + k[:, :, t, :, None] * ((v[:, :, t] - read) * beta[:, :, t, None])[:, :, None]
            y[:, :, t] = (state * q[:, :, t, :, None]).sum(-2)
        return self.out(y.transpose(1, 2).flatten(2))


class Rotations(nn.Module):
    """A memory `[values, keys]` that matrices multiply from the right, fed by a momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        memory, change, y = x.new_zeros(x.shape[0], WIDTH, WIDTH), x.new_zeros(x.shape[0], WIDTH, WIDTH), []
        for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True):
            change = 0.5 * change + torch.einsum("bv,bk->bvk", v_t, k_t)
            memory = memory @ self.mix + change
            y.append(torch.einsum("bvk,bk->bv", memory, q_t))
        return torch.stack(y, dim=1)


class Oscillators(nn.Module):
    """Real and imaginary parts that depend on each other, from a state that the text has."""

    def __init__(self) -> None:
        super().__init__()
        self.angle, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        angle, real, imaginary, y = self.angle(x), x.mean(1), torch.zeros_like(x[:, 0]), []
        average = [x[:, 0]]
        for t in range(1, x.shape[1]):
            average.append(0.9 * average[-1] + 0.1 * x[:, t])
        x = torch.stack(average, dim=1)
        cos, sin = 0.9 * angle.cos(), 0.9 * angle.sin()
        for t in range(x.shape[1]):
            a, b = cos[:, t], sin[:, t]
            real, imaginary = a * real - b * imaginary + x[:, t], b * real + a * imaginary
            y.append(torch.cat([real, imaginary], dim=-1))
        return self.out(torch.stack(y, dim=1))


class Filters(nn.Module):
    """Three states by calls that are several sums and products each; where the text has no word, they stay as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.mix, self.given = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, k, v, u = self.project(x).chunk(4, dim=-1)
        gate, is_word = gate.sigmoid(), u[..., :1] > -0.5
        slow, mixed, fed = (torch.zeros_like(k[:, 0]) for _ in range(3))
        y = []
        for t in range(x.shape[1]):
            slow = torch.where(is_word[:, t], torch.lerp(slow, v[:, t], gate[:, t]), slow)
            mixed = torch.addcmul(self.mix(mixed) * 0.5, k[:, t], v[:, t], value=0.5)
            fed = torch.addcdiv(
                torch.add(v[:, t], torch.addmm(u[:, t], fed, self.given), alpha=0.5), slow, 2 + gate[:, t]
            )
            y.append(torch.cat([torch.sub(slow, k[:, t], alpha=2), mixed, fed], dim=-1))
        return self.out(torch.stack(y, dim=1))


class Patches(nn.Module):
    """A convolution whose kernel each token makes, as ConvBERT has it: patches of tokens by `F.unfold`."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.value = nn.Linear(WIDTH, HEADS * 5), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x).reshape(-1, 5, 1).softmax(1)
        value = self.value(x).transpose(1, 2).contiguous().unsqueeze(-1)
        value = F.unfold(value, [5, 1], dilation=1, padding=[2, 0], stride=1).transpose(1, 2)
        value = value.reshape(-1, WIDTH // HEADS, 5) @ kernel
        return value.reshape(x.shape)


def text(length: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, 17, (2, length))
    return {"input_ids": tokens, "labels": tokens}


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], dict[str, Any]]

X = {"token_dims": {"x": 1}}

PROGRAMS: dict[str, Case] = {
    "mingru": (lambda: Model(MinGRU()), lambda: text(13), {}),
    "associative": (lambda: Model(Associative()), lambda: text(7), {"exact_dropout": True}),
    "loop": (lambda: Model(Selective()), lambda: text(7), {}),
    "delta": (lambda: Model(Delta()), lambda: text(7), {}),
    "rotations": (lambda: Model(Rotations()), lambda: text(7), {}),
    "oscillators": (lambda: Model(Oscillators()), lambda: text(7), {}),
    "filters": (lambda: Model(Filters()), lambda: text(7), {}),
    "bounded loop": (lambda: Model(Selective(is_bounded=True)), lambda: text(7), {}),
    "patches": (lambda: Model(Patches()), lambda: text(13), {}),
    "packed": (Packed, lambda: packed(23), {"token_dims": {"input_ids": 1, "labels": 1, "documents": 1}}),
    "frames": (Frames, lambda: floats(2, 41, 4), X),
    "pools": (Pools, lambda: floats(2, 23, 4), X),
    "state space": (lambda: Model(StateSpace()), lambda: text(22), {}),
    "gated delta": (lambda: Model(GatedDelta()), lambda: text(22), {}),
    "bounded gated delta": (lambda: Model(GatedDelta(is_bounded=True)), lambda: text(22), {}),
    "bounded gated delta, many chunks": (lambda: Model(GatedDelta(is_bounded=True)), lambda: text(75), {}),
}


QUICK = {
    "state space",
    "gated delta",
    "loop",
    "delta",
    "rotations",
    "oscillators",
    "filters",
    "bounded loop",
    "frames",
    "pools",
}
SETTINGS = [(2, "zig_zag"), (3, "contiguous"), (4, "zig_zag"), (3, "balanced")]
# Programs that need the layout of the inputs, since loops run by channels or in chunks, or tokens are joined; what is refused.
NOT_BY_DOCUMENTS = {
    "mingru": "torch.cat",
    "bounded loop": "aten.mul.Tensor",
    "bounded gated delta": "solve_triangular",
    "bounded gated delta, many chunks": "solve_triangular",
}
CASES = [
    pytest.param(
        name,
        *setting,
        marks=[] if name in QUICK and setting == SETTINGS[0] else [pytest.mark.slow],
        id=f"{name}-{setting}",
    )
    for name in PROGRAMS
    for setting in SETTINGS
    if setting[1] != "balanced" or name not in NOT_BY_DOCUMENTS
]


@pytest.mark.parametrize(("name", "world_size", "layout"), CASES)
def test_exact(name: str, world_size: int, layout: str) -> None:
    make, inputs, options = PROGRAMS[name]
    torch.manual_seed(0)
    found = cpcompile.verify(
        make().double(), inputs(), world_size=world_size, dtype=torch.float64, balancer=layout, dynamic=False, **options
    )
    found.raise_if_wrong()


@pytest.mark.parametrize("mixer", [StateSpace, GatedDelta])
def test_what_travels_does_not_depend_on_the_length(mixer: type[nn.Module]) -> None:
    """With chunks that ranks share evenly, so that no tokens travel to the rank of their chunk."""
    torch.manual_seed(0)
    model = Model(mixer())
    found = [cpcompile.explain(model, text(n), world_size=2, balancer="contiguous", dynamic=False) for n in (24, 32)]
    short, long = ([c for c in each.collectives if c.operator != "cp.rearrange_tokens"] for each in found)
    assert short == long
    state = 2 * HEADS * (WIDTH // HEADS) ** 2 * 4  # bytes of float32
    product = 2 * HEADS * 4 if mixer is StateSpace else state
    numbers_of_chunks = 8
    sent = {c.operator: c.forward_bytes for c in long}
    assert sent["cp.stack_ranks"] == state + product + numbers_of_chunks
    assert sent["cp.move_tokens"] == state


@pytest.mark.parametrize("mixer", [Delta, Rotations, Oscillators, Filters])
def test_loops_over_tokens_pass_on_states_only(mixer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Model(mixer())
    found = [cpcompile.explain(model, text(n), world_size=2, balancer="contiguous", dynamic=False) for n in (6, 8)]
    short, long = (each.collectives for each in found)
    assert short == long
    assert "cp.stack_ranks" in {c.operator for c in long}


def test_states_pass_in_the_order_of_the_row_under_a_layout_of_documents() -> None:
    torch.manual_seed(0)
    model = Packed()
    model.space = Oscillators()
    named = {"token_dims": {"input_ids": 1, "labels": 1, "documents": 1}, "dynamic": False}
    found = cpcompile.verify(
        model.double(), packed(11), world_size=3, dtype=torch.float64, balancer="balanced", **named
    )
    found.raise_if_wrong()
    with pytest.raises(NoRule, match=r"(?s)knows no documents.*Use balancer='zig_zag' or 'contiguous'"):
        cpcompile.explain(Packed(), packed(11), world_size=2, balancer="balanced", **named)


@pytest.mark.parametrize("name", [x for x in NOT_BY_DOCUMENTS if "many chunks" not in x])
def test_what_needs_the_layout_of_the_inputs_is_refused_with_the_remedy(name: str) -> None:
    make, inputs, _ = PROGRAMS[name]
    with pytest.raises(NoRule, match=f"(?s){NOT_BY_DOCUMENTS[name]}.*Use balancer='zig_zag' or 'contiguous'"):
        cpcompile.explain(make(), inputs(), world_size=2, balancer="balanced", dynamic=False)


def averages(key: Tensor, value: Tensor) -> Tensor:
    """Divide a state by the sum of what it was made of."""
    state, total, y = torch.zeros_like(key[:, 0]), torch.zeros_like(key[:, 0]), []
    for t in range(key.shape[1]):
        state, total = 0.9 * state + key[:, t] * value[:, t], 0.9 * total + key[:, t]
        y.append(state / total)
    return torch.stack(y, dim=1)


def averages_by_matrix(key: Tensor, value: Tensor) -> Tensor:
    both = torch.stack([key * value, key], dim=-1)
    mix = torch.full((WIDTH, WIDTH), 0.1, dtype=key.dtype)
    state, y = torch.zeros_like(both[:, 0]), []
    for t in range(key.shape[1]):
        state = mix @ state + both[:, t]
        y.append(state[..., 0] / state[..., 1])
    return torch.stack(y, dim=1)


def averages_by_sums(key: Tensor, value: Tensor) -> Tensor:
    return (key * value).cumsum(1) / key.cumsum(1)


def shares_of_sums(key: Tensor, value: Tensor) -> Tensor:
    return value * (key - key.logcumsumexp(1)).exp() / key.cummax(1).values


class Divided(nn.Module):
    """A mixer of all tokens but the first one that has no meaning for a state of 0."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.project, self.out = mix, nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.project(x[:, 1:]).chunk(2, dim=-1)
        return F.pad(self.out(self.mix(key.exp(), value)), (0, 0, 1, 0))


@pytest.mark.parametrize("mix", [averages, averages_by_matrix, averages_by_sums, shares_of_sums])
def test_slots_without_a_token_hold_a_state_that_a_token_may_have(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A quotient of zeros in a slot that no token has would make gradients of weights NaN."""
    torch.manual_seed(0)
    model = Model(Divided(mix)).double()
    cpcompile.verify(model, text(4), world_size=3, dtype=torch.float64, dynamic=False).raise_if_wrong()


class Reset(nn.Module):
    """A loop whose state a number takes the place of, here and there."""

    def __init__(self, number: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.number = nn.Embedding(16, 4), number

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        state, states = torch.zeros_like(x[:, 0]), []
        for i in range(x.shape[1]):
            state = torch.where(x[:, i] > 1, self.number, 0.9 * state + x[:, i])
            states.append(state)
        return torch.stack(states, 1).exp().sum()


@pytest.mark.parametrize("number", [0.5, -math.inf])
def test_a_number_takes_the_place_of_a_state(number: float) -> None:
    """Infinity times 0 is no number, so that a sum of both sides would not be what a choice between them is."""
    ids = torch.arange(24).view(2, 12) % 16
    cpcompile.verify(
        Reset(number), {"input_ids": ids}, world_size=3, dtype=torch.float64, dynamic=False
    ).raise_if_wrong()
