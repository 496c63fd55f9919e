"""Flex attention is opened by its score_mod and mask_mod: what they mean is recognised, and the rest stays exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from cpcompile import NoRule, _torch
from cpcompile.capture.lowering import capture
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.lift_masks import describe, lift_masks
from cpcompile.passes.open_flex_attention import open_flex_attention
from cpcompile.zoo.flex import saying_blocks

# Dynamo traces torch's own indexing inside of mods so.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

Tensor = torch.Tensor
B, H, K, S, D = 2, 4, 2, 10, 16
IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3, 5, 5, 5, 5]])
ROW = IDS[1].clone()
PADDING = torch.arange(S) < torch.tensor([S, 7])[:, None]
TABLE = torch.randn(3, H, S, dtype=torch.float64)


def operands(num_key_heads: int = K) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, S, D), (B, num_key_heads, S, D), (B, num_key_heads, S, D)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def captured(
    function: Callable[..., Any], *inputs: Any, length: bool = False
) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return the captured graph and its arguments; with `length`, the tokens of the first input are a symbol."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graph = capture(gm, example_inputs)
        seen.extend((copy.deepcopy(graph), tuple(example_inputs)))
        open_flex_attention(graph)  # here, as the inputs of a compilation are only known during it
        seen.append(graph)
        return graph

    torch._dynamo.reset()
    for x in inputs[:1] if length else ():
        torch._dynamo.mark_dynamic(x, 2)
    with _torch.tracing_one_graph():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    original, args, opened = seen
    assert len(original.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)) >= 1
    opened.meta["original"] = original
    return opened, args


def results(gm: fx.GraphModule, args: tuple[Any, ...]) -> list[Tensor]:
    """Return the results of a graph and their gradients with regard to its inputs."""
    outputs = list(gm(*args))
    trained = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    loss = sum(x.square().sum() for x in outputs if x.requires_grad)
    return [*outputs, *torch.autograd.grad(loss, trained)]


def attend(function: Callable[..., Any], *inputs: Any, length: bool = False) -> list[str]:
    """Check values and gradients of what `function` becomes; return its attentions in words, none if it stays written out."""
    gm, args = captured(function, *inputs, length=length)
    found = find_attention(gm)
    lift_masks(gm)
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    text = str(gm.graph)
    assert (open_flex_attention(gm), find_attention(gm), lift_masks(gm), str(gm.graph)) == (0, 0, 0, text)
    torch.testing.assert_close(results(gm, args), results(gm.meta["original"], args), rtol=1e-10, atol=1e-10)
    attentions = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    assert len(attentions) == found
    return [describe(node) for node in attentions]


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


MASKS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "causal": ("causal", causal),
    "window": ("causal, window 4", lambda b, h, q, kv: (q >= kv) & (q - kv < 4)),
    "documents": ("causal, documents", lambda b, h, q, kv: (q >= kv) & (IDS[b, q] == IDS[b, kv])),
    "one row of documents": ("documents", lambda b, h, q, kv: ROW[q] == ROW[kv]),
    "padding": ("causal, key padding", lambda b, h, q, kv: causal(b, h, q, kv) & PADDING[b, kv]),
    "nothing hidden": ("all", lambda b, h, q, kv: q >= 0),
    "prefix": ("causal, prefix", lambda b, h, q, kv: (kv < 3) | (q >= kv)),
    "rows without a key": ("dense [1, 1, 10, 10]", lambda b, h, q, kv: q > kv + 2),
    "by head": ("dense [1, 4, 10, 10]", lambda b, h, q, kv: (q - kv) % (h + 1) == 0),
    "by table": ("dense [1, 4, 10, 10]", lambda b, h, q, kv: TABLE[1, h, q] > TABLE[1][h][kv]),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_mods(name: str) -> None:
    expected, mask_mod = MASKS[name]

    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_block_mask(mask_mod, B, H, q.shape[2], q.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    def outside(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, scale=0.3)

    assert attend(inside, *operands()) == [expected]
    assert attend(outside, *operands(), create_block_mask(mask_mod, B, H, S, S, device="cpu")) == [expected]


SCORES: dict[str, tuple[list[str], Callable[..., Tensor]]] = {
    "nothing": (["all"], lambda s, b, h, q, kv: s),
    "softcap": (["all"], lambda s, b, h, q, kv: 5.0 * torch.tanh(s / 5.0)),
    "causal": (["causal"], lambda s, b, h, q, kv: torch.where(q >= kv, s, -float("inf"))),
    "linear bias": (["dense [1, 4, 10, 10]"], lambda s, b, h, q, kv: s + (kv - q) * torch.exp2(-(h + 1.0))),
    "table": (["dense [1, 4, 10, 10]"], lambda s, b, h, q, kv: s + TABLE[0, h, q] + TABLE[2][h][kv]),
    "squared": ([], lambda s, b, h, q, kv: s * s.abs()),
    "by place": ([], lambda s, b, h, q, kv: s * TABLE[0, h, q - kv]),
    "all hidden": ([], lambda s, b, h, q, kv: torch.where(q >= 3, s * s, -float("inf"))),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_mods(name: str) -> None:
    expected, score_mod = SCORES[name]
    assert attend(lambda q, k, v: flex_attention(q, k, v, score_mod, enable_gqa=True), *operands()) == expected


def test_the_softcap_is_an_argument() -> None:
    gm, _ = captured(lambda q, k, v: flex_attention(q, k, v, SCORES["softcap"][1]), *operands(H))
    find_attention(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    assert node.args[9] == 5.0


def test_a_trained_bias_has_its_gradient() -> None:
    bias = torch.randn(H, 2 * S - 1, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.arange(S)[:, None], torch.arange(S)

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        mask = create_block_mask(causal, None, None, S, S, device="cpu")
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[h][i - j + S - 1], mask, enable_gqa=True)

    def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        added = bias[:, rows - columns + S - 1].masked_fill(columns > rows, float("-inf"))
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, added, enable_gqa=True),)

    inputs = (*operands(), bias)
    gm, args = captured(function, *inputs)
    assert find_attention(gm) == 0  # the operator has no gradient for a bias: it stays written out
    gm.recompile()
    assert sorted(x.shape for x in args) == sorted(x.shape for x in inputs)
    torch.testing.assert_close(results(gm, inputs), results(reference, inputs), rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]


def test_logsumexp_and_maximum_are_results_too() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        mask = create_block_mask(causal, None, None, S, S, device="cpu")
        out, aux = flex_attention(q, k, v, None, mask, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    assert attend(function, *operands(H)) == []


def test_unused_logsumexp_is_dropped() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        unused = aux.lse * 2.0
        del unused
        return out

    assert attend(function, *operands(H)) == ["all"]


def test_a_symbolic_length_stays_symbolic() -> None:
    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 3)

    def function(x: Tensor) -> Tensor:
        mask = create_block_mask(window, None, None, x.shape[2], x.shape[2], "cpu")
        return flex_attention(x, x[:, :K], x[:, K:], SCORES["softcap"][1], mask, enable_gqa=True)

    (x,) = operands()[:1]
    assert attend(function, x, length=True) == ["causal, window 3"]
    assert attend(lambda x: flex_attention(x, x, x, SCORES["squared"][1]), x, length=True) == []


def test_one_key_head_and_one_batch_of_keys() -> None:
    assert attend(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), *operands(1)) == ["all"]

    def one_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_block_mask(causal, B, None, S, S, device="cpu")
        return flex_attention(q, k[:1], v[:1], block_mask=mask, enable_gqa=True)

    assert attend(one_batch, *operands()) == []


def test_inside_a_checkpoint() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_block_mask(causal, None, None, S, S, device="cpu")

        def block(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
            return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

        return checkpoint(block, q, k, v, mask, use_reentrant=False)

    assert attend(function, *operands()) == ["causal"]


def test_what_a_checkpoint_reads_behind_the_lists_of_blocks() -> None:
    """The lists are not traced; what comes after them among the inputs of the body keeps its place."""
    weight = torch.randn(D, D, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        mask = create_block_mask(causal, None, None, S, S, device="cpu")

        def block(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, weight: Tensor) -> Tensor:
            return flex_attention(q, k, v, block_mask=mask, enable_gqa=True) @ weight

        return checkpoint(block, q, k, v, mask, weight, use_reentrant=False)

    assert attend(function, *operands(), weight) == ["causal"]


def listed_by_hand(full: bool) -> BlockMask:
    """Return a block mask that lists other blocks than those of its mask_mod: the second row of blocks sees two of three."""
    num = torch.tensor([[[1, 2, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1, 2], [1, 0, 2], [2, 1, 0]]]], dtype=torch.int32)
    rest = (torch.tensor([[[0, 0, 1]]], dtype=torch.int32), indices.flip(-1).contiguous()) if full else (None, None)
    return BlockMask.from_kv_blocks(num, indices, *rest, BLOCK_SIZE=4, mask_mod=causal, seq_lengths=(S, S))


def test_the_zoo_lets_torch_read_lists_that_have_no_mask_mod() -> None:
    """Kernels skip blocks that are not listed; uncompiled attention reads the mask_mod only."""
    num, indices = torch.tensor([[[1, 2, 0]]], dtype=torch.int32), torch.tensor([[[[0, 1, 2], [1, 0, 2], [2, 1, 0]]]])
    full = torch.tensor([[[0, 0, 1]]], dtype=torch.int32), indices.flip(-1).int().contiguous()
    made = saying_blocks(BlockMask.from_kv_blocks)(num, indices.int(), *full, BLOCK_SIZE=4, seq_lengths=(12, 12))
    seen = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0]]).bool().repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(create_mask(made.mask_mod, 1, 1, 12, 12, device="cpu")[0, 0], seen)
    assert saying_blocks(BlockMask.from_kv_blocks)(num, indices.int(), mask_mod=causal).mask_mod is causal


def blocks_seen(full: bool) -> Tensor:
    tables = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]), torch.tensor([[0, 0, 0], [0, 0, 0], [int(full), 0, 0]])
    partial, whole = (t.repeat_interleave(4, 0).repeat_interleave(4, 1)[:S, :S].bool() for t in tables)
    return (partial & torch.ones(S, S, dtype=torch.bool).tril()) | whole


@pytest.mark.parametrize("full", [False, True])
def test_blocks_that_are_listed_by_hand(full: bool) -> None:
    """Kernels skip blocks that are not listed; torch without a kernel reads the mask_mod only."""
    inputs = (*operands(), listed_by_hand(full))
    gm, args = captured(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask, enable_gqa=True), *inputs)
    assert (find_attention(gm), lift_masks(gm)) == (1, 0)
    gm.recompile()
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs[:3], blocks_seen(full), enable_gqa=True)
    torch.testing.assert_close(gm(*args)[0], wanted)


def test_no_node_of_a_block_mask_is_left() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = create_block_mask(causal, None, None, S, S, device="cpu")
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    gm, _ = captured(function, *operands())
    find_attention(gm)
    lift_masks(gm)
    gm.graph.eliminate_dead_code()
    assert len([node for node in gm.graph.nodes if node.op == "call_function"]) == 1


def sorted_scores(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return s + TABLE[0][h].sum()


def drawn_scores(s: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return s + torch.rand_like(s)


@pytest.mark.parametrize(
    ("score_mod", "operator"), [(sorted_scores, "aten.sum.default"), (drawn_scores, "aten.rand_like")]
)
def test_what_is_not_of_one_place_is_refused(score_mod: Callable[..., Tensor], operator: str) -> None:
    with pytest.raises(Exception, match="neither pointwise nor an index") as error:
        captured(lambda q, k, v: flex_attention(q, k, v, score_mod, enable_gqa=True), *operands())
    assert "NoRule" in str(error.value) and operator in str(error.value)
    assert "test_flex.py:" in str(error.value)
    assert issubclass(NoRule, ValueError)


def test_graphs_without_flex_attention_are_left_alone() -> None:
    gm = fx.symbolic_trace(lambda x: x + 1)
    text = str(gm.graph)
    assert (open_flex_attention(gm), str(gm.graph)) == (0, text)
