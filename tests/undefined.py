"""Models that divide by rows of tokens, take their logarithm or look up by them: no token's row is 0, but padding's is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile

WIDTH, VOCABULARY = 4, 32


class Rows(nn.Module):
    """An embedding, one step that mixes tokens, and a loss in which no mask hides anything."""

    def __init__(self, step: Callable[[Rows, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.last, self.q, self.k = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.taps = nn.Parameter(torch.randn(WIDTH, 1, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.embedding(input_ids))
        return self.last(self.step(self, x)).square().mean()


def by_sum(y: Tensor) -> Tensor:
    return y / y.abs().sum(-1, keepdim=True)


def attended(model: Rows, x: Tensor, *, is_causal: bool) -> Tensor:
    q, k, v = (t.unsqueeze(1) for t in (model.q(x), model.k(x), x))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).squeeze(1)


def embedding(model: Rows, x: Tensor) -> Tensor:
    return by_sum(x)


def roll(model: Rows, x: Tensor) -> Tensor:
    y = x.roll(1, 1)
    return y / y.norm(dim=-1, keepdim=True)


def flip(model: Rows, x: Tensor) -> Tensor:
    return x * x.flip(1).abs().pow(-0.5)


def causal_attention(model: Rows, x: Tensor) -> Tensor:
    return by_sum(attended(model, x, is_causal=True))


def attention(model: Rows, x: Tensor) -> Tensor:
    return x * attended(model, x, is_causal=False).square().sum(-1, keepdim=True).rsqrt()


def causal_convolution(model: Rows, x: Tensor) -> Tensor:
    return by_sum(F.conv1d(F.pad(x.mT, (2, 0)), model.taps, groups=WIDTH).mT)


def joined(model: Rows, x: Tensor) -> Tensor:
    first = model.taps[:, 0, 0].expand(x.shape[0], 1, WIDTH)
    return by_sum(torch.cat([first, x[:, :-1]], 1))


@cpcompile.token_local
def of_rows(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def token_local(model: Rows, x: Tensor) -> Tensor:
    return of_rows(x.roll(1, 1).flatten(0, 1)).view(x.shape)


def softmax_of_tokens(model: Rows, x: Tensor) -> Tensor:
    return x.softmax(1).log()


def recurrence(model: Rows, x: Tensor) -> Tensor:
    state, states, factor = torch.zeros_like(x[:, 0]), [], torch.sigmoid(model.q(x))
    for i in range(x.shape[1]):
        state = factor[:, i] * state + x[:, i]
        states.append(state)
    return by_sum(torch.stack(states, 1))


def looked_up(model: Rows, x: Tensor) -> Tensor:
    before = (x.argmax(-1) + 1).roll(1, 1) - 1  # -1 where a shift leaves 0
    return x * model.embedding(before)


def whole_numbers(model: Rows, x: Tensor) -> Tensor:
    return x * (12 // (x.argsort(-1)[..., :1] + 1).roll(1, 1))


def hidden_scores(model: Rows, x: Tensor) -> Tensor:
    is_seen = (x.detach().abs() > 0).roll(1, 1)
    return x.masked_fill(~is_seen, -torch.inf).softmax(-1)


def ratio_to_the_next(model: Rows, x: Tensor) -> Tensor:
    return x[:, :-1] / x[:, 1:]


def of_a_range(model: Rows, x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1], device=x.device)[:, None]  # 0 for the token that is left out
    return by_sum((x * place)[:, 1:])


def scan_of_a_range(model: Rows, x: Tensor) -> Tensor:
    return x[:, 1:].logcumsumexp(1)


STEPS = (
    embedding,
    roll,
    flip,
    causal_attention,
    attention,
    causal_convolution,
    joined,
    token_local,
    softmax_of_tokens,
    recurrence,
    looked_up,
    whole_numbers,
    hidden_scores,
    ratio_to_the_next,
    of_a_range,
    scan_of_a_range,
)


def ids(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, VOCABULARY, (2, length), generator=generator)
