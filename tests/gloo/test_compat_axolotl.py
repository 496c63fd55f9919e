"""axolotl's functions against the same model on one device: loss, logits and every gradient in float64."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers

from cpcompile.compat import axolotl
from cpcompile.compat.axolotl import RingAttnFunc, SequenceParallelContextManager
from cpcompile.errors import ConfigError, InputError
from cpcompile.inspect.float64 import Widen

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
            if not self.hidden[0]:  # with positions that wait for the first token, each token of padding is a document
                batch["position_ids"] = visible.cumsum(1) - 1
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
    "both_sides": Case(rows=2, settings=(("is_causal", False),), function=RingAttnFunc.BATCH_STRIPE),
    "both_sides_of_documents": Case("mistral", documents=PACKED, settings=(("is_causal", False),)),
    "both_sides_padded": Case(
        rows=2, hidden=(0, 5), settings=(("is_causal", False),), function=RingAttnFunc.VARLEN_LLAMA3
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


def by_hand(rank: Any) -> list[float]:
    """Return how far the loss is from that of one device, for scripts that cut batches themselves, and with a count of items."""
    case, found = Case(documents=PACKED), []
    for function in RingAttnFunc:
        for items in (None, 40):
            batch = case.batch() | ({} if items is None else {"num_items_in_batch": torch.tensor(items)})
            with Widen():
                expected = case.model("eager")(**batch, use_cache=False).loss
                model = case.model("eager")
                axolotl.register_ring_attn_from_device_mesh(rank.mesh("sp"), ("sp",), 2, function.value)
                model.set_attn_implementation("ring_attn")
                local, length, padding = axolotl.apply_sequence_parallelism(
                    batch, rank.rank, rank.world_size, 1, function
                )
                loss = model(**local, use_cache=False).loss.detach()
            assert length == 29 and local["input_ids"].shape[1] * rank.world_size == 29 + padding
            assert dist.get_world_size(axolotl.get_ring_attn_group()) == rank.world_size
            axolotl.unregister_ring_attn()
            found.append(distance(mean(loss, rank), expected))
    return found


def test_batches_that_are_cut_by_hand(pool: Any) -> None:
    for found in pool.run(2, by_hand):
        assert len(found) == 8 and max(found) < LARGEST


def recomputed(rank: Any) -> float:
    """Return how far gradients are where layers run again in backward, after a forward with other documents."""
    case = Case("mistral", documents=PACKED, function=RingAttnFunc.VARLEN_LLAMA3)
    other = replace(case, documents=((14, 9),), length=23)
    expected = [x + y for x, y in zip(one_device(case)[1], one_device(other)[1], strict=True)]
    model = case.model("sdpa")
    model.activation_checkpointing_enable()
    with shared(rank, case, model):  # layers that run again would not be widened
        losses = [model(**each.batch()).loss for each in (case, other)]
        torch.stack(losses).sum().backward()
    return max(distance(mean(x, rank), y) for x, y in zip(gradients(model), expected, strict=True))


def test_layers_that_run_again_see_the_documents_of_their_forward(pool: Any) -> None:
    assert max(pool.run(2, recomputed)) < 1e-5


def losses_with_dropout(rank: Any) -> list[float]:
    found = []
    for function in RingAttnFunc:
        case = Case(settings=(("attention_dropout", 0.4),), function=function)
        model = case.model("sdpa")
        with shared(rank, case, model), Widen():
            torch.manual_seed(3 + rank.rank)
            found.append(model(**case.batch()).loss.item())
    return found


def test_the_same_weights_are_dropped_on_any_number_of_ranks(pool: Any) -> None:
    losses = [x for world_size in (1, 3) for ranks in pool.run(world_size, losses_with_dropout) for x in ranks]
    plain = one_device(Case())[0].item()
    assert max(losses) - min(losses) < LARGEST < abs(losses[0] - plain)


class Around(torch.nn.Module):
    """A model around another one, which hands on what it is given."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        return self.inner(input_ids=input_ids, **others)


