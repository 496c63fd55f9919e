"""Token-local regions: experts that sort their tokens run on local tokens, and stay exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.analysis.regions.rows import locate_rows
from cpcompile.ir.annotation import annotation
from cpcompile.ir.placement import Sharded
from cpcompile.passes import find_token_local
from tests.graph.small_models import TinyLM, batch, before, planned

WIDTH, EXPERTS, TOP = 8, 5, 2
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def sorted_experts(experts: nn.Module, x: Tensor, weights: Tensor, routes: Tensor) -> Tensor:
    """Rows `[N, D]` and their routes `[N, k]`, sorted by expert; every expert reads its rows, and their results are added."""
    flat = routes.flatten()
    order = flat.argsort(stable=True)
    rows, expert = order // routes.shape[1], flat[order]
    up, down = experts.get_parameter("up"), experts.get_parameter("down")
    hidden = torch.bmm(x[rows][:, None], up[expert]).relu()
    result = torch.bmm(hidden, down[expert])[:, 0] * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, rows, result)


class PlainExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 6))
        self.down = nn.Parameter(torch.randn(EXPERTS, 6, WIDTH))

    def forward(self, x: Tensor, weights: Tensor, routes: Tensor) -> Tensor:
        return sorted_experts(self, x, weights, routes)


@cpcompile.token_local
class DeclaredExperts(PlainExperts):
    pass


@cpcompile.token_local
class ClaimedExperts(PlainExperts):
    """Declared, but the rows are added up first."""

    def forward(self, x: Tensor, weights: Tensor, routes: Tensor) -> Tensor:
        return super().forward(x.cumsum(0), weights, routes)


class DeclaredFunction(PlainExperts):
    def forward(self, x: Tensor, weights: Tensor, routes: Tensor) -> Tensor:
        return declared_function(self, x, weights, routes)


declared_function = cpcompile.token_local(sorted_experts)


class SparseBlock(nn.Module):
    """`[B, S, D]` to `[B, S, D]`: a router and experts of flattened tokens."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, 1)
        scores = self.router(rows)
        weights, routes = scores.softmax(-1).topk(TOP)
        return self.experts(rows, weights, routes).view(x.shape), scores


class SparseLM(TinyLM):
    """A sparse block behind attention; the loss counts how the tokens are spread over the experts."""

    def __init__(self, experts: type[nn.Module] = DeclaredExperts) -> None:
        super().__init__()
        self.block = SparseBlock(experts())
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        y, scores = self.block(x + self.attend(x))
        loss = F.cross_entropy(self.head(x + y).flatten(0, 1), labels.flatten())
        return loss + scores.softmax(-1).mean(0).square().sum()


class TwoFunctions(TinyLM):
    """Two functions that are declared, one behind the other."""

    def attend(self, x: Tensor) -> Tensor:
        return lower(upper(x))


@cpcompile.token_local
def upper(x: Tensor) -> Tensor:
    return x.sort(-1).values


@cpcompile.token_local
def lower(x: Tensor) -> Tensor:
    return x.flip(-1).cos()


def test_functions_have_their_own_names() -> None:
    found = cpcompile.explain(TwoFunctions(), batch(12), world_size=2, memory=True)
    assert [region.module for region in found.regions] == ["upper", "lower"]


def region_of(transformed: Any) -> list[Any]:
    return [node for node in transformed.graph.graph.nodes if annotation(node).region]


def check(model: nn.Module, length: int = 11, **options: Any) -> Any:
    """Return what `verify` says; the rounding of float64 and no more is let pass."""
    settings = {"world_size": 3, "balancer": "zig_zag", "tolerance": 1e-12} | options
    return cpcompile.verify(model, batch(length), **settings)


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("length", [12, 17])
def test_experts_that_sort_are_exact(layout: str, world_size: int, dynamic: bool, length: int) -> None:
    result = check(SparseLM(), length, world_size=world_size, balancer=layout, dynamic=dynamic)
    assert result.ok, result
    assert result.transformed.changes["find_token_local"] == 1


