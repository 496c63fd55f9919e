"""axolotl's functions against the same model on one device: loss, logits and every gradient in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from cpcompile.compat.axolotl import RingAttnFunc, SequenceParallelContextManager
from cpcompile.widen import Widen

VOCABULARY, LARGEST = 50, 1e-10
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOWS = ["sliding_attention", "full_attention"]


def make(kind: str, implementation: str, **changes: Any) -> Any:
    """Return a small model in float64, the same in every process."""
    t = transformers
    config: Any = {
        "llama": lambda: t.LlamaConfig(**SIZES | changes),
        "mistral": lambda: t.MistralConfig(**SIZES | {"sliding_window": 7} | changes),
        "gemma2": lambda: t.Gemma2Config(
            **SIZES | {"sliding_window": 6, "layer_types": WINDOWS, "attn_logit_softcapping": 2.0} | changes
        ),
        "gpt_oss": lambda: t.GptOssConfig(
            **SIZES
            | {"sliding_window": 5, "layer_types": WINDOWS, "num_local_experts": 2, "num_experts_per_tok": 1}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
            | changes
        ),
        "llama4": lambda: t.Llama4TextConfig(
            **SIZES
            | {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6}
            | {"layer_types": ["chunked_attention", "full_attention"], "attn_temperature_tuning": False}
            | changes
        ),
        "qwen2": lambda: t.Qwen2Config(**SIZES | changes),
    }[kind]()
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, experts_implementation="eager"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # also what begins as 0 or 1: sinks, biases, norms
    return model.train()


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    kind: str = "llama"
    rows: int = 1
    length: int = 29
    documents: tuple[tuple[int, ...], ...] = ()
    hidden: tuple[int, int] = (0, 0)  # tokens of padding before the first row and after the last
    function: RingAttnFunc = RingAttnFunc.BATCH_ZIGZAG
    stride: int | None = None
    implementation: str = "sdpa"
    gathered: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def model(self, implementation: str) -> Any:
        return make(self.kind, implementation, **dict(self.settings))

    def batch(self) -> dict[str, torch.Tensor]:
        """Return the arguments of the model for the whole sequence; labels are ignored more in some places than others."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.rows, self.length)
        ids = torch.randint(1, VOCABULARY, shape, generator=generator)
        ignored = torch.rand(shape, generator=generator) < torch.linspace(0, 0.9, self.length)
        ignored[:, 1] = False
        batch = {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}
        if self.documents:
            rows = [torch.cat([torch.arange(size) for size in sizes]) for sizes in self.documents]
            batch["position_ids"] = torch.stack(rows)
        if any(self.hidden):
            visible = torch.ones(shape, dtype=torch.long)
            visible[0, : self.hidden[0]] = 0
            visible[-1, self.length - self.hidden[1] :] = 0
            is_first = visible.cumsum(1) == 1  # padding predicts it, from what it does not see
            batch |= {"attention_mask": visible, "labels": batch["labels"].masked_fill(is_first | (visible == 0), -100)}
            batch["position_ids"] = (visible.cumsum(1) - 1).clamp(min=0)
        return batch


PACKED = ((9, 1, 19),)
FUNCTIONS = {
    function.value: Case(function=function, documents=PACKED, rows=1, length=29, kind="mistral")
    for function in RingAttnFunc
}
CASES = FUNCTIONS | {
    "one_sequence": Case(function=RingAttnFunc.BATCH_RING),
    "two_rows": Case(rows=2, length=26),
    "two_rows_of_stripes": Case(rows=2, length=26, function=RingAttnFunc.BATCH_STRIPE, gathered=True),
    "shorter_than_the_ranks": Case(length=3),
    "rows_of_other_documents": Case(rows=2, length=20, documents=((5, 15), (20,)), function=RingAttnFunc.VARLEN_LLAMA3),
    "window": Case("mistral", rows=2, length=33, gathered=True),
    "softcap": Case("gemma2", implementation="eager"),
    "softcap_of_documents": Case(
        "gemma2", documents=PACKED, function=RingAttnFunc.VARLEN_LLAMA3, stride=2, gathered=True, implementation="eager"
    ),
    "sinks": Case("gpt_oss", rows=2, length=24, implementation="eager"),
    "sinks_of_documents": Case(
        "gpt_oss", documents=PACKED, function=RingAttnFunc.VARLEN_LLAMA3, implementation="eager"
    ),
    "chunks": Case("llama4", implementation="eager"),
    "chunks_of_documents": Case("llama4", documents=PACKED, function=RingAttnFunc.BATCH_STRIPE),
    "padding": Case(rows=2, hidden=(0, 6), gathered=True),
    "padding_before": Case("mistral", rows=2, hidden=(4, 3), function=RingAttnFunc.BATCH_STRIPE),
    "one_key_head": Case(
        "qwen2", settings=(("num_key_value_heads", 1),), function=RingAttnFunc.VARLEN_LLAMA3, stride=4
    ),
    "three_heads": Case("qwen2", settings=(("num_attention_heads", 3), ("num_key_value_heads", 3))),
}


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the next tokens."""
    assert logits.shape == (*labels.shape, VOCABULARY)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model: Any) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def one_device(case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return loss and gradients of the untouched model, which is called with one document after the other."""
    batch, model = case.batch(), case.model("eager")
    ids, labels = batch["input_ids"], batch["labels"]
    with Widen():
        if case.documents:
            parts = [part for row, sizes in zip(ids, case.documents, strict=True) for part in row.split(list(sizes))]
            logits = torch.cat([model(part[None], use_cache=False).logits for part in parts], 1).view(*ids.shape, -1)
        else:
            logits = model(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False).logits
        loss = loss_of(logits, labels)
    loss.backward()
    return loss.detach(), gradients(model)


def on_ranks(model: Any, case: Case) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return loss and this rank's gradients; with gathered outputs, of a loss over the logits."""
    batch = case.batch()
    with Widen():
        if case.gathered:
            labels = batch.pop("labels")
            loss = loss_of(model(**batch).logits, labels)
        else:
            loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@contextmanager
def shared(rank: Any, case: Case, model: Any) -> Iterator[SequenceParallelContextManager]:
    """Let the ranks share the sequences of a model."""
    arguments = (rank.world_size, 1, case.function, case.stride, case.gathered, rank.mesh())
    with SequenceParallelContextManager([model], *arguments) as manager:
        yield manager


def mean(x: torch.Tensor, rank: Any) -> torch.Tensor:
    """Return the mean over the ranks, as DDP would."""
    dist.all_reduce(x, group=rank.process_group)
    return x / rank.world_size


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def errors(rank: Any, names: list[str]) -> dict[str, tuple[float, float]]:
    """Return how far loss and gradients are from those of one device, largest first of all ranks and parameters."""
    found = {}
    for name in names:
        case = CASES[name]
        expected = one_device(case)
        model = case.model(case.implementation)
        with shared(rank, case, model):
            loss, grads = on_ranks(model, case)
        of_grads = [distance(mean(x, rank), y) for x, y in zip(grads, expected[1], strict=True)]
        assert len(of_grads) > 10
        found[name] = distance(loss, expected[0]), max(of_grads)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_loss_and_gradients(pool: Any, world_size: int) -> None:
    for ranks in pool.run(world_size, errors, sorted(CASES), timeout=200):
        wrong = {name: error for name, error in ranks.items() if not max(error) < LARGEST}
        assert wrong == {}
