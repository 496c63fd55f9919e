"""The kernels that attentions meet, told from the graph alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile.choose.attention_sites import attention_nodes, rewritten_attentions
from cpcompile.choose.kernels import (
    Chosen,
    cases_of,
    chosen_kernels,
    likely_kernel,
    refuse_unable_kernel,
    strategy_of,
)
from cpcompile.errors import ConfigError
from cpcompile.runtime import kernels
from cpcompile.runtime.kernels import Case, Kernel, cudnn, cudnn_varlen, flash
from tests.graph.small_models import TinyLM, batch, planned


class Packed(TinyLM):
    """Attends within documents."""

    def forward(self, input_ids: Tensor, labels: Tensor, documents: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(q.shape[2])
        seen = (at <= at[:, None]) & (documents[:, None, :, None] == documents[:, None, None])
        out = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(-2)
        return self.loss(self.head(x + out), labels)


def features(model: TinyLM, inputs: dict[str, Any], **options: Any) -> list[set[str]]:
    (node,) = rewritten_attentions(planned(model, inputs, world_size=4, **options).graph)
    assert strategy_of(node) == options["strategy"]
    return [set(case.features) for case in cases_of(node)]


def packed() -> dict[str, Any]:
    return {**batch(16), "documents": torch.tensor([[0] * 5 + [1] * 11, [0] * 16])}


def test_blocks_of_a_causal_mask_are_squares_and_whole() -> None:
    assert features(TinyLM(), batch(16), strategy="ulysses") == [{"causal"}]
    found = features(TinyLM(), batch(16), strategy="ring", balancer="zig_zag")
    assert len(found) == 2 and {"causal"} in found and set() in found


def test_squares_of_documents_may_be_several() -> None:
    found = features(Packed(), packed(), strategy="ring", balancer="contiguous")
    assert found == [{"causal", "varied"}, {"causal", "varied", "lengths"}, {"varied"}]
    assert all("documents" not in names for names in found)


def test_kernels_of_a_canonical_attention() -> None:
    (node,) = attention_nodes(planned(TinyLM(), batch()).analysed)
    assert strategy_of(node) == ""
    assert chosen_kernels(node, "auto") == (Chosen("cpu_flash", ()),)
    assert chosen_kernels(node, "math") == (Chosen("math", ()),)
    assert (likely_kernel(node, "auto"), likely_kernel(node, "flash")) == ("cpu_flash", "flash")


def test_a_model_without_memory_is_planned_for_torch_and_the_recommended_package() -> None:
    with torch.device("meta"):
        model = TinyLM()
    (node,) = attention_nodes(planned(model, {name: x.to("meta") for name, x in batch().items()}).analysed)
    assert (likely_kernel(node, "auto"), chosen_kernels(node, "auto")) == ("cudnn", ())
    refuse_unable_kernel([node], "cudnn")


def test_documents_cost_what_the_kernel_costs_that_takes_many(monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = attention_nodes(planned(Packed(), packed()).analysed)
    assert likely_kernel(node, "auto") == "cpu_flash"
    (case,) = cases_of(node)
    assert case.features == {"causal", "documents"}
    # FlashAttention 4 is faster at one sequence, and leaves documents to cuDNN.
    everywhere = [replace(k, limits=lambda case: "") for k in (flash.FLASH4, cudnn.KERNEL, cudnn_varlen.KERNEL)]
    monkeypatch.setattr(kernels, "KERNELS", tuple(everywhere))
    monkeypatch.setattr(flash, "is_installed", lambda module: True)
    kernels.choose.cache_clear()
    for device in ("cuda", "meta"):
        on_gpu = Case(device, torch.bfloat16, 64, 64, case.features)
        monkeypatch.setattr("cpcompile.choose.kernels.cases_of", lambda node, case=on_gpu: (case,))
        assert likely_kernel(node, "auto") == "cudnn_varlen"
    kernels.choose.cache_clear()


def test_all_attentions_that_a_kernel_cannot_compute_are_named() -> None:
    class Two(TinyLM):
        def logits(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            x = x + self.attend(x)
            return self.head(x + self.attend(x))

    nodes = attention_nodes(planned(Two(), batch()).analysed)
    refuse_unable_kernel(nodes, "cpu_flash")
    with pytest.raises(
        ConfigError, match=r"(?s)'cudnn' runs on cuda. Kernels for this attention: auto, cpu_flash, .*math"
    ):
        refuse_unable_kernel(nodes, "cudnn")


def test_reasons_of_faster_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are for another device say nothing."""
    kernel = kernels.KERNELS[-1]
    first = Kernel("first", kernel.forward, kernel.backward, lambda case: "needs luck", frozenset())
    monkeypatch.setattr(kernels, "KERNELS", (first, *kernels.KERNELS))
    kernels.choose.cache_clear()
    (node,) = attention_nodes(planned(TinyLM(), batch()).analysed)
    try:
        assert chosen_kernels(node, "auto") == (Chosen("cpu_flash", ("first needs luck",)),)
    finally:
        kernels.choose.cache_clear()
