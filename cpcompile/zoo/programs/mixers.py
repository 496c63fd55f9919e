"""Mixers: what takes the place of softmax attention: linear attention, state spaces, long convolutions, Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import Sampler
from cpcompile.zoo.programs.chunks import LENGTH, SIZE, chunked
from cpcompile.zoo.programs.decoders import language
from cpcompile.zoo.programs.parts import HEADS, WIDTH, Block, Decoder, join_heads, split_heads
from cpcompile.zoo.programs.registry import Program, program


class Mixer(nn.Module):
    """What mixes tokens by queries, keys and values `[B, H, S, D]`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gates = nn.Linear(WIDTH, 2 * HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        gates = self.gates(x).transpose(1, 2).chunk(2, dim=1)  # [B, H, S] each
        return self.out(join_heads(self.mix(q, k, v, *gates)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        raise NotImplementedError


class LinearAttention(Mixer):
    """Both ways: keys times values over all tokens, then queries times that."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhsd,bhse->bhde", k, v)
        normaliser = torch.einsum("bhsd,bhd->bhs", q, k.sum(dim=2))
        return torch.einsum("bhsd,bhde->bhse", q, state) / normaliser[..., None]


@program("handwritten")
def linear_attention(sampler: Sampler) -> Program:
    return language(Decoder(Block(LinearAttention()), Block(LinearAttention())), sampler)


class CumulativeLinearAttention(Mixer):
    """Causal: a cumulative sum of the products of keys and values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        q, k = F.relu(q) + 0.1, F.relu(k) + 0.1
        state = (k[..., :, None] * v[..., None, :]).cumsum(dim=2)
        normaliser = (q * k.cumsum(dim=2)).sum(-1, keepdim=True)
        return (q[..., None, :] @ state).squeeze(-2) / normaliser


@program("handwritten")
def linear_attention_by_cumsum(sampler: Sampler) -> Program:
    return language(Decoder(Block(CumulativeLinearAttention())), sampler)


class ChunkedLinearAttention(Mixer):
    """Causal in chunks: the states before a chunk by a cumulative sum of chunks, and what is inside by a mask."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (-1, SIZE)) for t in (q * 0.5, k, v))
        states = torch.einsum("bhncd,bhnce->bhnde", k, v).cumsum(dim=2)
        before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], dim=2)
        mask = torch.ones(SIZE, SIZE, dtype=torch.bool, device=q.device).tril()
        inside = (q @ k.transpose(-1, -2)).masked_fill(~mask, 0) @ v
        return (q @ before + inside).flatten(2, 3)


@program("handwritten")
def linear_attention_chunked(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(ChunkedLinearAttention()), Block(ChunkedLinearAttention())), sampler)


class Retention(Mixer):
    """RetNet, in parallel: products of queries and keys times powers of a decay by distance."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2], device=q.device)
        rates = torch.log(1 - 2.0 ** (-2 - torch.arange(HEADS, device=q.device)))
        distance = (steps[:, None] - steps[None, :]).clamp(min=0)
        powers = torch.exp(distance * rates[:, None, None]).tril().to(q.dtype)
        return F.layer_norm((q @ k.transpose(-1, -2) * powers) @ v, (WIDTH // HEADS,))


@program("handwritten")
def retention(sampler: Sampler) -> Program:
    return language(Decoder(Block(Retention()), Block(Retention())), sampler)


def segment_sums(x: Tensor) -> Tensor:
    """Return the sums of `x` between any two places, minus infinity above the diagonal: as Mamba-2's listing has it."""
    length = x.size(-1)
    x = x[..., None].expand(*x.shape, length)
    mask = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool), diagonal=-1)
    sums = torch.cumsum(x.masked_fill(~mask, 0), dim=-2)
    mask = torch.tril(torch.ones(length, length, device=x.device, dtype=torch.bool), diagonal=0)
    return sums.masked_fill(~mask, -torch.inf)


class Mamba2(Mixer):
    """State space duality in chunks; the states of chunks are passed on by the same sums over chunks."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        step = F.softplus(beta)
        q, k, v = (t.unflatten(2, (-1, SIZE)) for t in (q, k, v * step[..., None]))
        rates = (-step * decay.exp().clamp(max=4)).unflatten(2, (-1, SIZE))
        sums = torch.cumsum(rates, dim=-1)
        inside = torch.einsum("bhcln,bhcsn,bhcls,bhcsp->bhclp", q, k, torch.exp(segment_sums(rates)), v)
        states = torch.einsum("bhcln,bhcl,bhclp->bhcpn", k, torch.exp(sums[..., -1:] - sums), v)
        states = torch.cat([torch.zeros_like(states[:, :, :1]), states], dim=2)
        chunk_decay = torch.exp(segment_sums(F.pad(sums[..., -1], (1, 0))))
        states = torch.einsum("bhzc,bhcpn->bhzpn", chunk_decay, states)[:, :, :-1]
        between = torch.einsum("bhcln,bhcpn,bhcl->bhclp", q, states, torch.exp(sums))
        return (inside + between).flatten(2, 3)


@program("handwritten")
def mamba2_chunked(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(Mamba2()), Block(Mamba2())), sampler)


class GatedDelta(Mixer):
    """The gated delta rule: a triangular system inside each chunk, and a loop over chunks that carries the state."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, decay = beta.sigmoid()[..., None], F.logsigmoid(decay)
        q, k, v, scaled = (t.unflatten(2, (-1, SIZE)) for t in (q, k, v * beta, k * beta))
        sums = decay.unflatten(2, (-1, SIZE)).cumsum(-1)
        ratio = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
        upper = torch.ones(SIZE, SIZE, dtype=torch.bool, device=q.device).triu(0)
        system = ((scaled @ k.mT) * ratio).masked_fill(upper, 0)
        inverse = torch.linalg.solve_triangular(
            system + torch.eye(SIZE, device=q.device, dtype=q.dtype),
            torch.eye(SIZE, device=q.device, dtype=q.dtype),
            upper=False,
        )
        new, seen = inverse @ v, inverse @ (scaled * sums.exp()[..., None])
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
        outputs = []
        for n in range(q.shape[2]):
            value = new[:, :, n] - seen[:, :, n] @ state
            inside = (q[:, :, n] @ k[:, :, n].mT * ratio[:, :, n]).tril() @ value
            outputs.append((q[:, :, n] * sums[:, :, n, :, None].exp()) @ state + inside)
            last = sums[:, :, n, -1, None]
            carried = k[:, :, n] * (last - sums[:, :, n]).exp()[..., None]
            state = state * last[..., None].exp() + carried.mT @ value
        return torch.stack(outputs, dim=2).flatten(2, 3)


@program("handwritten")
def gated_delta_chunked(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(GatedDelta())), sampler)


class Hyena(nn.Module):
    """A gated convolution as long as the text, by Fourier transforms; its filter is a network of the position."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.short = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH)
        self.filter, self.bias = (
            nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, WIDTH)),
            nn.Parameter(torch.randn(WIDTH)),
        )

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        a, b, v = self.short(self.project(x).transpose(1, 2))[..., :length].chunk(3, dim=1)
        t = torch.linspace(0, 1, length, device=x.device, dtype=x.dtype)[:, None]
        kernel = self.filter(torch.cat([t, (6.28 * t).sin(), (6.28 * t).cos()], dim=-1)) * torch.exp(-3 * t)
        u = v * b
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel.T, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + u * self.bias[:, None]
        return self.out((y * a).transpose(1, 2))


@program("handwritten")
def hyena(sampler: Sampler) -> Program:
    return language(Decoder(Block(Hyena()), Block(Hyena())), sampler)


class Fourier(nn.Module):
    """FNet: the real part of the transform along tokens and along the width."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real / 4


@program("handwritten")
def fnet(sampler: Sampler) -> Program:
    return language(Decoder(Block(Fourier()), Block(Fourier())), sampler)


class MinGRU(nn.Module):
    """A gated unit whose gates do not read its state, by a parallel scan in logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.project(x).chunk(2, dim=-1)
        decays, values = (
            -F.softplus(gate),
            -F.softplus(-gate) + torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden)),
        )
        sums = decays.cumsum(dim=1)
        return self.out((sums + (values - sums).logcumsumexp(dim=1)).exp())


@program("handwritten")
def mingru(sampler: Sampler) -> Program:
    return language(Decoder(Block(MinGRU()), Block(MinGRU())), sampler)


class RWKV(nn.Module):
    """Token shift, and a weighted mean over the past with one decay for each channel, as a table of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.decay = nn.Parameter(torch.rand(3, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.key, self.value, self.gate = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shifted = F.pad(x, (0, 0, 1, -1))
        xk, xv, xr = (x * m + shifted * (1 - m) for m in self.mix)
        k, v, r = self.key(xk), self.value(xv), self.gate(xr).sigmoid()
        steps = torch.arange(x.shape[1], device=x.device)
        distance = (steps[:, None] - steps[None, :]).clamp(min=0)
        powers = (
            torch.exp(-F.softplus(self.decay) * distance[..., None]) * (steps[:, None] >= steps[None, :])[..., None]
        )
        weights = k.clamp(max=30).exp()
        top = torch.einsum("ijd,bjd->bid", powers, weights * v)
        return r * top / torch.einsum("ijd,bjd->bid", powers, weights)


@program("handwritten")
def rwkv_parallel(sampler: Sampler) -> Program:
    return language(Decoder(Block(RWKV()), Block(RWKV())), sampler)


class Selective(nn.Module):
    """Mamba as a listing: a causal convolution, then a loop over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, padding=3, groups=WIDTH)
        self.parameters_of, self.rates = nn.Linear(WIDTH, 1 + 2 * 4), nn.Parameter(torch.randn(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, gate = self.project(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        step, b, c = self.parameters_of(u).split([1, 4, 4], dim=-1)
        step = F.softplus(step)[..., None]
        decay, given = torch.exp(-step * self.rates.exp()), step * b[:, :, None, :] * u[..., None]
        state, outputs = torch.zeros_like(given[:, 0]), []
        for t in range(length):
            state = decay[:, t] * state + given[:, t]
            outputs.append((state * c[:, t, None, :]).sum(-1))
        return self.out(torch.stack(outputs, dim=1) * F.silu(gate))


@program("handwritten")
def mamba_in_a_loop(sampler: Sampler) -> Program:
    inputs = {"input_ids": sampler.tokens(11), "labels": sampler.labels(11)}
    return Program(Decoder(Block(Selective())), inputs)


class TokenMixer(nn.Module):
    """MLP-Mixer and gMLP: a product along the tokens, of a fixed number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.gate = nn.Linear(LENGTH, LENGTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x.transpose(1, 2)).transpose(1, 2) * F.gelu(self.gate(x))


@program("handwritten")
def token_mixer(sampler: Sampler) -> Program:
    return chunked(Decoder(Block(TokenMixer()), Block(TokenMixer())), sampler)


class Toeplitz(nn.Module):
    """Synthesizer and Toeplitz networks: weights that depend on places only, learned, causal, a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.value = nn.Parameter(torch.randn(64, 64)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = self.weights[:length, :length].masked_fill(hidden, float("-inf")).softmax(-1)
        return weights @ self.value(x)


@program("handwritten")
def synthesizer(sampler: Sampler) -> Program:
    return language(Decoder(Block(Toeplitz()), Block(Toeplitz())), sampler)


class AttentionFree(nn.Module):
    """AFT: exponentials of keys, weighed by learned biases of pairs of places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        pairs = torch.exp(self.bias[:length, :length]).tril()
        k = torch.exp(k - k.amax(dim=1, keepdim=True))
        return q.sigmoid() * (pairs @ (k * v)) / (pairs @ k)


@program("handwritten")
def attention_free(sampler: Sampler) -> Program:
    return language(Decoder(Block(AttentionFree()), Block(AttentionFree())), sampler)