def outputs(rank: Any) -> list[float]:
    """Return how far the outputs of all tokens are from those of one device."""
    case = Case(rows=2, length=9, gathered=True)
    ids, model = case.batch()["input_ids"], case.model("sdpa")
    with torch.no_grad(), Widen():
        expected = model(ids, output_hidden_states=True)
        with shared(rank, case, model):
            every, some = model(ids, output_hidden_states=True), model(ids, logits_to_keep=4)
        outer = Around(model)
        with shared(rank, case, outer):
            around = outer(ids)
        after = model(ids)
    assert len(every.hidden_states) == 3 and every.past_key_values is None
    pairs = [(every.logits, expected.logits), (some.logits, expected.logits[:, -4:]), (around.logits, expected.logits)]
    pairs += [(after.logits, expected.logits), *zip(every.hidden_states, expected.hidden_states, strict=True)]
    return [distance(x, y) for x, y in pairs]


def test_outputs_of_all_tokens(pool: Any) -> None:
    for found in pool.run(3, outputs):
        assert max(found) < LARGEST


def tables() -> list[dict[str, Any]]:
    return [dict(x._global_mapping) for x in (transformers.AttentionInterface, transformers.AttentionMaskInterface)]


def restored(rank: Any) -> None:
    """Compare transformers before, in between and after."""
    before, model = tables(), make("llama", "sdpa")
    for _ in range(2):  # a second registration takes the place of the first
        axolotl.register_ring_attn_from_device_mesh(rank.mesh(), "cp", None, RingAttnFunc.BATCH_RING)
        during = tables()
        assert all(now[name] is not was[name] for now, was in zip(during, before, strict=True) for name in ("sdpa",))
        assert all({"eager", "ring_attn", "flash_attention_2", "flex_attention"} <= now.keys() for now in during)
        assert [now.get("paged|eager") for now in during] == [was.get("paged|eager") for was in before]
    transformers.AttentionInterface.register("loaded_later", len)
    axolotl.unregister_ring_attn()
    assert transformers.AttentionInterface._global_mapping.pop("loaded_later") is len
    assert tables() == before
    axolotl.register_ring_attn_from_device_mesh(rank.mesh(), "cp", None, None)
    assert tables() == before and axolotl.get_ring_attn_group() is rank.process_group
    axolotl.set_ring_attn_group(rank.pairs[0, 1])
    assert axolotl.get_ring_attn_group() is rank.pairs[0, 1]
    axolotl.unregister_ring_attn()
    with shared(rank, Case(), model) as manager:
        assert (manager.local_rank, manager.local_world_size) == (rank.rank, 2)
    with manager:  # once more
        assert axolotl.get_ring_attn_group() is rank.process_group
    assert tables() == before and "_loss_function" not in model.__dict__
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_everything_is_put_back(pool: Any) -> None:
    pool.run(2, restored)


def message(call: Any) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises((ConfigError, InputError)) as caught:
        call()
    return str(caught.value)


def refused_registrations(rank: Any) -> dict[str, str]:
    mesh, register = rank.mesh(), axolotl.register_ring_attn_from_device_mesh
    calls: dict[str, Any] = {
        "dim": lambda: register(mesh, ("sp",), None, RingAttnFunc.BATCH_RING),
        "mesh": lambda: register(None, ("cp",), None, RingAttnFunc.BATCH_RING),
        "stride": lambda: register(mesh, ("cp",), 0, RingAttnFunc.VARLEN_LLAMA3),
        "function": lambda: register(mesh, ("cp",), None, "varlen_ring"),
        "size": lambda: SequenceParallelContextManager([], 4, 1, RingAttnFunc.BATCH_RING, None, True, mesh),
        "no mesh": lambda: SequenceParallelContextManager([], 2, 1, RingAttnFunc.BATCH_RING, None, True),
        "group": axolotl.get_ring_attn_group,
        "update": lambda: axolotl.update_ring_attn_params(None),
    }
    found = {name: message(call) for name, call in calls.items()}
    with pytest.raises(RuntimeError, match="register_ring_attn_from_device_mesh"):
        axolotl.get_ring_attn_group()
    register(mesh, "cp", None, None)
    found["positions"] = message(lambda: axolotl.update_ring_attn_params(torch.rand(1, 4)))
    axolotl.unregister_ring_attn()
    return found