@pytest.mark.parametrize(
    ("experts", "options"),
    [
        (DeclaredFunction, {}),
        (PlainExperts, {"token_local": ["PlainExperts"]}),
        (PlainExperts, {"token_local": ["bl*.experts"]}),
        (PlainExperts, {"token_local": ["block"]}),  # with the router, whose scores are a second result
    ],
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_ways_to_declare(experts: type[nn.Module], options: dict[str, Any], dynamic: bool) -> None:
    result = check(SparseLM(experts), dynamic=dynamic, **options)
    assert result.ok, result
    assert result.transformed.changes["find_token_local"] == 1


class PlacedExperts(DeclaredExperts):
    """Reads, beside the rows, token ids and positions that every rank holds whole, and a table that holds no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, WIDTH))

    def forward(self, x: Tensor, ids: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        routes = torch.stack([ids % EXPERTS, positions % EXPERTS], 1)
        return super().forward(x + self.table[positions], x[:, :TOP].sigmoid(), routes)


class PlacedLM(SparseLM):
    def __init__(self) -> None:
        super().__init__(PlacedExperts)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        rows = (x + self.attend(x)).flatten(0, 1)
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        y = self.block.experts(rows, input_ids.flatten(), positions.flatten())
        return F.cross_entropy(self.head(x.flatten(0, 1) + y), labels.flatten())


@pytest.mark.parametrize("dynamic", [True, False])
def test_whole_values_with_tokens_are_localised(dynamic: bool) -> None:
    result = check(PlacedLM(), 17, dynamic=dynamic)
    assert result.ok, result
    assert result.transformed.changes["find_token_local"] == 1


def test_what_is_not_declared_is_refused() -> None:
    with pytest.raises(cpcompile.NoRule, match=r"argsort.*order of all tokens"):
        check(SparseLM(PlainExperts))
    with pytest.raises(cpcompile.ConfigError, match="token_local='PlainExperts' is a str, and this option is a list"):
        check(SparseLM(PlainExperts), token_local="PlainExperts")


def test_a_false_declaration_is_wrong_and_verify_says_so() -> None:
    assert not check(SparseLM(ClaimedExperts)).ok


def test_pass_finds_each_region_once() -> None:
    transformed = planned(SparseLM(), batch())
    gm = before(transformed)
    assert find_token_local(gm, plan=transformed.plan) == 1
    text = str(gm.graph)
    assert find_token_local(gm, plan=transformed.plan) == 0
    assert str(gm.graph) == text
    found = [node for node in gm.graph.nodes if annotation(node).region == "block.experts"]
    assert found and all(node.meta["stack_trace"].count("sorted_experts") for node in found)


def test_pass_leaves_other_models_alone() -> None:
    transformed = planned(TinyLM(), batch())
    gm = before(transformed)
    text = str(gm.graph)
    assert find_token_local(gm, plan=transformed.plan) == 0
    assert str(gm.graph) == text


def test_explain_lists_regions() -> None:
    explanation = cpcompile.explain(SparseLM(), batch(), world_size=2)
    assert [region.module for region in explanation.regions] == ["block.experts"]
    assert "1 token-local region(s)" in str(explanation)


# Regions that cannot be what they were declared.


class Rows(nn.Module):
    """A declared module of the rows; `function` gets them."""

    function: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, weights: Tensor, routes: Tensor) -> Tensor:
        return type(self).function(x)


def of_rows(function: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    return cpcompile.token_local(type("Declared", (Rows,), {"function": staticmethod(function)}))


def sum_of_rows(x: Tensor) -> Tensor:
    return x.sum(0).expand_as(x).sum(0).expand(x.shape[1])


def shorter(x: Tensor) -> Tensor:
    return x[1:]


def noise(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0]


def one_row_more(x: Tensor) -> Tensor:
    return x.new_ones(x.shape[0] + 1, x.shape[1])[: x.shape[0]] * x


REFUSED = [
    (sum_of_rows, "does not have the rows"),
    (shorter, "does not have the rows"),
    (noise, "draws random numbers"),
    (attention, "holds an attention"),
    (one_row_more, "how many tokens the size"),
]


class Ending(SparseLM):
    """Uses the result of the region whatever its shape is."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        rows = (x + self.attend(x)).flatten(0, 1)
        y = self.block.experts(rows, rows, rows)
        return y.square().mean() + self.head(x).square().mean()


@pytest.mark.parametrize(("function", "reason"), REFUSED)
def test_refuses_what_is_not_of_rows(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(cpcompile.NoRule, match=reason) as error:
        check(Ending(of_rows(function)))
    assert "block.experts is declared token-local" in str(error.value)
    assert "test_token_local.py" in str(error.value)
    assert "strict=False" in str(error.value)


@pytest.mark.parametrize("function", [sum_of_rows, shorter, one_row_more])
def test_computes_whole_what_is_refused_if_not_strict(function: Callable[[Tensor], Tensor]) -> None:
    result = check(Ending(of_rows(function)), strict=False)
    assert result.ok, result
    assert not region_of(result.transformed)


def at_most_eleven(x: Tensor) -> Tensor:
    return x.clamp(max=11)


def test_a_fixed_length_that_may_be_another_number_is_refused() -> None:
    model = Ending(of_rows(at_most_eleven))
    with pytest.raises(cpcompile.NoRule, match=r"fixed length 11 it cannot be told.*(?s:.)*dynamic=True"):
        check(model, 11, dynamic=False)
    assert check(model, 13, dynamic=False).ok
    assert check(model, 11).ok


@pytest.mark.parametrize(
    ("shape", "at", "target", "found"),
    [
        ((2, 7, 4), Sharded(1), (2, 7, 3), Sharded(1)),
        ((2, 7, 4), Sharded(1), (14, 3), Sharded(0)),
        ((14, 4), Sharded(0), (2, 7, 3, 5), Sharded(1)),
        ((7, 2, 4), Sharded(0), (7, 9), Sharded(0)),
        ((14, 4), Sharded(0, inner=2), (7, 2, 3), Sharded(0)),
        ((7, 2, 4), Sharded(1), (7, 2, 3), None),
        ((14, 4), Sharded(0), (4, 14), None),
        ((14, 4), Sharded(0), (28, 4), None),
        ((2, 7, 4), Sharded(1), (7, 4), None),
        ((2, 7, 4), Sharded(1), (4,), None),
    ],
)
def test_rows_are_located_by_leading_dims(shape: Any, at: Sharded, target: Any, found: Sharded | None) -> None:
    assert locate_rows(shape, target, at, 7) == found


# Models of transformers.

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False, "pad_token_id": 0,
    "num_local_experts": 5, "num_experts": 5, "n_routed_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 12,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "shared_expert_intermediate_size": 20,
}  # fmt: skip
MODELS = {
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "qwen2_moe": "Qwen2Moe",
    "deepseek_v3": "DeepseekV3",
    "gpt_oss": "GptOss",
    "olmoe": "Olmoe",
    "granitemoe": "GraniteMoe",
}


def moe(name: str, experts: str, **changes: Any) -> nn.Module:
    """Return a tiny random model of transformers."""
    import transformers

    kind = getattr(transformers, f"{MODELS[name]}Config")
    known = {key: value for key, value in SIZES.items() if key in kind.__dataclass_fields__}
    if name == "deepseek_v3":
        known |= {"num_key_value_heads": 4}
    torch.manual_seed(0)
    make = getattr(transformers, f"{MODELS[name]}ForCausalLM")
    attention = "eager" if name == "gpt_oss" else "sdpa"
    model = make._from_config(kind(**known | changes), attn_implementation=attention, experts_implementation=experts)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def tokens(length: int, **others: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 61, (2, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), **others}


@pytest.mark.parametrize(
    ("name", "world_size", "layout"),
    [
        *((name, 3, "zig_zag") for name in MODELS),
        ("mixtral", 2, "contiguous"),
        ("gpt_oss", 2, "contiguous"),
        ("deepseek_v3", 2, "zig_zag"),
    ],
)
def test_transformers_in_float64(name: str, world_size: int, layout: str) -> None:
    model = moe(name, "batched_mm")
    result = cpcompile.verify(model, tokens(19), world_size=world_size, balancer=layout, dtype=torch.float64)
    assert result.ok, result
    assert max(result.loss_error, result.worst_gradient[1]) < 1e-10
    assert result.transformed.changes["find_token_local"] >= 1


@pytest.mark.parametrize(("name", "dynamic"), [("mixtral", True), ("mixtral", False), ("gpt_oss", True)])
def test_transformers_with_grouped_products(name: str, dynamic: bool) -> None:
    result = cpcompile.verify(moe(name, "grouped_mm"), tokens(19), world_size=3, balancer="zig_zag", dynamic=dynamic)
    assert result.ok, result


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_auxiliary_loss_is_of_all_tokens(name: str, is_masked: bool) -> None:
    model = moe(name, "batched_mm", output_router_logits=True, router_aux_loss_coef=1.0)
    mask = {"attention_mask": (torch.arange(19) < torch.tensor([[19], [12]])).long()} if is_masked else {}
    result = cpcompile.verify(model, tokens(19, **mask), world_size=3, balancer="zig_zag", dtype=torch.float64)
    assert result.ok, result
    assert max(result.loss_error, result.worst_gradient[1]) < 1e-10


def test_recorded_outputs_trace_at_the_first_call() -> None:
    explanation = cpcompile.explain(moe("mixtral", "grouped_mm", output_router_logits=True), tokens(19), world_size=2)
    assert [region.module for region in explanation.regions] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]


def test_a_loop_over_the_experts_that_were_chosen_does_not_trace() -> None:
    with pytest.raises(cpcompile.GraphBreakError, match=r"modeling_mixtral.py"):
        cpcompile.verify(moe("mixtral", "eager"), tokens(19), world_size=2)
