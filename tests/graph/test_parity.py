"""Parity: whole models on P ranks in lockstep against one device, loss and every gradient, in float64 and float32."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import cpcompile
from tests.models import DECODERS, batch, make

STRATEGIES, LAYOUTS = ("ulysses", "ring", "gather"), ("contiguous", "zig_zag")
WORLD_SIZES, LENGTHS = (1, 2, 3, 4), (31, 64, 97)
ALL = list(itertools.product(DECODERS, STRATEGIES, LAYOUTS, WORLD_SIZES, LENGTHS))
# A fixed sample keeps the default run short; every P and every length is met.
SAMPLE = [
    (model, strategy, layout, WORLD_SIZES[(i + j) % 4], LENGTHS[(i + 2 * j) % 3])
    for i, model in enumerate(DECODERS)
    for j, (strategy, layout) in enumerate(itertools.product(STRATEGIES, LAYOUTS))
    if (i + j) % 2 == 0  # every model with every strategy, every strategy and layout with half of the models
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def check(model: str, strategy: str, layout: str, world_size: int, length: int, **inputs: torch.Tensor) -> None:
    """Verify in float64 on fresh weights and inputs. 1e-10 is far above float64 rounding and far below any mistake."""
    module = make(model, seed=random.randrange(1 << 20))
    found = cpcompile.verify(
        module,
        {**batch(module, length, seed=random.randrange(1 << 20)), **inputs},
        world_size=world_size,
        dtype=torch.float64,
        strategy=strategy,
        balancer=layout,
    )
    assert found.tolerance < 1e-10
    found.raise_if_wrong()


@pytest.mark.parametrize(("model", "strategy", "layout", "world_size", "length"), SAMPLE)
def test_sample(model: str, strategy: str, layout: str, world_size: int, length: int) -> None:
    check(model, strategy, layout, world_size, length)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "strategy", "layout", "world_size", "length"), ALL)
def test_all(model: str, strategy: str, layout: str, world_size: int, length: int) -> None:
    check(model, strategy, layout, world_size, length)


@pytest.mark.parametrize("model", DECODERS)
def test_eight_ranks(model: str) -> None:
    check(model, "auto", "auto", 8, 33)


def padding(length: int) -> torch.Tensor:
    """Return an attention mask with padding on the left of one row and on the right of the other."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, length - 4 :] = 0
    return mask


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", ["llama", "qwen3", "gpt2"])
def test_padding_on_both_sides(model: str, strategy: str) -> None:
    check(model, strategy, "zig_zag", 3, 31, attention_mask=padding(31))


def test_additive_mask_that_hides_whole_rows_is_gathered() -> None:
    with pytest.warns(UserWarning, match="use gather in place of ring"):
        check("gemma2", "ring", "zig_zag", 3, 31, attention_mask=padding(31))


@pytest.mark.parametrize("world_size", [2, 3])
def test_packed_positions(world_size: int) -> None:
    positions = torch.cat([torch.arange(20), torch.arange(17)])[None].expand(2, -1).contiguous()
    check("llama", "ring", "zig_zag", world_size, 37, position_ids=positions)


@pytest.mark.parametrize("model", DECODERS)
def test_float32_to_rounding(model: str) -> None:
    module = make(model, torch.float32)
    found = cpcompile.verify(module, batch(module, 64), world_size=2, strategy="ring")
    found.raise_if_wrong()
    assert found.tolerance < 1e-4
