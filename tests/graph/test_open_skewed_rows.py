"""Relative shifts by views become gathers within rows; other views stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.passes.open_skewed_rows import open_skewed_rows
from tests.graph.small_models import batch
from tests.graph.test_attention_forms import LONGEST, Attending, hidden

B, H, S = 2, 3, 5
Form = Callable[[Tensor], Tensor]


def transformer_xl(x: Tensor) -> Tensor:
    batch, heads, rows, columns = x.shape
    x = F.pad(x, (1, 0)).view(batch, heads, columns + 1, rows)
    return x[:, :, 1:].view(batch, heads, rows, columns)


def conformer(x: Tensor) -> Tensor:
    batch, heads, rows, columns = x.shape
    x = torch.cat([x.new_zeros(batch, heads, rows, 1), x], -1).view(batch, heads, columns + 1, rows)
    return x[:, :, 1:].view(batch, heads, rows, columns)[..., : columns // 2 + 1]


def xlnet(x: Tensor) -> Tensor:
    batch, heads, rows, columns = x.shape
    return x.reshape(batch, heads, columns, rows)[:, :, 1:].reshape(batch, heads, rows, columns - 1)


def music(x: Tensor) -> Tensor:
    batch, heads, rows, columns = x.shape
    return F.pad(x, (1, 0)).reshape(batch, heads, columns + 1, rows)[:, :, 1:]


def to_absolute(x: Tensor) -> Tensor:
    batch, heads, rows, _ = x.shape
    x = F.pad(F.pad(x, (0, 1)).view(batch, heads, 2 * rows * rows), (0, rows - 1))
    return x.view(batch, heads, rows + 1, 2 * rows - 1)[:, :, :rows, rows - 1 :]


def to_relative(x: Tensor) -> Tensor:
    batch, heads, rows, _ = x.shape
    x = F.pad(F.pad(x, (0, rows - 1)).flatten(2), (rows, 0))
    return x.view(batch, heads, rows, 2 * rows)[..., 1:]


FORMS: dict[str, tuple[Form, int]] = {
    "Transformer-XL": (transformer_xl, S),
    "Transformer-XL with a memory": (transformer_xl, S + 4),
    "Conformer": (conformer, 2 * S - 1),
    "XLNet": (xlnet, 2 * S),
    "Music Transformer": (music, S),
    "VITS, to absolute": (to_absolute, 2 * S - 1),
    "VITS, to relative": (to_relative, S),
}
OTHERS: dict[str, tuple[Form, int]] = {
    "merged heads": (lambda x: x.reshape(B, H * S, -1)[:, 1:], S),
    "two columns more": (lambda x: F.pad(x, (2, 0)).view(B, H, S + 2, S)[:, :, 2:].reshape(B, H, S, S), S),
    "from the end": (lambda x: F.pad(x, (1, 0)).view(B, H, S + 1, S)[:, :, -S:].transpose(2, 3), S),
    "not with zeros": (lambda x: F.pad(x.flatten(2), (S, 0), value=1.0).view(B, H, S, S + 1), S),
    "rows only": (lambda x: F.pad(x[:, :, 1:], (0, 0, 0, 1)), S),
}


def traced(form: Form, columns: int) -> fx.GraphModule:
    x = torch.randn(B, H, S, columns, dtype=torch.float64)
    gm: fx.GraphModule = make_fx(lambda x: form(x), tracing_mode="fake", pre_dispatch=True)(x)
    return gm


@pytest.mark.parametrize("name", FORMS)
def test_shifts_are_found(name: str) -> None:
    form, columns = FORMS[name]
    gm = traced(form, columns)
    assert open_skewed_rows(gm) == 1
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    views = [node for node in gm.graph.nodes if "view" in str(node.target)]
    assert all(node.meta["val"].dim() == 2 for node in views)  # of places, none of scores
    x = torch.randn(B, H, S, columns, dtype=torch.float64, requires_grad=True)
    outs = gm(x), form(x)
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x) for y in outs), rtol=0, atol=1e-15)
    text = str(gm.graph)
    assert (open_skewed_rows(gm), str(gm.graph)) == (0, text)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name: str) -> None:
    gm = traced(*OTHERS[name])
    text = str(gm.graph)
    assert (open_skewed_rows(gm), str(gm.graph)) == (0, text)


class Relative(Attending):
    """Attends by content and by relative position, of which the shift is given."""

    def __init__(self, shift: Form, num_places: int) -> None:
        super().__init__()
        self.shift, self.num_places = shift, num_places
        self.table = nn.Parameter(torch.randn(2 * LONGEST, 4))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = self.table[: self.num_places * q.shape[2] + 1 - self.num_places]
        scores = q @ k.mT + self.shift(q @ places.T)
        return (scores.masked_fill(hidden(q), -torch.inf) if self.num_places == 1 else scores).softmax(-1) @ v


@pytest.mark.parametrize(
    ("shift", "num_places", "world_size", "layout"),
    [(transformer_xl, 1, 3, "zig_zag"), (conformer, 2, 2, "contiguous"), (to_absolute, 2, 4, "zig_zag")],
)
def test_exact(shift: Form, num_places: int, world_size: int, layout: str) -> None:
    model = Relative(shift, num_places)
    verify(model, batch(11), world_size=world_size, dtype=torch.float64, balancer=layout).raise_if_wrong()
