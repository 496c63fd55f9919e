"""Lengths of packed sequences that the user passes to a transformers model: exact, whether its attention reads them or not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

import cpcompile
from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.inspect.float64 import Widen
from cpcompile.inspect.model_runs import LockstepBackend, default_objective, run_and_differentiate
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes.lift_masks import describe
from tests import models
from tests.packing import GROUPED_HEADS

transformers = pytest.importorskip("transformers")

LENGTHS = [5, 1, 9, 4]
S = sum(LENGTHS)


def collated(*, positions: bool) -> dict[str, Any]:
    """Return what DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes of four documents."""
    torch.manual_seed(0)
    documents = [torch.randint(models.VOCABULARY, (n,)).tolist() for n in LENGTHS]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=positions)
    return {**collate([{"input_ids": ids} for ids in documents])}


def attentions(found: cpcompile.Verification) -> set[str]:
    graph = found.transformed.analysed.graph
    return {describe(x) for x in graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("positions", "words"), [(True, "causal, documents"), (False, "causal")])
def test_an_attention_that_does_not_read_them_is_exact(attention: str, positions: bool, words: str) -> None:
    """What these attentions read are the positions; without them the model attends across documents, and so do the ranks."""
    model = models.make("llama", num_layers=1, attn_implementation=attention)
    found = cpcompile.verify(model, collated(positions=positions), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()
    assert attentions(found) == {words}


def varlen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **options: Any) -> Any:
    """The attention of flash_attention_2 for packed sequences, by torch's operator of the same kernel."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    lengths = (options["cu_seq_lens_q"], options["cu_seq_lens_k"], options["max_length_q"], options["max_length_k"])
    out = varlen_attn(q, k, v, *lengths, window_size=(-1, 0), scale=scaling, **GROUPED_HEADS)
    return out[None], None


def by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **options: Any) -> Any:
    """The same, document by document."""
    parts = zip(*(x.split(LENGTHS, 2) for x in (q, k, v)), strict=True)
    outs = [scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts]
    return torch.cat(outs, 2).transpose(1, 2), None


def test_an_attention_that_reads_them_sees_documents() -> None:
    from transformers import AttentionInterface

    for name, function in (("varlen", varlen), ("by_hand", by_hand)):
        AttentionInterface.register(name, function)
    model, batch, config = models.make("llama", num_layers=1), collated(positions=True), Config()
    model.config._attn_implementation = "varlen"
    backend = LockstepBackend(config, Axis.in_process(2), True)
    forward = compile_whole(model.forward, backend, config)
    found = run_and_differentiate(model, forward, by_name(model.forward, batch), default_objective, config)
    assert backend.transformed is not None
    graph = backend.transformed.analysed.graph
    sites = graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    assert {describe(site) for site in sites} == {"causal, documents"}
    model.config._attn_implementation = "by_hand"
    with Widen():
        wanted = run_and_differentiate(model, model.forward, batch, default_objective)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_documents_can_be_asked_for_by_them() -> None:
    model = models.make("llama", num_layers=1, attn_implementation="sdpa")
    batch = collated(positions=False)
    found = cpcompile.verify(model, batch, world_size=2, dtype=torch.float64, documents="cu_seqlens")
    found.raise_if_wrong()
    assert attentions(found) == {"causal, documents"}
    whole = cpcompile.verify(model, collated(positions=True), world_size=2, dtype=torch.float64)
    torch.testing.assert_close(found.reference_loss, whole.reference_loss, rtol=1e-12, atol=0)


PACKAGE = """
import torch

class Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        return q + k + v

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k):
    return Varlen.apply(q, k, v)
"""


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_functions_of_flash_attn_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("flash_attn_interface")

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(models.VOCABULARY, 8)

        def forward(self, input_ids: Tensor, cu_seq_lens_q: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            return package.flash_attn_varlen_func(x, 2 * x, 3 * x, cu_seq_lens_q, cu_seq_lens_q).sum()

    inputs = {"input_ids": torch.arange(12)[None], "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32)}
    with pytest.raises(cpcompile.CPError, match="attn_implementation='sdpa'") as error:
        cpcompile.verify(Packed(), inputs, world_size=2)
    assert "flash_attn_interface.py:" in str(error.value) and "documents='cu_seqlens'" in str(error.value)
