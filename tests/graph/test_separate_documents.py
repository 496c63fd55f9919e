"""Documents that a model does not keep apart itself: on ranks in lockstep, compared with each document run alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.config import Config
from cpcompile.dynamo import by_name, compile_whole
from cpcompile.mesh import Axis
from cpcompile.verification import LockstepBackend, run_and_differentiate
from cpcompile.widen import Widen
from tests import models

EOS = 7
Result = tuple[Tensor, dict[str, Tensor]]


def packed(lengths: list[list[int]], seed: int = 0) -> Tensor:
    """Return token ids `[B, S]`, rows of documents of these lengths, each of which ends with the token EOS."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(8, models.VOCABULARY, (len(lengths), sum(lengths[0])), generator=generator)
    for row, sizes in zip(rows, lengths, strict=True):
        row[torch.tensor(sizes).cumsum(0) - 1] = EOS
    return rows


def starts_of(lengths: list[list[int]]) -> Tensor:
    """Return which tokens begin a document, bool `[B, S]`."""
    is_first = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, sizes in zip(is_first, lengths, strict=True):
        row[torch.tensor([0, *sizes[:-1]]).cumsum(0)] = True
    return is_first


def alone(
    model: nn.Module, inputs: Mapping[str, Tensor], lengths: list[list[int]], masked: bool, row_ends: bool = True
) -> Result:
    """Return loss and gradients of a model that is given each document alone; `row_ends` with each row."""
    is_nano = "idx" in inputs
    name, labels = ("idx", inputs["targets"]) if is_nano else ("input_ids", inputs["labels"])
    labels, ignored = labels.clone(), -1 if is_nano else -100
    is_first = starts_of(lengths)
    if masked:
        is_last = is_first.roll(-1, 1).index_fill(1, torch.tensor([labels.shape[1] - 1]), row_ends)
        labels[is_last if is_nano else is_first] = ignored
    with Widen():
        logits = []
        for row, sizes in zip(inputs[name], lengths, strict=True):
            outs = [models.logits_of(model(**{name: part[None]})) for part in row.split(sizes)]
            logits.append(torch.cat(outs, 1))
        scores = torch.cat(logits)
        if not is_nano:
            scores, labels = scores[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=ignored)
    loss.backward()
    return loss.detach(), models.gradients(model)


def in_lockstep(model: nn.Module, inputs: Mapping[str, Any], world_size: int, **options: Any) -> Result:
    """Return loss and gradients of the ranks, joined."""
    config = Config(**options)
    backend = LockstepBackend(config, Axis.in_process(world_size), True)
    forward = compile_whole(model.forward, backend, config)
    return run_and_differentiate(
        model, forward, by_name(model.forward, inputs, beside=config.told_by), models.loss_of, config
    )


def assert_same(found: Result, wanted: Result) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=0)
    errors = models.errors(found[1], wanted[1])
    assert max(errors.values()) < 1e-9, errors


BATCHES = {
    "two rows": [[5, 9, 4], [1, 16, 1]],
    "one document": [[18]],
    "documents of one token": [[1] * 6 + [12], [1] * 18, [17, 1]],
    "50 documents": [[2, 1, 3, 1, 1] * 10],
    "three rows": [[6, 6, 6], [18], [1, 17]],
}


def batch_of(name: str, lengths: list[list[int]]) -> dict[str, Tensor]:
    ids = packed(lengths)
    keys = ("idx", "targets") if name == "nanogpt" else ("input_ids", "labels")
    labels = ids.clone() if name != "nanogpt" else ids.roll(-1, 1)
    return dict(zip(keys, (ids, labels), strict=True))


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all labels"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["nanogpt", "rotary", "llama"])
def test_each_document_is_computed_as_if_it_were_alone(name: str, batch: str, masked: bool) -> None:
    lengths, model = BATCHES[batch], models.make(name)
    inputs = batch_of(name, lengths)
    found = in_lockstep(model, inputs, 3, documents=f"eos:{EOS}", mask_labels=masked)
    assert_same(found, alone(model, inputs, lengths, masked))


KEPT = [[5, 9, 4], [1, 16, 1]]


def told(kind: str) -> dict[str, Tensor]:
    """Return the input that tells the documents of KEPT apart."""
    is_first = starts_of(KEPT)
    ids = is_first.long().cumsum(1)
    starts = torch.where(is_first, torch.arange(18), 0).cummax(1).values
    return {
        "positions": {"position_ids": torch.arange(18) - starts},
        "ids:document_ids": {"document_ids": 5 - ids},
        "cu_seqlens": {"cu_seq_lens_q": torch.tensor([0, 5, 14, 18, 19, 35, 36], dtype=torch.int32)},
        "cu_seqlens:cu": {"cu": torch.tensor([0, 5, 14, 18, 19, 35, 36, 36, 36])},
    }[kind]


@pytest.mark.parametrize("kind", ["positions", "ids:document_ids", "cu_seqlens", "cu_seqlens:cu"])
@pytest.mark.parametrize("name", ["nanogpt", "llama"])
def test_inputs_that_tell_documents_apart(name: str, kind: str) -> None:
    """The model need not take them; Llama takes positions and is not shown the lengths by this attention."""
    model, inputs = models.make(name), batch_of(name, KEPT)
    found = in_lockstep(model, inputs | told(kind), 2, documents=kind, mask_labels=True)
    assert_same(found, alone(model, inputs, KEPT, masked=True, row_ends=False))


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_more_models(name: str) -> None:
    model, inputs = models.make(name), batch_of(name, KEPT)
    found = in_lockstep(model, inputs, 2, documents=f"eos:{EOS}", mask_labels=True)
    assert_same(found, alone(model, inputs, KEPT, masked=True))


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag", "balanced", "zig_zag_by_document"])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_layouts_and_strategies(layout: str, strategy: str) -> None:
    found = cpcompile.verify(
        models.make("rotary"),
        batch_of("rotary", KEPT),
        world_size=2,
        dtype=torch.float64,
        balancer=layout,
        strategy=strategy,
        documents=f"eos:{EOS}",
    )
    found.raise_if_wrong()
    assert found.transformed.plan.layout == layout


def test_one_search_for_documents_serves_all_layers() -> None:
    found = cpcompile.verify(models.make("rotary"), batch_of("rotary", KEPT), world_size=2, documents="eos:7,9")
    graph, cp = found.transformed.graph.graph, torch.ops.cpcompile
    assert len(graph.find_nodes(op="call_function", target=cp.document_bounds.default)) == 1
    sites = found.transformed.analysed.graph.find_nodes(op="call_function", target=cp.attention.default)
    assert len(sites) == 2 and len({site.args[4] for site in sites}) == 1
    assert sites[0].args[4].meta["val"].dtype == torch.int32
    assert found.transformed.changes["separate_documents"] == 2