def test_refused_registrations(pool: Any) -> None:
    expected = {
        "dim": "no axis 'sp' (its axes: 'cp'",
        "mesh": "must be a DeviceMesh",
        "stride": "heads_k_stride is 0",
        "function": "varlen_llama3, batch_ring, batch_zigzag, batch_stripe",
        "size": "context_parallel_size is 4, but the dim 'cp' of the mesh has 2 ranks",
        "no mesh": "ParallelismConfig(cp_size=...)",
        "group": "register_ring_attn_from_device_mesh",
        "update": "register_ring_attn_from_device_mesh",
        "positions": "integers [batch, tokens]",
    }
    for found in pool.run(2, refused_registrations):
        assert {name: text for name, text in expected.items() if text not in found[name]} == {}


def test_refused_without_process_groups() -> None:
    assert "init_process_group" in message(
        lambda: axolotl.register_ring_attn_from_device_mesh(None, ("cp",), None, None)  # type: ignore[arg-type]
    )


def refused_models(rank: Any) -> dict[str, str]:
    """Return why models are not taken."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    t = transformers
    hybrid = t.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    models = {
        "dynamic": make("llama", "sdpa", rope_parameters=dynamic),
        "temperature": make("llama4", "eager", attn_temperature_tuning=True),
        "router": make("gpt_oss", "eager", output_router_logits=True),
        "hybrid": t.AutoModelForCausalLM.from_config(hybrid),
        "plain": torch.nn.Linear(2, 2),
        "positions": t.AutoModelForCausalLM.from_config(
            t.BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)
        ),
    }
    found = {
        name: message(lambda model=model: shared(rank, Case(), model).__enter__()) for name, model in models.items()
    }
    assert message(axolotl.get_ring_attn_group)  # nothing is left registered
    return found


def test_refused_models(pool: Any) -> None:
    expected = {
        "dynamic": "its rotary embedding (dynamic) depends on the largest position",
        "temperature": "attn_temperature_tuning",
        "router": "output_router_logits",
        "hybrid": "it has layers of conv; model.layers.0.conv.conv (Conv1d) mixes tokens",
        "plain": "holds no model of transformers",
        "positions": "it takes no position_ids",
    }
    (found,) = pool.run(1, refused_models)
    assert {name: text for name, text in expected.items() if text not in found[name]} == {}
    assert all("cpcompile.apply" in text for text in found.values())


def refused_calls(rank: Any) -> dict[str, str]:
    """Return the messages for arguments that do not fit."""
    case = Case("mistral", function=RingAttnFunc.BATCH_RING, length=24)
    model, batch = case.model("sdpa"), case.batch()
    ids = batch["input_ids"]
    masked, images = torch.ones(1, 1, 24, 24, dtype=torch.bool), torch.ones(1, 3, 8, 8)
    arguments: dict[str, dict[str, Any]] = {
        "mask": {"attention_mask": masked},
        "documents in the mask": {
            "attention_mask": torch.arange(24)[None] // 12 + 1 - (torch.arange(24) > 20).long() * 2
        },
        "images": {"pixel_values": images},
        "cache": {"use_cache": True},
        "weights": {"output_attentions": True},
        "kept": {"logits_to_keep": 3},
        "positions": {"position_ids": torch.arange(24).expand(3, 1, 24)},
        "bias": {"position_bias": torch.ones(())},
        "tuple": {"return_dict": False},
        "ranks": {"input_ids": ids + rank.rank % 2},
    }
    found = {}
    with shared(rank, case, model):
        for name, changed in arguments.items():
            found[name] = message(lambda changed=changed: model(**{"input_ids": ids} | changed))
        found["no tokens"] = message(lambda: model(attention_mask=torch.ones(1, 24)))
        model.config._attn_implementation = "paged|eager"
    axolotl.unregister_ring_attn()
    return found


def test_refused_calls(pool: Any) -> None:
    expected = {
        "mask": "attention_mask [1, 1, 24, 24]",
        "documents in the mask": "position_ids that begin again with each document",
        "images": "pixel_values [1, 3, 8, 8]",
        "cache": "a cache",
        "weights": "without output_attentions",
        "kept": "logits_to_keep=3",
        "positions": "position_ids is [3, 1, 24]: pass [1, 24]",
        "bias": "position_bias",
        "tuple": "return_dict=True",
        "ranks": "the input 'input_ids' differs between rank 0 and rank(s) 1",
        "no tokens": "neither input_ids nor inputs_embeds",
    }
    for found in pool.run(2, refused_calls, timeout=100):
        assert {name: text for name, text in expected.items() if text not in found[name]} == {}


class OwnAttention(torch.nn.Module):
    """A layer that does not ask transformers for its attention."""

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.cumsum(1), None


def refused_inside(rank: Any) -> dict[str, str]:
    """Return the messages for what models do inside."""
    from transformers import masking_utils as masks

    found, case = {}, Case(length=24)
    batch = case.batch()
    model = case.model("sdpa")
    model.model.layers[1].self_attn = OwnAttention()
    with shared(rank, case, model):
        found["own attention"] = message(lambda: model(**batch))
    model = case.model("sdpa")
    model.loss_function = lambda logits, labels, **others: logits.sum()
    with shared(rank, case, model):
        found["own loss"] = message(lambda: model(**batch))
    t, labelled = transformers, {"labels": torch.zeros(1, dtype=torch.long)}
    model = t.LlamaForSequenceClassification(case.model("sdpa").config)
    with shared(rank, case, model):
        found["whole labels"] = message(lambda: model(batch["input_ids"], **labelled))
        found["pooled"] = message(lambda: model(batch["input_ids"]))
    axolotl.register_ring_attn_from_device_mesh(rank.mesh(), "cp", None, RingAttnFunc.BATCH_RING)
    inside, size = masks.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"], 12
    attend, x = t.AttentionInterface()["sdpa"], torch.ones(1, 2, size, 4)
    causal, full = masks.causal_mask_function, masks.bidirectional_mask_function
    layer = case.model("sdpa").model.layers[0].self_attn
    calls: dict[str, Any] = {
        "or": lambda: inside(1, size, size, mask_function=masks.or_masks(causal, full)),
        "other": lambda: inside(1, size, size, mask_function=lambda *places: True),
        "blocks": lambda: inside(1, size, size, mask_function=masks.blockwise_overlay(torch.zeros(1, size))),
        "offset": lambda: inside(1, size, 2 * size),
        "part": lambda: inside(1, size, size, attention_mask=torch.ones(1, 2 * size)),
        "not causal": lambda: attend(layer, x, x, x, None, is_causal=False),
        "dense": lambda: attend(layer, x, x, x, torch.ones(1, 1, size, size)),
        "keys": lambda: attend(layer, x, x[:, :, :3], x[:, :, :3], None),
        "sinks": lambda: attend(layer, x, x, x, None, s_aux=torch.ones(3)),
        "window": lambda: attend(layer, x, x, x, inside(1, size, size), sliding_window=3),
        "packed": lambda: case.model("sdpa")(
            input_ids=batch["input_ids"][:, :size], position_ids=torch.arange(12)[None] % 5, use_cache=False
        ),
    }
    found |= {name: message(call) for name, call in calls.items()}
    axolotl.update_ring_attn_params(torch.arange(40)[None])
    found["tokens"] = message(lambda: attend(layer, x, x, x, None))
    axolotl.update_ring_attn_params(torch.stack([torch.arange(24), torch.arange(24) % 7]))
    found["rows"] = message(lambda: attend(layer, x, x, x, None))
    chunked = masks.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long))
    axolotl.update_ring_attn_params(None)
    hidden = torch.arange(12)[None] > 2
    found["chunks"] = message(lambda: inside(1, size, size, mask_function=chunked, attention_mask=hidden))
    axolotl.unregister_ring_attn()
    return found


def test_refused_inside_models(pool: Any) -> None:
    expected = {
        "own attention": "1 of 2 layers of LlamaForCausalLM attend",
        "own loss": "the loss <lambda> is not the one for causal language models",
        "whole labels": "labels [1]",
        "pooled": "does not hold this rank's 12 tokens",
        "or": "or_masks.<locals>.or_mask of causal_mask_function, bidirectional_mask_function is not understood",
        "other": "is not understood",
        "blocks": "blockwise_overlay",
        "offset": "use_cache=False",
        "part": "attention_mask is [1, 24]: pass this rank's part of it, [1, 12]",
        "not causal": "LlamaAttention of layer 0 attends to all tokens",
        "dense": "has a mask [1, 1, 12, 12]",
        "keys": "12 queries and 3 keys",
        "sinks": "one sink a head, [2]",
        "window": "has a window of 3 tokens, its mask one of 0",
        "packed": "position_ids restart at token",
        "tokens": "the sequence has 40, of which a rank holds 20",
        "rows": "documents of 2 rows, but the batch has 1",
        "chunks": "chunked attention with padding",
    }
    for found in pool.run(2, refused_inside, timeout=100):
        assert {name: text for name, text in expected.items() if text not in found[name]} == {}


class Numbers(torch.utils.data.IterableDataset[torch.Tensor]):
    """Tokens, read one after the other."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(1, 33).view(8, 4))


