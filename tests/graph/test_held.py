"""What buffers hold is read as masks, places and slopes; the compiled program looks whether it still is so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.analysis.masks.expression import ONE, ZERO, Choice, Number, coordinate
from cpcompile.analysis.masks.held_tensors import SlopedTable, found_in, held
from cpcompile.analysis.masks.simplify import compare
from cpcompile.capture.lowering import capture, placeholders
from cpcompile.choose.attention_sites import attention_nodes
from cpcompile.errors import CPError
from cpcompile.front.held_buffers import HeldBuffers
from cpcompile.passes.lift_masks import describe
from tests.graph.small_models import batch
from tests.graph.test_attention_forms import Attending, hidden

N = 20
TRIL = torch.ones(N, N).tril()
SLOPES = torch.tensor([0.3, 0.17], dtype=torch.float64).view(2, 1, 1)
APART = torch.arange(N) - torch.arange(N)[:, None]
EARLIER = compare("le", coordinate(1) - coordinate(0))

FOUND: dict[str, tuple[Any, object]] = {
    "tril": (TRIL, Choice(EARLIER, Number(1), Number(0))),
    "bytes": (TRIL.byte(), Choice(EARLIER, ONE, ZERO)),
    "booleans": (TRIL.bool(), EARLIER),
    "in four dims": (TRIL.bool()[None, None], compare("le", coordinate(3) - coordinate(2))),
    "minus infinity": (
        torch.full((N, N), -torch.inf).triu(1),
        Choice(EARLIER, Number(0), Number(-torch.inf)),
    ),
    "columns": ((torch.arange(N) < 3).expand(N, N), compare("le", coordinate(1) - ONE - ONE)),
    "places": (torch.arange(N)[None], coordinate(1)),
    "slopes and differences": (SLOPES * APART, SlopedTable(of_rows=True)),
    "slopes and distances": (-(SLOPES * APART.abs()), SlopedTable(of_rows=True, is_distance=True)),
    "slopes and places before the last": (SLOPES * torch.arange(1 - N, 1), SlopedTable(origin=N - 1)),
    "slopes and places": (SLOPES[None] * torch.arange(N), SlopedTable()),
}
OTHERS: dict[str, Any] = {
    "one place off": TRIL.index_put((torch.tensor(4), torch.tensor(4)), torch.tensor(0.0)),
    "more than a band": (APART % 7 == 0),
    "numbers": torch.rand(N, N),
    "all alike, but no booleans": torch.ones(N, N),
    "lengths": torch.tensor([7, 5]),
    "nothing": torch.tensor(1.0),
    "a slope off": (SLOPES * APART).index_put(
        (torch.tensor(1), torch.tensor(9), torch.tensor(3)), torch.tensor(0.1).double()
    ),
    "takes a gradient": TRIL.clone().requires_grad_(),
    "a parameter": nn.Parameter(TRIL, requires_grad=False),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(name: str) -> None:
    tensor, expected = FOUND[name]
    assert found_in(tensor) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_read(name: str) -> None:
    assert found_in(OTHERS[name]) is None


class Held(Attending):
    """Attends under a mask and with a bias that buffers hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", (TRIL.bool() & (APART > -4))[None, None], persistent=False)
        self.register_buffer("bias", (SLOPES * torch.arange(1 - N, 1))[None])

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        scores = q @ k.mT / 2 + self.bias[..., -length:]  # type: ignore[index]
        scores = torch.where(self.seen[:, :, :length, :length], scores, -1e9)  # type: ignore[index]
        return F.softmax(scores, -1) @ v


@pytest.mark.parametrize(("world_size", "layout"), [(3, "zig_zag"), (2, "contiguous")])
def test_exact(world_size: int, layout: str) -> None:
    found = verify(Held(), batch(11), world_size=world_size, dtype=torch.float64, balancer=layout)
    found.raise_if_wrong()
    assert [describe(node) for node in attention_nodes(found.transformed.analysed)] == ["causal, window 4, ALiBi"]


class Written(Attending):
    """Writes the buffer that it attends under."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", TRIL.bool())

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        out = (q @ k.mT).masked_fill(~self.seen[:length, :length], -1e9).softmax(-1) @ v  # type: ignore[index]
        self.seen.copy_(self.seen | ~hidden(self.seen[None, None]))  # type: ignore[operator, index]
        return out


def test_a_buffer_that_the_model_writes_is_not_read() -> None:
    found = verify(Written(), batch(11), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()
    assert "dense" in describe(attention_nodes(found.transformed.analysed)[0])


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", TRIL.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.seen  # type: ignore[operator]


def test_a_buffer_that_was_changed_is_refused() -> None:
    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        captured = capture(gm, example_inputs)
        assert [held(node) is not None for node in placeholders(captured)].count(True) == 1
        buffers = HeldBuffers(captured)

        def run(*inputs: Any) -> Any:
            buffers.check(inputs)
            return captured(*inputs)

        return run

    model = Masked()
    x, compiled = torch.rand(N, N), torch.compile(model, backend=backend, fullgraph=True)
    compiled(x)
    model.load_state_dict(model.state_dict())  # written, with what it had
    model.seen = TRIL.clone()
    torch.testing.assert_close(compiled(x), model(x))
    model.seen.fill_(1)
    with pytest.raises(CPError, match=r"the buffer seen \[20, 20\] was changed since the model was compiled"):
        compiled(x)
    torch._dynamo.reset()
    model.seen.copy_(TRIL.triu(-3))
    torch.testing.assert_close(compiled(x), model(x))
