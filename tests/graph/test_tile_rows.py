"""MLPs by tiles of tokens: exact in every form, and left alone where some of it is not computed by rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import ConfigError, verify
from cpcompile.options.config import Config
from tests.graph.small_models import VOCABULARY, TinyLM, batch, count, planned

BY_ROWS = torch.ops.cpcompile.by_rows.default
WIDTH, WIDE = 8, 20


class WithMlp(TinyLM):
    """A residual MLP behind attention."""

    def __init__(self, mlp: Callable[[WithMlp, Tensor], Tensor], frozen: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.mlp = mlp
        self.up, self.gate = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE, bias=False)
        self.both, self.down = nn.Linear(WIDTH, 2 * WIDE), nn.Linear(WIDE, WIDTH)
        self.norm, self.share = nn.LayerNorm(WIDE), nn.Linear(WIDTH, 1)
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.attend(x)
        return self.head(x + self.mlp(self, x))


def swiglu(m: WithMlp, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


def gelu(m: WithMlp, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x), approximate="tanh"))


def fused(m: WithMlp, x: Tensor) -> Tensor:
    gate, up = m.both(x).chunk(2, dim=-1)
    return m.down(F.silu(gate) * up)


def split(m: WithMlp, x: Tensor) -> Tensor:
    gate, up = m.both(x).split(WIDE, dim=-1)
    return m.down(gate.relu().square() * up)


def shared(m: WithMlp, x: Tensor) -> Tensor:
    """The share of each token takes a gradient, and comes from elsewhere."""
    return m.down(m.share(x).sigmoid() * m.up(x).tanh())


def flat(m: WithMlp, x: Tensor) -> Tensor:
    return m.down(m.up(x.flatten(0, 1)).relu()).view(x.shape)


def transposed(m: WithMlp, x: Tensor) -> Tensor:
    """As GPT-2 writes it: weights the other way round, on flat rows."""
    wide = torch.addmm(m.up.bias, x.view(-1, WIDTH), m.up.weight.t()).view(*x.shape[:-1], WIDE)
    return (F.gelu(wide) @ m.down.weight.t()) + m.down.bias


def two_results(m: WithMlp, x: Tensor) -> Tensor:
    wide = m.up(x).sin()
    return m.down(wide) * wide.mean(-1, keepdim=True)


def normed(m: WithMlp, x: Tensor) -> Tensor:
    return m.down(m.norm(m.up(x)))


def along_tokens(m: WithMlp, x: Tensor) -> Tensor:
    return m.down(m.up(x).cumsum(1))


def dropped(m: WithMlp, x: Tensor) -> Tensor:
    return m.down(F.dropout(m.up(x), 0.1, training=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "mlp", [swiglu, gelu, fused, split, shared, flat, transposed, two_results], ids=lambda f: f.__name__
)
def test_every_form_is_exact(mlp: Callable[[WithMlp, Tensor], Tensor], world_size: int) -> None:
    model = WithMlp(mlp).double()
    assert count(planned(model, batch(11), world_size, tile=3).graph, BY_ROWS) == 1
    found = verify(model, batch(11), world_size=world_size, dtype=torch.float64, tile=3)
    assert found.tolerance < 1e-12
    found.raise_if_wrong()


@pytest.mark.parametrize("frozen", [("up",), ("up", "gate"), ("up", "gate", "down")], ids=lambda names: "-".join(names))
def test_frozen_weights(frozen: tuple[str, ...]) -> None:
    verify(WithMlp(swiglu, frozen).double(), batch(11), world_size=2, dtype=torch.float64, tile=3).raise_if_wrong()


@pytest.mark.parametrize("mlp", [normed, along_tokens, dropped], ids=lambda f: f.__name__)
def test_what_is_not_by_rows_is_left_alone(mlp: Callable[[WithMlp, Tensor], Tensor]) -> None:
    model = WithMlp(mlp).double()
    assert count(planned(model, batch(11), tile=3).graph, BY_ROWS) == 0


def test_beside_a_loss_in_chunks() -> None:
    model = WithMlp(swiglu).double()
    options = {"tile": 3, "loss_chunk": 4}
    graph = planned(model, batch(11), **options).graph
    assert count(graph, BY_ROWS) == count(graph, torch.ops.cpcompile.chunked_loss.default) == 1
    verify(model, batch(11), world_size=3, dtype=torch.float64, **options).raise_if_wrong()


def test_the_option_is_checked() -> None:
    assert VOCABULARY > WIDTH  # so that the head is a product that widens, and its loss no row
    with pytest.raises(ConfigError, match="tile=-1 is not a number of tokens"):
        Config(tile=-1)