def prepared(rank: Any, cp_size: int) -> tuple[list[Any], list[Any], float]:
    """Return the batches of one epoch, shuffled and iterated, and how far gradients are from those of one device."""
    places = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "OMP_NUM_THREADS": 1}
    environment = mock.patch.dict(os.environ, {name: str(value) for name, value in places.items()})
    environment.start()
    axolotl.patch_accelerate()
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.state import AcceleratorState, GradientState

    try:
        accelerator = Accelerator(
            cpu=True, parallelism_config=ParallelismConfig(dp_shard_size=4 // cp_size, cp_size=cp_size)
        )
        loaders = [
            torch.utils.data.DataLoader(list(torch.arange(1, 33).view(8, 4)), batch_size=2, shuffle=True),
            torch.utils.data.DataLoader(Numbers(), batch_size=2),
        ]
        case = Case("mistral", length=4)
        alone, inner = case.model("sdpa"), case.model("sdpa")
        torch.manual_seed(rank.rank)  # random numbers differ, batches must not
        model, _, *loaders = accelerator.prepare(inner, torch.optim.SGD(inner.parameters()), *loaders)
        shuffled, iterated = ([batch.tolist() for batch in loader] for loader in loaders)
        ids = torch.tensor(iterated[0])
        with SequenceParallelContextManager([inner], cp_size, 1, RingAttnFunc.BATCH_ZIGZAG, None, False), Widen():
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
        with Widen():
            for group in range(4 // cp_size):
                each = torch.arange(8 * group + 1, 8 * group + 9).view(2, 4)  # its first batch
                (alone(input_ids=each, labels=each).loss * cp_size / 4).backward()
        pairs = zip(gradients(inner), gradients(alone), strict=True)
        return shuffled, iterated, max(distance(x, y) for x, y in pairs)
    finally:
        axolotl.unpatch_accelerate()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        environment.stop()


@pytest.mark.parametrize("cp_size", [2, 4])
def test_accelerate_prepares_data_and_model(pool: Any, cp_size: int) -> None:
    found = pool.run(4, prepared, cp_size, timeout=100)
    for kind in (0, 1):
        of_groups = [found[rank][kind] for rank in range(0, 4, cp_size)]
        assert [ranks[kind] for ranks in found] == [batches for batches in of_groups for _ in range(cp_size)]
        rows = [row for batches in of_groups for batch in batches for row in batch]
        assert sorted(rows) == torch.arange(1, 33).view(8, 4).tolist()
    assert max(ranks[2] for ranks in found) < LARGEST


def patched() -> list[Any]:
    from accelerate import accelerator
    from accelerate.parallelism_config import ParallelismConfig

    return [
        accelerator.prepare_data_loader,
        accelerator.Accelerator._prepare_cp,
        ParallelismConfig._validate_accelerator,
    ]


def test_accelerate_is_put_back() -> None:
    before = patched()
    axolotl.patch_accelerate()
    axolotl.patch_accelerate()
    assert all(now is not was for now, was in zip(patched(), before, strict=True))
    axolotl.unpatch_accelerate()
    assert patched() == before


def with_fsdp(rank: Any) -> float:
    """Return how far the gradients that FSDP2 averages over the ranks are from those of one device."""
    from torch.distributed.fsdp import fully_shard

    case = Case("gpt_oss", documents=PACKED, implementation="eager")
    expected, model = one_device(case), case.model("eager")
    for layer in model.model.layers:
        fully_shard(layer, mesh=rank.mesh("dp_shard_cp"))
    fully_shard(model, mesh=rank.mesh("dp_shard_cp"))
    with shared(rank, case, model):
        loss, grads = on_ranks(model, case)
    pairs = zip((x.full_tensor() for x in grads), expected[1], strict=True)
    return max(distance(loss, expected[0]), *(distance(x, y) for x, y in pairs))


def test_fsdp_averages_gradients(pool: Any) -> None:
    assert max(pool.run(2, with_fsdp, timeout=100)) < LARGEST
