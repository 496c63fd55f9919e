"""Rows that a mask picks are computed for all tokens: losses of them, and values written in their places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import NoRule, explain, verify
from cpcompile.passes import ANALYSIS, functionalise_writes, open_masked_rows
from tests.graph.small_models import TinyLM, batch, count, planned

aten = torch.ops.aten
LENGTH = 13
Program = Callable[["Model", Tensor, Tensor], Tensor]


class Model(TinyLM):
    """Runs a program: from ids and labels to a loss."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, self.norm, self.project = program, nn.LayerNorm(8), nn.Linear(3, 8)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x + self.attend(x)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.program(self, input_ids, labels)


def labelled(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    mask = labels != -100
    return F.cross_entropy(m.logits(ids)[mask], labels[mask])


def shifted(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    logits, mask = m.logits(ids), ids[:, 1:] > 2
    picked = logits[..., :-1, :][mask].contiguous().view(-1, logits.shape[-1])
    return F.cross_entropy(picked, labels[..., 1:][mask].contiguous().view(-1))


def head_of_the_picked(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    x, labels = m.hidden(ids).flatten(0, 1), labels.flatten()
    mask = labels != -100
    logits = m.head(F.gelu(m.norm(x[mask]))).float()
    return F.cross_entropy(logits, labels[mask], reduction="sum", label_smoothing=0.1)


def mask_twice(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    weight = torch.arange(1, 14, dtype=m.head.weight.dtype)
    return F.cross_entropy(m.logits(ids)[labels > 3], labels[labels > 3], weight)


def totals(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(m.logits(ids).mT, labels, reduction="none")
    scores = m.logits(ids).masked_select((ids > 4)[..., None].expand(-1, -1, 13).contiguous())
    return losses[labels != -100].mean() + (scores * 0.5).tanh().sum() / 7


def pairs(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    x, mask = m.hidden(ids), ids > 3
    return F.mse_loss(x[mask], m.embedding(labels.clamp(0))[mask]) + (x[mask] * x.sin()[mask]).sum()


def images(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    x, mask = m.embedding(ids), ids < 4
    patches = torch.arange(3 * NUM_IMAGES, dtype=x.dtype).view(-1, 3).sin()
    x = x.clone()
    x[mask] = m.project(patches)
    return m.loss(m.head(x + m.attend(x)), labels)


def images_of_merged_rows(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    x = m.embedding(ids).flatten(0, 1)
    patches = torch.arange(3 * NUM_IMAGES, dtype=x.dtype).view(-1, 3).sin()
    x = x.index_put((ids.flatten() < 4,), m.project(patches)).view(*ids.shape, -1)
    return m.loss(m.head(x + m.attend(x)), labels)


def written_back(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    x, mask = m.hidden(ids), ids > 5
    x = x.clone()
    x[mask] = m.norm(x[mask]) * 2
    return m.loss(m.head(x), labels)


def images_added(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    """Adds a row of its own to each that is picked, in two layers."""
    x, mask = m.embedding(ids), ids < 4
    patches = torch.arange(3 * NUM_IMAGES, dtype=x.dtype).view(-1, 3).sin()
    for scale in (1, 2):
        x = x + m.attend(x)
        x[mask, :] = m.norm(x[mask, :]) + m.project(scale * patches)
    return m.loss(m.head(x), labels)


def none_is_picked(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    mask = ids > 99
    return F.cross_entropy(m.logits(ids)[mask], labels[mask], reduction="sum") + m.logits(ids).mean()


NUM_IMAGES = int((batch(LENGTH)["input_ids"] < 4).sum())
PROGRAMS: list[tuple[Program, int]] = [
    (labelled, 1),
    (shifted, 1),
    (head_of_the_picked, 1),
    (mask_twice, 1),
    (totals, 2),
    (pairs, 2),
    (images, 1),
    (images_of_merged_rows, 1),
    (written_back, 1),
    (images_added, 2),
    (none_is_picked, 1),
]


@pytest.mark.parametrize(("program", "num_ends"), PROGRAMS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        (2, {"balancer": "zig_zag"}),
        (3, {"balancer": "contiguous", "dynamic": False}),
        (4, {"balancer": "zig_zag", "strategy": "ring"}),
    ],
)
def test_exact(program: Program, num_ends: int, world_size: int, options: dict[str, object]) -> None:
    found = verify(Model(program), batch(LENGTH), world_size=world_size, dtype=torch.float64, **options)
    assert found.ok, found
    assert found.transformed.changes["open_masked_rows"] == num_ends


def test_rows_that_are_not_picked_reach_no_gradient() -> None:
    """Not even where they are NaN, as the rows of padding may be."""

    def program(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
        mask = labels != -100
        x = m.hidden(ids).masked_fill(~mask[..., None], torch.nan)
        return F.cross_entropy(m.head(m.norm(x[mask])), labels[mask])

    found = verify(Model(program), batch(LENGTH), world_size=3, dtype=torch.float64)
    assert found.ok, found
    assert not any(x != x for x in found.loss)


def test_writes_losses_of_all_tokens_once() -> None:
    gm = planned(Model(labelled), batch(LENGTH)).original
    assert ANALYSIS.index(functionalise_writes) < ANALYSIS.index(open_masked_rows)
    assert open_masked_rows(gm) == 1
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    assert [count(gm, op) for op in (aten.index.Tensor, aten.where.ScalarOther, aten.masked_fill.Scalar)] == [0, 1, 2]
    before = str(gm.graph)
    assert open_masked_rows(gm) == 0 and str(gm.graph) == before


def test_leaves_what_no_loss_takes_together() -> None:
    def logarithm(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
        return m.logits(ids).square()[ids > 3].log().mean()  # infinite where it is 0

    def largest(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
        return m.logits(ids)[ids > 3].amax()

    def number(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
        x = m.logits(ids)[ids > 3]
        return x.sum() / x.shape[0]

    for program in (logarithm, largest, number):
        with pytest.raises(NoRule, match=r"aten\.index\.Tensor: the rows that it picks cannot be"):
            explain(Model(program), batch(LENGTH), world_size=2)
        assert verify(Model(program), batch(LENGTH), world_size=2, dtype=torch.float64, strict=False).ok
