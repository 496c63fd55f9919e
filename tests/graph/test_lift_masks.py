"""The masks of models are lifted, and the models still compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import fx

from cpcompile.capture.lowering import capture
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.lift_masks import describe, lift_masks

LENGTH = 24
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
GPT2 = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128, "n_positions": 128}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def model_of(name: str, attention: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    known: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", SIZES),
        "qwen3": ("Qwen3", SIZES),
        "mistral": ("Mistral", {**SIZES, "sliding_window": 8}),
        "gemma2": ("Gemma2", {**SIZES, "sliding_window": 8, "num_hidden_layers": 2}),
        "gpt_oss": ("GptOss", {**SIZES, "sliding_window": 8, "num_hidden_layers": 2, **EXPERTS}),
        "gpt2": ("GPT2", {**GPT2, **NO_DROPOUT}),
    }
    family, sizes = known[name]
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation=attention)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "gpt2" else f"{family}ForCausalLM")(config).to(dtype)
    model.loss_type = "ForCausalLM"  # else GPT-2 warns, which breaks its graph
    return model.train()  # type: ignore[no-any-return]


def batch_of(kind: str) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(0, 128, (2, LENGTH))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if kind in ("right", "left"):
        padding = torch.ones(2, LENGTH, dtype=torch.long)
        padding[1, slice(-5, None) if kind == "right" else slice(0, 5)] = 0
        batch["attention_mask"] = padding
    if kind == "packed":
        batch["position_ids"] = torch.stack([torch.arange(LENGTH) % 9, torch.arange(LENGTH) % 12])
    return batch


def captured(
    name: str, attention: str, kind: str, *, dynamic: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return the captured graph of a model and the arguments that it is called with."""
    model, batch = model_of(name, attention, dtype), batch_of(kind)
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graph = capture(gm, inputs)

        def run(*args: Any) -> Any:
            seen.append(args)
            return graph(*args)

        seen.append(graph)
        return run

    for value in batch.values():
        if dynamic and isinstance(value, torch.Tensor):
            torch._dynamo.mark_dynamic(value, 1)
    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(**batch)
    graph, args = seen
    return graph, args


def outputs_and_gradients(gm: fx.GraphModule, args: tuple[Any, ...]) -> list[torch.Tensor]:
    outputs = [x for x in torch.utils._pytree.tree_leaves(gm(*args)) if isinstance(x, torch.Tensor) and x.requires_grad]
    parameters = [x for x in args if isinstance(x, torch.nn.Parameter)]
    grads = torch.autograd.grad(sum(x.square().mean() for x in outputs), parameters, allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default))


def num_square_tensors(gm: fx.GraphModule, length: Any) -> int:
    values = [node.meta.get("val") for node in gm.graph.nodes]
    return sum(isinstance(v, torch.Tensor) and sum(str(s) == str(length) for s in v.shape) > 1 for v in values)


CASES = [
    ("llama", "sdpa", "plain", ["causal"]),
    ("llama", "sdpa", "right", ["causal, key padding"]),
    ("llama", "sdpa", "left", ["causal, key padding"]),
    ("llama", "sdpa", "packed", ["causal, documents"]),
    ("llama", "eager", "plain", ["causal"]),
    ("llama", "eager", "packed", ["causal, documents"]),
    ("qwen3", "sdpa", "plain", ["causal"]),
    ("qwen3", "eager", "plain", ["causal"]),
    ("gpt2", "sdpa", "right", ["causal, key padding"]),
    ("gpt2", "sdpa", "plain", ["causal"]),
    ("gpt2", "eager", "packed", ["causal, documents"]),
    ("gemma2", "eager", "plain", ["causal, window 8", "causal"]),
    ("gemma2", "eager", "packed", ["causal, window 8, documents", "causal, documents"]),
    ("gpt_oss", "eager", "plain", ["causal, window 8, sinks", "causal, sinks"]),
    ("mistral", "sdpa", "left", ["causal, window 8, key padding"]),
    ("mistral", "sdpa", "packed", ["causal, window 8, documents"]),
    ("mistral", "eager", "plain", ["causal, window 8"]),
]


@pytest.mark.parametrize(("name", "attention", "kind", "expected"), CASES)
def test_models_keep_their_numerics_without_a_dense_mask(
    name: str, attention: str, kind: str, expected: list[str]
) -> None:
    gm, args = captured(name, attention, kind)
    wanted = outputs_and_gradients(copy.deepcopy(gm), args)
    assert (find_attention(gm), lift_masks(gm)) == (len(expected), len(expected))
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert [describe(node) for node in attentions(gm)] == expected
    assert num_square_tensors(gm, attentions(gm)[0].meta["val"].shape[2]) == 0
    # transformers' eager attention takes its softmax in float32, whatever the dtype.
    atol = 1e-6 if attention == "eager" else 1e-11
    torch.testing.assert_close(outputs_and_gradients(gm, args), wanted, rtol=0, atol=atol)
    text = str(gm.graph)
    assert (find_attention(gm), lift_masks(gm), str(gm.graph)) == (0, 0, text)


def test_a_static_length_is_lifted_too() -> None:
    gm, _ = captured("mistral", "sdpa", "packed", dynamic=False)
    assert (find_attention(gm), lift_masks(gm)) == (1, 1)
    assert describe(attentions(gm)[0]) == "causal, window 8, documents"


@pytest.mark.parametrize("kind", ["right", "left"])
def test_finite_fill_with_padding_stays_dense(kind: str) -> None:
    """A row without a key attends to all keys evenly when the fill is finite."""
    gm, args = captured("llama", "eager", kind, dtype=torch.float32)
    wanted = outputs_and_gradients(copy.deepcopy(gm), args)
    assert find_attention(gm) == 1
    text = str(gm.graph)
    assert (lift_masks(gm), str(gm.graph)) == (0, text)
    assert describe(attentions(gm)[0]).startswith("dense [2, 1, s")
    gm.recompile()
    torch.testing.assert_close(outputs_and_gradients(gm, args), wanted, rtol=0, atol=2e-5)


def test_new_nodes_carry_a_value_and_the_place_in_the_source() -> None:
    gm, _ = captured("llama", "sdpa", "right")
    find_attention(gm)
    lift_masks(gm)
    (node,) = attentions(gm)
    for new in (node, node.args[5]):
        assert isinstance(new, fx.Node)
        assert new.meta["val"].shape[0] == 2
        assert "sdpa_attention" in new.meta["stack_trace"]
    assert "self_attn" in str(node.meta["nn_module_stack"])
