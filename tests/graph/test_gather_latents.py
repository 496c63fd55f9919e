"""A narrow value that determines keys and values travels in their place."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.analysis.patterns.latent import LatentWalk, find_latent, sharded_values
from cpcompile.analysis.patterns.latent_heads import expansions_of
from cpcompile.balance.layout import local_length
from cpcompile.choose.attention import MOST_HELD, AttentionSite, Expansion, Ranks
from cpcompile.choose.attention_sites import attention_nodes
from cpcompile.choose.choice import choose
from cpcompile.choose.cost import seconds
from cpcompile.inspect.explanation import Explanation
from cpcompile.ir.annotation import annotation, placement_of
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Full
from cpcompile.passes import find_token_local, gather_latents, place_tokens
from tests.graph.small_models import TinyLM, batch, before, count, planned
from tests.models import llama, rotate

cp = torch.ops.cpcompile
HEADS, NOPE, ROPE, VALUE, RANK, WIDTH = 3, 4, 2, 5, 6, 8
ITEM, BATCH = 4, 2


class MLA(TinyLM):
    """Multi-head latent attention as one writes it by hand; keys and values may also come from other users of the latent."""

    rank, num_heads = RANK, HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, self.num_heads * (NOPE + ROPE))
        self.down = nn.Linear(WIDTH, self.rank + ROPE)
        self.norm = nn.LayerNorm(self.rank)
        self.up = nn.Linear(self.rank, self.num_heads * (NOPE + VALUE), bias=False)
        self.out = nn.Linear(self.num_heads * VALUE, WIDTH)

    def compressed(self, x: Tensor) -> Tensor:
        return self.down(x)

    def expanded(self, latent: Tensor) -> Tensor:
        return self.up(self.norm(latent))

    def attend(self, x: Tensor) -> Tensor:
        q, q_rope = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split([NOPE, ROPE], -1)
        latent, k_rope = self.compressed(x).split([self.rank, ROPE], -1)
        k, v = self.expanded(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).split([NOPE, VALUE], -1)
        k_rope = rotate(k_rope[:, None]).expand(-1, self.num_heads, -1, -1)
        y = F.scaled_dot_product_attention(
            torch.cat([q, rotate(q_rope)], -1), torch.cat([k, k_rope], -1), v, is_causal=True
        )
        return self.out(y.transpose(1, 2).flatten(2)) + latent.sum(-1, keepdim=True)


class Deep(MLA):
    """Two layers, the second of which attends to what the first has made."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.attend(x)
        return self.head(x + self.attend(x.tanh()))


class Eight(Deep):
    """Heads for more ranks."""

    num_heads = 8


class Convolved(MLA):
    """The latent mixes neighbours before keys and values are computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(RANK, RANK, 3, padding=2)

    def expanded(self, latent: Tensor) -> Tensor:
        return super().expanded(convolved(self.mix, latent))


class Dropped(MLA):
    """What a rank drops of a latent must be what the others drop of it."""

    def expanded(self, latent: Tensor) -> Tensor:
        return super().expanded(F.dropout(latent, 0.25))


class Plain(TinyLM):
    """Keys and values of one head, of a latent of so many numbers; hidden states are wider than either."""

    def __init__(self, rank: int = 8) -> None:
        super().__init__(width=24, heads=3)
        self.q, self.down, self.up = nn.Linear(24, 24), nn.Linear(24, rank), nn.Linear(rank, 16)

    def expanded(self, latent: Tensor) -> Tensor:
        return self.up(latent)

    def attend(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (3, 8)).transpose(1, 2)
        k, v = self.expanded(self.down(x)).unflatten(-1, (2, 1, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


class MixedKeys(Plain):
    """Keys and values of neighbours are mixed, which the latent comes before."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(16, 16, 3, padding=2)

    def expanded(self, latent: Tensor) -> Tensor:
        return convolved(self.mix, super().expanded(latent))


