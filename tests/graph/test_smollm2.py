"""SmolLM2-135M with its real weights (9 query, 3 KV heads): lockstep ranks against one device, in float64."""

from __future__ import annotations

import functools

import pytest
import torch

import cpcompile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
pytest.importorskip("gguf")


@functools.cache
def model_and_text() -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the model and the tokens of a real text."""
    from cpcompile.train.model import find_model, load_model, load_tokenizer

    source = find_model(None)
    text = (torch.nn.Module.__doc__ or "") * 4
    return load_model(source, torch.float32, torch.device("cpu")), torch.tensor(
        [load_tokenizer(source)(text)["input_ids"]]
    )


@pytest.mark.parametrize(
    ("strategy", "layout", "world_size", "length"),
    [
        ("ulysses", "contiguous", 2, 64),
        ("ulysses", "zig_zag", 4, 31),
        ("ring", "zig_zag", 2, 97),
        ("ring", "contiguous", 3, 64),
        ("gather", "zig_zag", 3, 31),
        ("gather", "contiguous", 4, 97),
        ("ring", "zig_zag", 1, 64),
    ],
)
def test_real_weights(strategy: str, layout: str, world_size: int, length: int) -> None:
    model, tokens = model_and_text()
    ids = tokens[:, :length].contiguous()
    assert ids.shape[1] == length
    found = cpcompile.verify(
        model,
        {"input_ids": ids, "labels": ids.clone(), "use_cache": False},
        world_size=world_size,
        dtype=torch.float64,
        strategy=strategy,
        balancer=layout,
        tolerance=1e-10,
    )
    found.raise_if_wrong()
    assert len(found.gradient_errors) == 272
