"""Documents of eos tokens on gloo ranks, for a model that does not keep them apart: as each document alone, at all lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_separate_documents import EOS, alone, packed
from tests.models import error, errors, gradients, loss_of, make

LENGTHS = [[[5, 9, 4], [1, 16, 1]], [[31], [30, 1]], [[1, 2, 3] * 5, [10, 10, 10]]]
OPTIONS = {"documents": f"eos:{EOS}", "mask_labels": True}


def trained(rank: Any, front: str, inner: str) -> tuple[dict[str, float], int]:
    """Return the errors of a few steps, and how many graphs there are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, reference = make("rotary", num_layers=1), make("rotary", num_layers=1)
    if front == "apply":
        run: Any = cpcompile.apply(model, rank.mesh(), inner=inner, **OPTIONS)
    else:
        options = {"mesh": rank.mesh(), "inner": inner, **OPTIONS}
        run = torch.compile(model, backend="cpcompile", options=options, dynamic=True)
    found: dict[str, float] = {}
    for lengths in LENGTHS:
        ids = packed(lengths)
        loss = loss_of(run(input_ids=ids, labels=ids))
        loss.backward()
        expected, grads = alone(reference, {"input_ids": ids, "labels": ids}, lengths, masked=True)
        of = f"at {ids.shape[1]}"
        found[f"loss {of}"] = error(loss.detach(), expected)
        found |= {f"{key} {of}": x for key, x in errors(gradients(model), grads).items()}
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("front", "inner", "world_size"),
    [("apply", "aot_eager", 2), pytest.param("apply", "inductor", 2, marks=pytest.mark.slow), ("backend", "eager", 2)],
)
def test_documents_of_eos_tokens(pool: Any, front: str, inner: str, world_size: int) -> None:
    for found, num_graphs in pool.run(world_size, trained, front, inner, timeout=300):
        assert max(found.values()) < 1e-10, found
        assert num_graphs == 1, "one graph serves all lengths"


def kept(rank: Any) -> list[tuple[list[int], float]]:
    """Return, after each call, the lengths whose bounds are kept, and the error of the logits that `unshard` joins by them."""
    torch._dynamo.reset()
    options = {"documents": f"eos:{EOS}", "balancer": "balanced", "inner": "eager"}
    model, reference = make("rotary", num_layers=1), make("rotary", num_layers=1)
    cpcompile.apply(model, rank.mesh(), **options)
    found = []
    for lengths in [[[5, 9, 4], [1, 16, 1]], [[31], [30, 1]], [[3, 4, 20], [9, 9, 9]], [[40], [8, 32]]]:
        ids = packed(lengths)
        logits = cpcompile.unshard(model(input_ids=ids)["logits"], model)
        first = ids[:1, : lengths[0][0]]  # the first document sees nothing else
        found.append((list(model.forward.last.bounds), error(logits[:1, : first.shape[1]], reference(first)["logits"])))
    return found


def test_bounds_of_earlier_calls_are_not_kept(pool: Any) -> None:
    for found in pool.run(2, kept, timeout=300):
        assert [lengths for lengths, _ in found] == [[18], [31], [27], [40]]
        assert max(errors for _, errors in found) < 1e-10