class MixedValues(Plain):
    """Values are sums over earlier tokens, and nothing that they are computed from holds each token's own."""

    def attend(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (3, 8)).transpose(1, 2)
        k, v = self.expanded(self.down(x)).unflatten(-1, (2, 1, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v.cumsum(2), is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


def convolved(mix: nn.Conv1d, x: Tensor) -> Tensor:
    return mix(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


def gathered(explanation: Explanation) -> dict[str, tuple[int, int]]:
    return {c.operator: (c.forward_bytes, c.backward_bytes) for c in explanation.collectives}


def test_gathers_the_latent_and_computes_keys_of_all_tokens() -> None:
    transformed = planned(MLA(), batch(), strategy="latent")
    gm = before(transformed, find_token_local)
    assert gather_latents(gm, plan=transformed.plan) == 1
    gm.graph.lint()
    (mark,) = gm.graph.find_nodes(op="call_function", target=cp.whole_tokens.default)
    assert mark.meta["val"].shape == (BATCH, 8, RANK + ROPE)
    place_tokens(gm, plan=transformed.plan)
    (attention,) = attention_nodes(gm)
    assert all(isinstance(placement_of(Call.of(attention)[name]), Full) for name in "kv")
    assert mark.args[0].target is cp.gather_tokens.default


def test_leaves_other_strategies_alone() -> None:
    transformed = planned(MLA(), batch(), strategy="ring")
    gm = before(transformed)
    text = gm.graph.python_code("self").src
    assert gather_latents(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


def test_second_run_changes_nothing() -> None:
    transformed = planned(MLA(), batch(), strategy="latent")
    gm = before(transformed, gather_latents)
    text = gm.graph.python_code("self").src
    assert gather_latents(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


def check(
    model: nn.Module, inputs: dict[str, Tensor], strategy: str = "latent", **options: Any
) -> cpcompile.Verification:
    torch._dynamo.reset()
    result = cpcompile.verify(model, inputs, dtype=torch.float64, strategy=strategy, **options)
    assert result.ok, result
    assert max(result.loss_error, result.worst_gradient[1]) < 1e-10
    return result


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize(("world_size", "length"), [(1, 7), (2, 11), (3, 16), (4, 13), (8, 21)])
def test_keeps_numerics(world_size: int, length: int, layout: str) -> None:
    result = check(Deep(), batch(length), world_size=world_size, balancer=layout)
    assert result.transformed.changes["gather_latents"] == 2
    assert count(result.transformed.graph, cp.latent_attention.default) == 2


@pytest.mark.parametrize(
    ("world_size", "length", "layout"),
    [(1, 7, "zig_zag"), (2, 11, "contiguous"), (3, 16, "zig_zag"), (4, 13, "contiguous"), (8, 21, "zig_zag")],
)
def test_own_heads_keep_numerics(world_size: int, length: int, layout: str) -> None:
    model = Deep() if world_size == 3 else Eight()
    result = check(model, batch(length), "latent_heads", world_size=world_size, balancer=layout)
    graph = result.transformed.graph
    assert count(graph, cp.latent_heads_attention.default) == 2
    products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    widths = [node.meta["val"].shape[-1] for node in products]
    assert widths.count(model.num_heads // world_size * (NOPE + VALUE)) == 2


SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "use_cache": False, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 6,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "pad_token_id": 0,
}  # fmt: skip


def deepseek(version: str) -> nn.Module:
    """Return a tiny DeepSeek of transformers, one dense layer and one with experts."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"Deepseek{version}Config")(**SIZES)
    make = getattr(transformers, f"Deepseek{version}ForCausalLM")
    model = make._from_config(config, attn_implementation="sdpa", experts_implementation="batched_mm")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()  # type: ignore[no-any-return]


def tokens(length: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 61, (BATCH, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize(
    ("version", "world_size", "layout"), [("V3", 3, "zig_zag"), ("V3", 2, "contiguous"), ("V2", 4, "zig_zag")]
)
def test_deepseek_keeps_numerics(version: str, world_size: int, layout: str) -> None:
    result = check(deepseek(version), tokens(19), world_size=world_size, balancer=layout)
    assert result.transformed.changes["gather_latents"] == 2


@pytest.mark.parametrize(("version", "world_size"), [("V3", 4), ("V2", 2)])
def test_own_heads_of_deepseek_keep_numerics(version: str, world_size: int) -> None:
    result = check(deepseek(version), tokens(19), "latent_heads", world_size=world_size)
    assert count(result.transformed.graph, cp.latent_heads_attention.default) == 2


@pytest.mark.parametrize(("version", "layout"), [("V3", "zig_zag"), ("V2", "contiguous")])
def test_deepseek_sends_its_latent(version: str, layout: str) -> None:
    explanation = cpcompile.explain(deepseek(version), tokens(19), world_size=4, balancer=layout, strategy="latent")
    width = BATCH * (SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]) * ITEM  # type: ignore[operator]
    sent = 3 * local_length(19, 4, layout) * width
    assert [(s.strategy, s.forward_bytes, s.backward_bytes) for s in explanation.sites] == [("latent", sent, sent)] * 2
    assert gathered(explanation)["cp.gather_tokens"] == (2 * sent, 2 * sent)
    text = str(explanation)
    assert "keys and values of model.layers.0.self_attn are computed from it" in text
    torch._dynamo.reset()
    other = cpcompile.explain(deepseek(version), tokens(19), world_size=4, balancer=layout, strategy="gather")
    assert other.sites[0].forward_bytes > 3 * sent


def test_own_heads_send_the_latent_queries_and_outputs() -> None:
    explanation = cpcompile.explain(deepseek("V3"), tokens(16), world_size=4, strategy="latent_heads")
    (latent, query, value), heads = (10, 12, 6), 4
    assert latent == SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]  # type: ignore[operator]
    local, others = 4, 12
    unit = BATCH * ITEM
    forward = unit * (3 * local * latent + local * (heads - 1) * query + others * value)
    backward = unit * (3 * local * latent + local * (heads - 1) * value + others * query)
    assert [(s.strategy, s.forward_bytes, s.backward_bytes) for s in explanation.sites] == [
        ("latent_heads", forward, backward)
    ] * 2
    site = explanation.sites[0]
    assert site.received_bytes == unit * 16 * (query + value)  # keys and values of one head
    assert not any("weight" in value.value for value in explanation.inputs)


def test_heads_that_ranks_do_not_divide_are_gathered() -> None:
    with pytest.warns(UserWarning, match="use gather in place of latent_heads: no latent determines its keys"):
        transformed = planned(MLA(), batch(), strategy="latent_heads")
    assert transformed.choice.strategies == ("gather",)


class Mixed(MLA):
    """Each head's keys and values have to do with all other heads."""

    def expanded(self, latent: Tensor) -> Tensor:
        x = super().expanded(latent).unflatten(-1, (self.num_heads, -1))
        return (x * x.mean(-2, keepdim=True)).flatten(-2)


def test_heads_that_depend_on_each_other_are_not_computed_apart() -> None:
    transformed = planned(Mixed(), batch(), world_size=3, strategy="ring")
    found = expansions_of(attention_nodes(transformed.analysed), transformed.plan.token_dims)
    transformed = planned(MLA(), batch(), world_size=3, strategy="ring")
    found += expansions_of(attention_nodes(transformed.analysed), transformed.plan.token_dims)
    assert [expansion is not None and expansion.by_heads for expansion in found] == [False, True]
    assert found[0] is not None


def test_the_residual_stream_is_no_latent_of_narrow_keys() -> None:
    """Two key heads of 4 are narrower than the 24 numbers that they come from, and their own copies for more heads are wider."""
    model = llama(num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="use gather in place of latent: nothing narrower than its keys and values"):
        explanation = cpcompile.explain(model, tokens(16), world_size=2, strategy="latent")
    assert explanation.sites[0].strategy == "gather"


NEAR_MISSES = {
    "mixed after": (MixedKeys, False),
    "values mixed after": (MixedValues, False),
    "as wide": (lambda: Plain(16), False),
    "wider": (lambda: Plain(20), False),
    "narrower": (lambda: Plain(15), True),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_as_they_are(name: str) -> None:
    make, is_latent = NEAR_MISSES[name]
    transformed = planned(make(), batch(), strategy="ring")
    (node,) = attention_nodes(transformed.analysed)
    assert (find_latent(node) is not None) == is_latent


def test_a_latent_that_mixes_neighbours_travels_when_it_is_mixed() -> None:
    result = check(Convolved(), batch(11), world_size=3)
    marks = result.transformed.graph.graph.find_nodes(op="call_function", target=cp.whole_tokens.default)
    assert torch.ops.aten.layer_norm.default in {annotated.args[0].args[0].target for annotated in marks}
    assert result.transformed.changes["gather_latents"] == 1


def test_what_was_dropped_travels() -> None:
    transformed = planned(Dropped(), batch(), strategy="ring")
    latent = find_latent(*attention_nodes(transformed.analysed))
    assert latent is not None
    assert torch.ops.aten.dropout.default not in {node.target for node in latent.expansion}


def test_of_equal_cuts_the_one_with_fewest_messages_and_least_work_travels() -> None:
    transformed = planned(MLA(), batch(), strategy="ring")
    (node,) = attention_nodes(transformed.analysed)
    latent = find_latent(node)
    assert latent is not None
    assert [value.target for value in latent.cut] == [torch.ops.aten.linear.default]
    assert {value.target for value in latent.expansion} >= {
        torch.ops.aten.layer_norm.default,
        torch.ops.aten.cat.default,
    }
    keys = BATCH * HEADS * (NOPE + ROPE + VALUE) * ITEM
    flops = 2 * BATCH * RANK * HEADS * (NOPE + VALUE)
    assert latent.numbers == Expansion(BATCH * (RANK + ROPE) * ITEM, keys, flops, 1)


def test_other_users_of_the_latent_keep_their_tokens() -> None:
    graph = planned(MLA(), batch(), strategy="latent").graph
    (mark,) = graph.graph.find_nodes(op="call_function", target=cp.whole_tokens.default)
    gather = mark.args[0]
    assert isinstance(gather, torch.fx.Node)
    others = [user for user in gather.args[0].users if user is not gather]  # type: ignore[union-attr]
    assert others
    assert all(not isinstance(annotation(user).placement, Full) for user in others)


# DeepSeek-V3: 128 heads of 128 + 64 and 128, a latent of 512 + 64, in bf16.
SITE = AttentionSite(1, 128, 128, 8192, 192, 128, 2, "cuda", True, 0, False)
LATENT = Expansion(2 * 576, 2 * 128 * 320, 2 * 512 * 128 * 256)


def test_costs_less_than_sending_keys_and_more_than_exchanging_heads() -> None:
    site = replace(SITE, tokens=32768, latent=LATENT)
    for ranks, factor in ((Ranks(16), 0.25), (Ranks(8), 1.0)):
        latent, gather, ulysses = (seconds(site, name, "zig_zag", ranks) for name in ("latent", "gather", "ulysses"))
        assert ulysses < latent < factor * gather
        assert choose([site], "auto", "zig_zag", ranks).strategies != ("latent",)


def test_own_heads_cost_least_between_hosts() -> None:
    site, ranks = replace(SITE, tokens=32768, latent=replace(LATENT, by_heads=True)), Ranks(16)
    costs = {name: seconds(site, name, "zig_zag", ranks) for name in site.strategies(ranks)}
    assert min(costs, key=costs.__getitem__) == "latent_heads"
    assert choose([site], "auto", "zig_zag", ranks).strategies == ("latent_heads",)
    assert "latent_heads" not in site.strategies(Ranks(24))


def test_auto_weighs_the_work_that_the_latent_repeats() -> None:
    """Of little work, it is the cheapest; of much, it is taken where it is asked for."""
    site = replace(SITE, tokens=32768, latent=LATENT, value_dim=SITE.value_dim)
    for factor, is_cheapest in ((0, True), (40, False)):
        changed = replace(site, latent=replace(LATENT, flops=factor * LATENT.flops, key_bytes=LATENT.key_bytes // 2))
        assert (choose([changed], "auto", "zig_zag", Ranks(16)).strategies == ("latent",)) == is_cheapest
        assert choose([changed], "latent", "zig_zag", Ranks(16)).strategies == ("latent",)


def test_auto_does_not_take_it_for_keys_that_fill_the_memory() -> None:
    for tokens, axis in itertools.product((2**16, 2**18), (Ranks(16), Ranks(64))):
        site = replace(SITE, tokens=tokens, latent=LATENT)
        assert site.tokens * LATENT.key_bytes > MOST_HELD
        assert choose([site], "auto", "zig_zag", axis).strategies != ("latent",)
        assert choose([site], "latent", "zig_zag", axis).strategies == ("latent",)


class BeginsInside(nn.Module):
    """Features and a token of the model's own: the sharded stream begins inside, at the first attention."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(1, 1, 32))
        names = {"q": (32, 64), "k": (32, 32), "v": (32, 32), "out": (64, 32)}
        self.layers = nn.ModuleList([nn.ModuleDict({n: nn.Linear(*w) for n, w in names.items()}) for _ in range(2)])

    def forward(self, features: Tensor) -> Tensor:
        x = torch.cat([self.own.expand(features.shape[0], -1, -1), features], 1)
        for layer in self.layers:
            h = F.layer_norm(x, [32])
            heads = [layer[n](h).unflatten(-1, (-1, 8)).transpose(1, 2) for n in ("q", "k", "v")]
            x = x + layer["out"](F.scaled_dot_product_attention(*heads, enable_gqa=True).transpose(1, 2).flatten(2))
        return x.square().mean()


@pytest.mark.parametrize("strategy", ["latent", "latent_heads"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_that_begins_inside(strategy: str, world_size: int) -> None:
    inputs, options = {"features": torch.randn(2, 10, 32)}, {"strict": False, "strategy": strategy}
    with pytest.warns(
        UserWarning, match=r"1 attention\(s\) use gather in place of latent"
    ):  # the first, before the stream
        found = cpcompile.verify(BeginsInside(), inputs, world_size=world_size, dtype=torch.float64, **options)
    found.raise_if_wrong()
    assert found.transformed.choice.strategies[-1] == strategy


class Turned(TinyLM):
    """Keys turned by a learned table of positions, which no input comes into (RoFormer), and wider than what they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, 4 * WIDTH) for _ in range(3))
        self.table = nn.Embedding(64, WIDTH)
        self.out = nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (4, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        turn = self.table(torch.arange(x.shape[1]))[None, None]
        y = F.scaled_dot_product_attention(q * turn, k * turn, v)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("strategy", ["latent", "latent_heads"])
def test_a_table_of_positions_travels_beside_the_latent(strategy: str, world_size: int) -> None:
    found = cpcompile.verify(Turned(), batch(11), world_size=world_size, dtype=torch.float64, strategy=strategy)
    found.raise_if_wrong()
    assert found.transformed.choice.strategies == (strategy,)


class Tall(MLA):
    """Four layers along one residual stream."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for _ in range(4):
            x = x + F.gelu(x + self.attend(x))
        return self.head(x)


@pytest.mark.parametrize("make", [Tall, lambda: llama(num_hidden_layers=4)])
def test_the_walk_ends_within_a_layer_with_the_cut_of_all_layers(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformed = planned(make(), tokens(16), strategy="ring")
    sharded = sharded_values(transformed.analysed.graph, transformed.plan.token_dims)

    def walked() -> list[tuple[int, tuple[fx.Node, ...]]]:
        walks = [LatentWalk(node, sharded) for node in attention_nodes(transformed.analysed)]
        cuts = [walk.narrowest() for walk in walks]
        return [(len(walk.operands), cut) for walk, cut in zip(walks, cuts, strict=True)]

    early, cut = walked(), LatentWalk._cut
    monkeypatch.setattr(LatentWalk, "_cut", lambda self, more=(): (len(more), cut(self)[1]))  # is never done early
    whole = walked()
    assert [cut for _, cut in early] == [cut for _, cut in whole]
    assert early[3][0] == early[2][0] < whole[2][0] < whole[3][0]
