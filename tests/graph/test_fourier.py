"""Fourier transforms along the tokens are exact: a rank has all tokens of some channels, and nothing is gathered."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile

WIDTH, LONGEST = 8, 32
Function = Callable[["Mixed", Tensor], Tensor]


class Mixed(nn.Module):
    """Mixes hidden states along the tokens by a function, and projects what comes out to a number."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 3)
        self.gate, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.filter = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, WIDTH))
        self.kernel, self.decay = nn.Parameter(torch.randn(WIDTH, LONGEST)), nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("positions", torch.rand(1, LONGEST, 3))
        self.function = function

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.function(self, self.embedding(input_ids).tanh()).pow(2).sum()


def convolved(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve `[..., S]` causally with a kernel of as many tokens."""
    tokens = u.shape[-1]
    spectrum = torch.fft.rfft(u, n=2 * tokens) * torch.fft.rfft(kernel, n=2 * tokens)
    return torch.fft.irfft(spectrum, n=2 * tokens)[..., :tokens]


def fnet(m: Mixed, x: Tensor) -> Tensor:
    return m.out(m.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real))


def fnet_in_one(m: Mixed, x: Tensor) -> Tensor:
    """Two layers, as transformers writes them."""
    for _ in range(2):
        x = m.norm(x + torch.fft.fftn(x.to(torch.complex128), dim=(1, 2)).real)
    return m.out(x)


def hyena(m: Mixed, x: Tensor) -> Tensor:
    """A filter of the positions by a small network, gates before and behind."""
    tokens = x.shape[1]
    time = torch.arange(tokens, device=x.device)[:, None] / tokens
    kernel = m.filter(m.get_buffer("positions")[:, :tokens])[0] * torch.exp(-time * m.decay)
    u = (x * m.gate(x)).mT
    return m.out((convolved(u, kernel.mT) + u * m.decay[:, None]).mT * x)


def of_heads(m: Mixed, x: Tensor) -> Tensor:
    """The channels in groups; one kernel for the channels of two groups."""
    u = x.unflatten(-1, (2, 4)).permute(0, 2, 3, 1)
    return m.out(convolved(u, m.kernel[:4, : x.shape[1]]).permute(0, 3, 1, 2).flatten(2))


def autocorrelation(m: Mixed, x: Tensor) -> Tensor:
    q, k = (torch.fft.rfft(t.mT) for t in (x, m.gate(x)))
    return m.out(torch.fft.irfft(q * k.conj(), n=x.shape[1]).mT * x)


def filtered(m: Mixed, x: Tensor) -> Tensor:
    """A filter of frequencies in both dims."""
    y = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * m.decay[:5]
    return m.out(x + torch.fft.irfft2(y, s=(x.shape[1], WIDTH), dim=(1, 2), norm="ortho"))


def low_frequencies(m: Mixed, x: Tensor) -> Tensor:
    y = torch.fft.fftshift(torch.fft.fft(x, dim=1), dim=1)
    kept = torch.fft.fftshift(torch.fft.fftfreq(x.shape[1])).abs() < 0.3
    return m.out(torch.fft.ifft(torch.fft.ifftshift(y * kept[:, None], dim=1), dim=1).real)


def rows_are_channels(m: Mixed, x: Tensor) -> Tensor:
    """There is nothing but the batch to exchange for tokens: some ranks have no row."""
    return m.out(x * torch.fft.fft(x.sum(-1)).real[..., None])


def of_the_spectrum(m: Mixed, x: Tensor) -> Tensor:
    """Frequencies are as many as no sequence has; their sum over all needs no tokens."""
    return torch.fft.rfft(x, dim=1).abs()


def scanned(m: Mixed, x: Tensor) -> Tensor:
    """Chunks are scanned; a layout that follows documents has none, so that channels are."""
    decay = -F.softplus(m.gate(x)).cumsum(1)
    return m.out((decay + (x - decay).logcumsumexp(1)).exp() + x.cummax(1).values)


FUNCTIONS = [
    fnet,
    fnet_in_one,
    hyena,
    of_heads,
    autocorrelation,
    filtered,
    low_frequencies,
    rows_are_channels,
    of_the_spectrum,
]
SETTINGS = [(2, "zig_zag", 9, True), (3, "contiguous", 8, False), (4, "zig_zag", 11, True), (3, "balanced", 11, True)]


def ids(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(16, (2, length), generator=torch.Generator().manual_seed(length))}


@pytest.mark.parametrize(
    ("function", "at"), [(f, i % 4) for i, f in enumerate(FUNCTIONS)] + [(hyena, 3), (fnet, 3), (scanned, 3)]
)
def test_exact(function: Function, at: int) -> None:
    world_size, layout, length, dynamic = SETTINGS[at]
    model = Mixed(function).double()
    options = {"world_size": world_size, "balancer": layout, "dynamic": dynamic}
    cpcompile.verify(model, ids(length), dtype=torch.float64, tolerance=1e-12, **options).raise_if_wrong()


def test_fewer_channels_than_ranks() -> None:
    cpcompile.verify(Mixed(fnet).double(), ids(21), world_size=16, dtype=torch.float64).raise_if_wrong()


@pytest.mark.parametrize(("function", "count"), [(fnet, 2), (hyena, 2), (autocorrelation, 3), (filtered, 2)])
def test_only_exchanges_travel(function: Function, count: int) -> None:
    """There and back, whatever is in between."""
    plan = cpcompile.explain(Mixed(function).double(), ids(16), world_size=2)
    sent = {c.operator: c for c in plan.collectives if c.operator != "cp.all_reduce"}
    assert set(sent) == {"cp.exchange_dims"} and not plan.gathered
    assert sent["cp.exchange_dims"].calls == count
    if function is hyena:  # half of 8 channels of 8 tokens and 2 rows in float64, twice
        assert {sent["cp.exchange_dims"].forward_bytes, sent["cp.exchange_dims"].backward_bytes} == {2 * 2 * 8 * 4 * 8}


def test_frequencies_are_tokens_of_another_sequence() -> None:
    model = Mixed(lambda m, x: m.out(torch.fft.rfft(x, dim=1).abs())).double()
    cpcompile.verify(model, ids(16), world_size=2, dtype=torch.float64, dynamic=False).raise_if_wrong()


def test_outputs_hold_tokens() -> None:
    class Spectrum(Mixed):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.fft.fft(self.embedding(input_ids), dim=1).real

    model = Spectrum(fnet).double()
    cpcompile.verify(model, ids(11), world_size=3, dtype=torch.float64, tolerance=1e-11).raise_if_wrong()


def test_token_local_module_gets_tokens() -> None:
    @cpcompile.token_local
    def sorted_rows(x: Tensor) -> Tensor:
        order = x[..., 0].flatten().argsort()
        return torch.zeros_like(x.flatten(0, 1)).index_add(0, order, x.flatten(0, 1)[order].tanh()).view(x.shape)

    model = Mixed(lambda m, x: m.out(sorted_rows(torch.fft.fft(x, dim=1).real))).double()
    cpcompile.verify(model, ids(11), world_size=3, dtype=torch.float64).raise_if_wrong()


def test_dropout_along_channels() -> None:
    model = Mixed(lambda m, x: m.out(x + F.dropout(torch.fft.fft(x, dim=1).real, 0.5))).double()
    options = {"world_size": 3, "exact_dropout": True, "dtype": torch.float64}
    cpcompile.verify(model, ids(11), **options).raise_if_wrong()
