"""`generate` of a context-parallel model runs the untouched model; training goes on as before."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.fsdp import fully_shard

import cpcompile
from tests.models import error

TOKENS = 5


def new_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).double()


def generated(model: Any, **options: Any) -> torch.Tensor:
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False, "max_new_tokens": TOKENS}
    given["synced_gpus"] = False  # ranks outside of the mesh do not generate
    found: torch.Tensor = model.generate(ids, **given | options)
    return found


def evaluated(rank: Any, is_fsdp: bool) -> dict[str, float]:
    """Errors of losses before and after generating, and of the tokens."""
    torch._dynamo.reset()
    model, alone = new_model(), new_model()
    if is_fsdp:
        for layer in model.model.layers:
            fully_shard(layer, mesh=rank.mesh())
        fully_shard(model, mesh=rank.mesh())
    cpcompile.apply(model, rank.mesh(), inner="eager")
    ids = torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(2))
    found = {}
    for step in range(2):
        loss, expected = (m(input_ids=ids, labels=ids, use_cache=False).loss for m in (model, alone))
        loss.backward()
        model.zero_grad()
        found[f"loss {step}"] = error(loss.detach(), expected.detach())
        for options in ({}, {"use_cache": False}, {"max_new_tokens": 1}):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                tokens = generated(model, **options)
            assert [str(w.message) for w in said if "runs the untouched model" in str(w.message)]
            found[f"tokens {step} {options}"] = float((tokens != generated(alone, **options)).sum())
    return found


@pytest.mark.always
def test_generates_what_one_device_generates(pool: Any) -> None:
    for is_fsdp in (False, True):
        for found in pool.run(2, evaluated, is_fsdp, timeout=300):
            assert max(found.values()) < 1e-12, found


def copied_and_removed(rank: Any) -> None:
    torch._dynamo.reset()
    model = cpcompile.apply(new_model(), rank.mesh(), inner="eager")
    other = copy.deepcopy(model)
    assert torch.equal(generated(model), generated(other))
    cpcompile.remove(model)
    assert "generate" not in model.__dict__
    assert "generate" in other.__dict__
    generated(other)


def test_copies_and_remove(pool: Any) -> None:
    pool.run(2, copied_and_removed, timeout=300)
