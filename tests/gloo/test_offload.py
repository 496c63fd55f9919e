"""What waits in host memory: losses and gradients are those of one device, and nothing reads what was copied away."""

from __future__ import annotations

import logging
import unittest.mock
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cpcompile
from cpcompile.compile.inner import warn_of_nothing_moved
from cpcompile.compile.outline_layers import outline_layers
from cpcompile.options.config import Config
from cpcompile.runtime import host_memory
from tests.graph.test_memory import LAYERS, VOCABULARY, Stack

WAIT = host_memory._wait
EXACT = 1e-12  # float64, relative to the largest gradient


class Checkpointed(Stack):
    """Blocks in checkpoints of the model's own."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Packed(Stack):
    """Blocks without checkpoints."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, labels)


def tokens(lengths: list[int]) -> dict[str, Tensor]:
    """Return documents in one row."""
    ids = torch.randint(VOCABULARY, (1, sum(lengths)))
    return {
        "input_ids": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.cat(list(map(torch.arange, lengths)))[None],
    }


def one_by_one(model: nn.Module, inputs: dict[str, Tensor], lengths: list[int]) -> Tensor:
    """Return the loss of documents that are computed one after the other."""
    parts = {name: x.split(lengths, 1) for name, x in inputs.items()}
    losses = [model(**{name: x[i] for name, x in parts.items()}) * length for i, length in enumerate(lengths)]
    return torch.stack(losses).sum() / sum(lengths)


def wait_and_spoil(copy: Tensor, source: Tensor) -> None:
    """Overwrite what a copy was made of: nothing may read it when the copy is there."""
    WAIT(copy, source)
    source.fill_(7.0)  # of NaN a maximum would say nothing


def errors(rank: Any, kind: type[nn.Module], is_sharded: bool, options: dict[str, Any]) -> tuple[float, int]:
    """Return the largest error of loss and gradients over two lengths, and how many copies were awaited.

    Equal layers become calls with `outlines`, which is Inductor's alone.
    """
    options = {"inner": "aot_eager"} | options
    if options.pop("outlines", False):
        counts = []

        def counted(graph: torch.fx.GraphModule) -> int:
            counts.append(outline_layers(graph))
            return counts[-1]

        with (
            unittest.mock.patch.object(Config, "outlines", True),
            unittest.mock.patch("cpcompile.compile.inner.outline_layers", counted),
        ):
            found = errors(rank, kind, is_sharded, options)
        assert set(counts) == {LAYERS}, counts
        return found
    torch._dynamo.reset()
    model, alone = kind().double(), kind().double()
    if is_sharded:
        for block in model.blocks:
            fully_shard(block, mesh=rank.mesh())
        fully_shard(model, mesh=rank.mesh())
    cpcompile.apply(model, rank.mesh(), **options)
    largest = 0.0
    with unittest.mock.patch.object(host_memory, "_wait", side_effect=wait_and_spoil) as waits:
        for lengths in ([9, 16], [34, 5]) if options.get("documents") else ([25], [39]):
            torch.manual_seed(lengths[0])
            inputs = tokens(lengths)
            losses = model(**inputs), one_by_one(alone, inputs, lengths)
            for each, loss in zip((model, alone), losses, strict=True):
                each.zero_grad()
                loss.backward()
            grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
            scale = max(float(p.grad.abs().max()) for p in alone.parameters())
            found = [float((g - p.grad).abs().max()) / scale for g, p in zip(grads, alone.parameters(), strict=True)]
            largest = max(largest, float((losses[0] - losses[1]).abs() / losses[1].abs()), *found)
    return largest, waits.call_count


CASES = {
    "one rank, own checkpoints": (1, Checkpointed, False, {"offload": "inputs"}),
    "ring": (3, Packed, False, {"offload": "all", "memory_budget": 0.0, "strategy": "ring"}),
    "FSDP2, documents": (2, Packed, True, {"offload": "all", "memory_budget": 0.0, "documents": "positions"}),
    "gather, own checkpoints": (2, Checkpointed, False, {"offload": "inputs", "strategy": "gather"}),
}
OUTLINED = {
    "ring, calls": (3, Packed, False, {"offload": "all", "memory_budget": 0.0, "strategy": "ring", "outlines": True}),
    "own checkpoints, calls": (1, Checkpointed, False, {"offload": "inputs", "outlines": True}),
    "FSDP2, calls": (2, Packed, True, {"offload": "inputs", "memory_budget": 0.0, "outlines": True}),
}
SLOW = {
    # Of any length, Inductor does not compile these calls: two inputs have lengths of their own, with `offload` or without.
    "inductor": (2, Packed, True, {"offload": "all", "memory_budget": 0.0, "inner": "inductor", "dynamic": False}),
    "eight ranks": (8, Packed, False, {"offload": "inputs", "memory_budget": 0.25, "strategy": "ulysses"}),
}


@pytest.mark.parametrize("name", [*CASES, *OUTLINED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_is_exact_and_reads_nothing_that_was_copied(pool: Any, name: str) -> None:
    ranks, *case = (CASES | OUTLINED | SLOW)[name]
    results = pool.run(ranks, errors, *case)
    assert max(error for error, _ in results) < EXACT
    # There and back, in each of two steps, of each block but the last.
    assert all(waits >= 2 * 2 * 2 for _, waits in results)


def told(rank: Any) -> list[str]:
    torch._dynamo.reset()
    warn_of_nothing_moved.cache_clear()
    model = Packed()
    cpcompile.apply(model, rank.mesh(), inner="aot_eager", offload="inputs")
    with unittest.mock.patch.object(logging.getLogger("cpcompile.compile.inner"), "warning") as warning:
        model(**tokens([16]))
    return [call.args[0] % call.args[1:] for call in warning.call_args_list]


def test_says_that_nothing_is_computed_again(pool: Any) -> None:
    (text,) = pool.run(1, told)[0]
    assert "offload='inputs' moves nothing" in text and "memory_budget=0" in text
