"""Float64 on both sides of a comparison: casts, constants, memory that values share, and rows that masks hide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import verify
from tests.graph.small_models import TinyLM, batch


class WritesToItsCast(TinyLM):
    """Fills a tensor that is made of a cast value, through views of it."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        hidden = (x + self.attend(x)).float()
        filled = torch.zeros_like(hidden)
        filled[..., :3] = hidden[..., :3].sin()
        filled[..., 3:] = hidden[..., 3:]
        return self.head(filled.to(x.dtype))


class ScalesByAConstant(TinyLM):
    """As DeBERTa scales its scores: a constant in float32, of which a root is no float32."""

    def logits(self, input_ids: Tensor) -> Tensor:
        scale = torch.sqrt(torch.tensor(24, dtype=torch.float))
        x = self.embedding(input_ids)
        return self.head(x + self.attend(x) / scale)


@torch.jit.script
def root(size: int) -> Tensor:
    return torch.sqrt(torch.tensor(size, dtype=torch.float))


class ScalesByAScript(TinyLM):
    """As DeBERTa did in earlier versions: what `torch.jit.script` compiled is seen by no function mode."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(x + self.attend(x) / root(24))


class HidesWholeRows(TinyLM):
    """Rows in which an additive mask of finfo.min hides every key see all of them alike."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        length = x.shape[1]
        place = torch.arange(length, device=x.device)
        hidden = (place[None] > place[:, None]) | (place[:, None] < 3)
        mask = torch.zeros(length, length, dtype=x.dtype, device=x.device).masked_fill(hidden, torch.finfo(x.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class AttendsInHalfPrecision(TinyLM):
    """As SANA-WM does for the sake of its kernel, if values are float32 by then."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2).float() for y in self.qkv(x).chunk(3, -1))
        if q.dtype == torch.float32:
            q, k, v = q.bfloat16(), k.to(torch.bfloat16), v.half().bfloat16()
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2).to(x.dtype)


@pytest.mark.parametrize(
    "kind", [AttendsInHalfPrecision, HidesWholeRows, ScalesByAConstant, ScalesByAScript, WritesToItsCast]
)
def test_exact(kind: type[TinyLM]) -> None:
    found = verify(kind(), batch(11), world_size=2, dtype=torch.float64)
    assert found.ok and max(found.loss_error, *found.gradient_errors.values()) < 1e-12, str(found)
