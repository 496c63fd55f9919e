"""Packed sequences with cu_seqlens: the operator has no kernel here, so it is traced, and compared with each sequence alone."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from cpcompile import NoRule
from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.capture.lowering import capture
from cpcompile.inspect.model_runs import LockstepBackend, default_objective, run_and_differentiate
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.lift_masks import describe, lift_masks
from cpcompile.passes.open_varlen_attention import open_varlen_attention
from tests.packing import GROUPED_HEADS

Tensor = torch.Tensor
H, D = 4, 8
LENGTHS = [3, 1, 6, 2]
T = sum(LENGTHS)
CU_SEQ = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


class Captured(Exception):
    """Ends a compilation: the operator itself cannot run here."""


def traced(
    length: bool = False,
    num_key_heads: int = H,
    num_keys: int = T,
    other: Tensor | None = None,
    trained: bool = True,
    **options: Any,
) -> fx.GraphModule:
    """Return the captured graph of a varlen attention over q, k, v and cu_seqlens."""
    shapes = [(T, H, D), (num_keys, num_key_heads, D), (num_keys, num_key_heads, D)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=trained) for shape in shapes)

    def function(q: Tensor, k: Tensor, v: Tensor, cu_seq: Tensor, *others: Tensor) -> Any:
        return varlen_attn(q, k, v, cu_seq, others[0] if others else cu_seq, 6, 6, **options)

    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(capture(gm, inputs))
        raise Captured

    torch._dynamo.reset()
    for x in (q, k, v) if length else ():
        torch._dynamo.mark_dynamic(x, 0)
    with pytest.raises(Exception, match="Captured"):
        torch.compile(function, backend=backend, fullgraph=True)(q, k, v, CU_SEQ, *([] if other is None else [other]))
    return seen[0]


def opened(**options: Any) -> tuple[fx.GraphModule, Call]:
    """Return the graph after the pass, and its attention."""
    gm = traced(**options)
    assert open_varlen_attention(gm) == 1
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    text = str(gm.graph)
    passes = (open_varlen_attention(gm), find_attention(gm), lift_masks(gm))
    assert (*passes, str(gm.graph)) == (0, 0, 0, text)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    return gm, Call.of(node)


def sequence_by_sequence(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float | None) -> Tensor:
    """Return the attention of each sequence alone, under a band."""
    outs = []
    for parts in zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True):
        distance = torch.arange(len(parts[0]))[:, None] - torch.arange(len(parts[0]))
        seen = ((distance <= left) | (left < 0)) & ((-distance <= right) | (right < 0))
        heads = [x.transpose(0, 1)[None] for x in parts]
        out = scaled_dot_product_attention(*heads, seen, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


CASES = [
    ((-1, -1), "documents"),
    ((-1, 0), "causal, documents"),
    ((2, 0), "causal, window 3, documents"),
    ((0, 0), "causal, window 1, documents"),
    ((2, -1), "window 3, documents"),
    ((1, 2), "look-ahead 2, window 2, documents"),
    ((-1, 1), "look-ahead 1, documents"),
]


@pytest.mark.parametrize(("window", "expected"), CASES)
def test_each_sequence_attends_to_itself(window: tuple[int, int], expected: str) -> None:
    gm, call = opened(window_size=window, num_key_heads=2, scale=0.3, **GROUPED_HEADS)
    assert describe(call) == expected
    inputs = [torch.randn(T, heads, D, dtype=torch.float64, requires_grad=True) for heads in (H, 2, 2)]
    values = [gm(*inputs, CU_SEQ)[0], sequence_by_sequence(*inputs, *window, scale=0.3)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), inputs) for x in values))


def test_a_symbolic_number_of_tokens() -> None:
    gm, call = opened(length=True)
    assert (describe(call), call["scale"]) == ("documents", D**-0.5)
    inputs = [torch.randn(T, H, D, dtype=torch.float64) for _ in range(3)]
    arguments = [CU_SEQ if x.meta["val"].dtype is torch.int32 else inputs.pop(0) for x in tensors(gm)]
    wanted = sequence_by_sequence(*(x for x in arguments if x is not CU_SEQ), -1, -1, None)
    torch.testing.assert_close(fx.Interpreter(gm).run(*given(gm, arguments))[0], wanted)


def tensors(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], Tensor)]


def given(gm: fx.GraphModule, arguments: list[Tensor]) -> list[Any]:
    """Return the arguments with the number of tokens for each size among the inputs."""
    rest = iter(arguments)
    return [next(rest) if isinstance(n.meta["val"], Tensor) else T for n in gm.graph.find_nodes(op="placeholder")]


class PackedLM(nn.Module):
    """One packed row of tokens, without a batch dim; `by_hand` attends sequence by sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv, self.head = nn.Embedding(13, 8), nn.Linear(8, 24), nn.Linear(8, 13)
        self.by_hand = False

    def forward(self, input_ids: Tensor, labels: Tensor, cu_seq: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        q, k, v = (t.unflatten(-1, (2, 4)) for t in self.qkv(x).chunk(3, -1))
        if self.by_hand:
            y = sequence_by_sequence(q, k, v, -1, 0, None)
        else:
            y = varlen_attn(q, k, v, cu_seq, cu_seq, 6, 6, window_size=(-1, 0))
        return cross_entropy(self.head(x + y.flatten(-2)), labels)


def test_a_model_of_packed_sequences_is_exact_on_three_ranks() -> None:
    model, config = PackedLM().double(), Config(token_dims={"input_ids": 0, "labels": 0})
    inputs = {"input_ids": torch.arange(T) % 13, "labels": torch.arange(T) * 5 % 13, "cu_seq": CU_SEQ}
    ranks = LockstepBackend(config, Axis.in_process(3), False)
    forward = compile_whole(model.forward, ranks, config)
    found = run_and_differentiate(model, forward, by_name(model.forward, inputs), default_objective, config)
    model.by_hand = True
    wanted = run_and_differentiate(model, model.forward, inputs, default_objective)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert ranks.transformed is not None
    varlen = torch.ops.torch_attn._varlen_attn.default
    (node,) = ranks.transformed.original.graph.find_nodes(op="call_function", target=varlen)
    (out,) = [n for n in ranks.transformed.graph.graph.nodes if annotation(n).origin == next(iter(node.users)).name]
    assert out.target is torch.ops.aten.squeeze.dim


def test_equal_lengths_of_keys_are_the_same_and_others_end_the_step() -> None:
    gm, call = opened(other=CU_SEQ.clone(), window_size=(-1, 0))
    assert describe(call) == "causal, documents"
    inputs = [torch.randn(T, H, D, dtype=torch.float64) for _ in range(3)]
    wanted = sequence_by_sequence(*inputs, -1, 0, None)

    def run(lengths_of_keys: Tensor) -> Tensor:
        rest = iter(inputs)
        others = {"l_cu_seq_": CU_SEQ, "l_others_0_": lengths_of_keys}
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        out: Tensor = gm(*(others[name] if name in others else next(rest) for name in names))[0]
        return out

    torch.testing.assert_close(run(CU_SEQ.clone()), wanted)
    with pytest.raises(RuntimeError, match="cu_seq_k is not cu_seq_q"):
        run(torch.cat([CU_SEQ[:1], CU_SEQ[1:-1] + 1, CU_SEQ[-1:]]))


def test_other_keys_are_refused() -> None:
    with pytest.raises(NoRule, match="there are other keys than queries") as error:
        open_varlen_attention(traced(num_keys=T + 1, other=torch.cat([CU_SEQ[:-1], CU_SEQ[-1:] + 1])))
    assert "varlen_attn(q, k, v, cu_seq" in str(error.value)
    assert "test_open_varlen_attention.py:" in str(error.value)


@pytest.mark.skipif("seqused_k" not in signature(varlen_attn).parameters, reason="torch 2.11 has no cache to refuse")
def test_a_cache_is_refused() -> None:
    with pytest.raises(NoRule, match="seqused_k: attention over a cache"):
        open_varlen_attention(traced(trained=False, seqused_k=torch.tensor([3, 1, 6, 2], dtype=torch.int32)))


def test_the_logsumexp_is_refused() -> None:
    with pytest.raises(NoRule, match="logsumexp is used"):
        open_varlen_attention(traced(return_aux=AuxRequest(lse=True)))


def test_graphs_without_it_are_left_alone() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    text = str(gm.graph)
    assert (open_varlen_attention(gm), str(gm.graph)) == (0, text)
