"""Documents that a model does not keep apart itself: on ranks in lockstep, compared with each document run alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.definitions.attention import attention
from cpcompile.inspect.float64 import Widen
from cpcompile.inspect.model_runs import LockstepBackend, run_and_differentiate
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
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


def test_experts_are_regions_of_tokens() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**models.sizes(1) | sizes, experts_implementation="batched_mm")).double()
    inputs = batch_of("mixtral", KEPT)
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


@pytest.mark.parametrize(("world_size", "inner_size"), [(4, 2), (6, 3), (8, 4)])
@pytest.mark.parametrize("layout", ["balanced", "zig_zag_by_document"])
def test_usp_deals_documents_to_its_groups(layout: str, world_size: int, inner_size: int) -> None:
    """The program of one device, with which this is compared, is no grid, and nothing is said of that."""
    found = cpcompile.verify(
        models.make("rotary"),
        batch_of("rotary", KEPT),
        world_size=world_size,
        inner_size=inner_size,
        dtype=torch.float64,
        balancer=layout,
        strategy="usp",
        documents=f"eos:{EOS}",
    )
    found.raise_if_wrong()
    assert found.transformed.plan.layout == f"{layout}:{inner_size}"
    assert set(found.transformed.choice.strategies) == {"usp"}


def test_one_search_for_documents_serves_all_layers() -> None:
    found = cpcompile.verify(models.make("rotary"), batch_of("rotary", KEPT), world_size=2, documents="eos:7,9")
    graph, cp = found.transformed.graph.graph, torch.ops.cpcompile
    assert len(graph.find_nodes(op="call_function", target=cp.document_bounds.default)) == 1
    sites = found.transformed.analysed.graph.find_nodes(op="call_function", target=cp.attention.default)
    assert len(sites) == 2 and len({site.args[4] for site in sites}) == 1
    assert sites[0].args[4].meta["val"].dtype == torch.int32
    assert found.transformed.changes["separate_documents"] == 2


class LM(nn.Module):
    """A causal attention and something else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv = nn.Embedding(models.VOCABULARY, 8), nn.Linear(8, 24)
        self.convolution, self.head = nn.Conv1d(8, 8, 3, padding=2), nn.Linear(8, models.VOCABULARY)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return x + out.transpose(1, 2).flatten(2)

    def more(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return x

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.more(self.attend(self.embedding(input_ids)), input_ids)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def chunked(m: LM, x: Tensor, ids: Tensor) -> Tensor:
    i = index(x)
    return m.attend(x, (i[:, None] >= i) & (i[:, None] // 4 == i // 4))


def windowed(m: LM, x: Tensor, ids: Tensor) -> Tensor:
    i = index(x)
    return m.attend(x, (i[:, None] >= i) & (i[:, None] - i < 3) & (ids != 9)[:, None, None, :])


def sloped(m: LM, x: Tensor, ids: Tensor) -> Tensor:
    i = index(x)
    bias = torch.tensor([0.5, 0.25], dtype=x.dtype)[:, None, None] * (i - i[:, None])
    return m.attend(x, bias[None].masked_fill(i[:, None] < i, float("-inf")))


ALLOWED = {
    "ALiBi": sloped,
    "nothing": lambda m, x, ids: x,
    "chunks count from each document": chunked,
    "a window and padding": windowed,
    "a table of places": lambda m, x, ids: x * (index(x)[None, :, None] + 1.0).log(),
    "places that are counted": lambda m, x, ids: x + torch.ones_like(index(x)).cumsum(0)[:, None] * 0.1,
    "places cut from a longer table": lambda m, x, ids: x + torch.arange(64.0, dtype=x.dtype)[: x.shape[1], None].sin(),
    "another embedding of tokens": lambda m, x, ids: x + m.embedding((ids + 1) % 61),
    "statistics that nobody reads": lambda m, x, ids: (x.mean(), x)[1],
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_computed_token_by_token_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "more", ALLOWED[name])
    model, inputs = LM().double(), batch_of("rotary", KEPT)
    found = in_lockstep(model, inputs, 2, documents=f"eos:{EOS}", mask_labels=True)
    assert_same(found, alone(model, inputs, KEPT, masked=True))


def prefixed(m: LM, x: Tensor, ids: Tensor) -> Tensor:
    i = index(x)
    return m.attend(x, (i[:, None] >= i) | (i < 3))


def far(m: LM, x: Tensor, ids: Tensor) -> Tensor:
    i = index(x)
    return m.attend(x, (i[:, None] >= i) & (i[:, None] <= 2 * i + 5))


REFUSED = {
    "a convolution": (lambda m, x, ids: x + m.convolution(x.mT)[..., : x.shape[1]].mT, "cannot keep documents apart"),
    "the token before": (lambda m, x, ids: x + F.pad(x, (0, 0, 1, -1)), "cannot keep documents apart"),
    "the next token's id": (lambda m, x, ids: x + m.embedding(F.pad(ids, (0, 1))[:, 1:]), "numbers of other tokens"),
    "a running sum": (lambda m, x, ids: x + x.cumsum(1), "mixes the tokens"),
    "a mean of the row": (lambda m, x, ids: x + x.mean(1, keepdim=True), "pools all tokens"),
    "a mean of the batch": (lambda m, x, ids: x + x.mean((0, 1)), "depends on the tokens of other documents"),
    "the length": (lambda m, x, ids: x / x.shape[1], "length of the row"),
    "places over the length": (lambda m, x, ids: x * (index(x) / x.shape[1])[:, None], "in a way that is not known"),
    "places from the end": (lambda m, x, ids: x * index(x).flip(0)[:, None], "in a way that is not known"),
    "places less the length": (
        lambda m, x, ids: x * torch.arange(-x.shape[1], 0)[:, None],
        "in a way that is not known",
    ),
    "a softmax of places": (lambda m, x, ids: x * index(x).double().softmax(0)[:, None], "in a way that is not known"),
    "a prefix": (prefixed, "it has a prefix"),
    "a mask that is not recognised": (far, "its mask is not recognised"),
    "positions of inputs": (lambda m, x, ids: x + m.embedding((ids != 0).cumsum(1) % 61), "depends on the tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_documents_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more, reason = REFUSED[name]
    monkeypatch.setattr(LM, "more", more)
    with pytest.raises(cpcompile.NoRule, match=reason) as error:
        in_lockstep(LM().double(), batch_of("rotary", KEPT), 2, documents=f"eos:{EOS}")
    assert "test_separate_documents.py:" in str(error.value) and "Leave documents=''" in str(error.value)


@pytest.mark.parametrize("text", ["eos", "eos:x", "eos:-1", "tokens:2", "ids", "ids:a b", "positions:1"])
def test_options_that_say_nothing(text: str) -> None:
    with pytest.raises(cpcompile.ConfigError, match="does not say what tells documents apart"):
        Config(documents=text)


def test_a_wrong_attention_is_named_by_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks are compared with is the graph in which documents were separated."""

    def broken(calls: list[Any]) -> list[Any]:
        return [(out + 1, *others) for out, *others in attention(calls)]

    monkeypatch.setitem(COLLECTIVES, torch.ops.cpcompile.ring_attention.default, broken)
    options = {"documents": f"eos:{EOS}", "strategy": "ring", "dtype": torch.float64}
    found = cpcompile.verify(LM(), batch_of("lm", BATCHES["two rows"]), world_size=2, **options)
    assert found.first_difference is not None
    assert "out = F.scaled_dot_product_attention(" in found.first_difference.place


def test_options_that_do_not_fit() -> None:
    with pytest.raises(cpcompile.ConfigError, match="needs to know the documents"):
        Config(mask_labels=True)
    model, inputs = LM().double(), batch_of("rotary", KEPT)
    with pytest.raises(cpcompile.InputError, match="leave dynamic=True"):
        in_lockstep(model, inputs, 2, documents="eos:7", dynamic=False)
    with pytest.raises(cpcompile.InputError, match="was not called with document_ids"):
        in_lockstep(model, inputs, 2, documents="ids:document_ids")


class Unmaskable(LM):
    """Its loss knows no label to ignore."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.head(self.attend(self.embedding(input_ids))).log_softmax(-1)
        picked = scores[:, :-1].gather(-1, input_ids[:, 1:, None]) if scores.shape[1] > 1 else scores
        return {"loss": -picked.mean(), "logits": scores}


def test_labels_that_no_loss_can_ignore() -> None:
    model, inputs = Unmaskable().double(), batch_of("rotary", KEPT)
    with pytest.raises(cpcompile.NoRule, match="no loss with an ignore_index was found"):
        in_lockstep(model, inputs, 2, documents="eos:7", mask_labels=True)
    loss, _ = in_lockstep(model, inputs, 2, documents="eos:7")
    torch.testing.assert_close(loss, alone(model, inputs, KEPT, masked=False)[0], rtol=1e-10, atol=0)
