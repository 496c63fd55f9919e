"""What a step holds: predicted from graphs, less where blocks are computed again, and as much as a length and a device allow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.errors import ConfigError
from cpcompile.inspect.explanation import Explanation
from cpcompile.inspect.longest_sequence import longest_sequence, stretched
from cpcompile.memory.fit import GIB, fitting, wanted_bytes
from cpcompile.memory.ledger import Ledger, Phase
from cpcompile.memory.timeline import Timeline
from tests.graph.small_models import TinyLM, batch, planned

WIDTH, LAYERS, VOCABULARY = 64, 4, 96


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """A language model whose blocks are in a list."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def tokens(length: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def explained(length: int = 256, layers: int = LAYERS, **options: Any) -> Explanation:
    return cpcompile.explain(Stack(layers), tokens(length), **{"world_size": 2, "memory": True} | options)


def ledger(length: int = 256, **options: Any) -> Ledger:
    found = explained(length, **options).memory
    assert found is not None
    return found


def held(of: Ledger, kind: str) -> list[int]:
    return [phase.held.get(kind, 0) for phase in of.phases]


@pytest.mark.parametrize("budget", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("world_size", "length"), [(1, 9), (3, 13)])
def test_blocks_that_are_computed_again_are_exact(budget: float, world_size: int, length: int) -> None:
    found = cpcompile.verify(
        Stack().double(), tokens(length), world_size=world_size, memory_budget=budget, dtype=torch.float64
    )
    found.raise_if_wrong()
    assert found.transformed.changes.get("recompute_blocks", 0) == {0.0: 4, 0.3: 3, 1.0: 0}[budget]


def test_less_budget_never_takes_more() -> None:
    peaks = [ledger(1024, memory_budget=budget) for budget in (1.0, 0.5, 0.25, 0.0)]
    saved = [max(held(of, "saved")) for of in peaks]
    assert saved == sorted(saved, reverse=True) and saved[-1] < saved[0] / 2
    # Where the last block is computed again as well, backward begins with all that it computes, beside the inputs of the others.
    assert peaks[0].peak > peaks[1].peak > max(peaks[2].peak, peaks[3].peak)


def test_heads_take_no_memory_between_the_passes_of_blocks_that_are_computed_again() -> None:
    options: dict[str, Any] = {"memory_budget": 0.0, "balancer": "contiguous", "layers": 2}
    ring, ulysses = (max(held(ledger(1024, strategy=name, **options), "saved")) for name in ("ring", "ulysses"))
    assert ring == ulysses
    # With all kept, either has q, k and v; by heads there is room for the output once more.
    kept = [max(held(ledger(1024, layers=2, strategy=name), "saved")) for name in ("ring", "ulysses")]
    assert kept[1] - kept[0] <= 2 * 512 * WIDTH * 4


def test_blocks_in_checkpoints_of_the_user_are_left_to_them() -> None:
    class Checkpointed(Stack):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    options = {"world_size": 2, "memory": True}
    ours, own, both = (
        cpcompile.explain(model, tokens(512), **options, memory_budget=budget).memory
        for model, budget in ((Stack(), 0.0), (Checkpointed(), 1.0), (Checkpointed(), 0.0))
    )
    assert ours is not None and own is not None and both is not None
    assert own.peak == both.peak
    assert abs(ours.peak - own.peak) < 0.03 * own.peak  # the last block may keep its result


def test_packed_documents_in_blocks_are_exact() -> None:
    """Where documents begin is told inside of the first block, and kept."""

    class Packed(Stack):
        def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids, labels)

    places = torch.cat([torch.arange(5), torch.arange(8)])[None]
    inputs = tokens(13) | {"position_ids": places}
    options = {"documents": "positions", "memory_budget": 0.0, "dtype": torch.float64}
    found = cpcompile.verify(Packed().double(), inputs, world_size=2, **options)
    found.raise_if_wrong()
    assert found.transformed.changes["recompute_blocks"] == LAYERS


def test_the_choice_knows_what_blocks_compute_or_exchange_again() -> None:
    def estimates(**options: Any) -> tuple[float, float]:
        found = planned(Stack(), tokens(256), **options).choice.estimates
        return found["zig_zag", "ring"], found["zig_zag", "ulysses"]

    kept, half, none = (estimates(memory_budget=budget) for budget in (1.0, 0.5, 0.0))
    assert kept[0] == half[0] == none[0]  # a ring keeps its result, and exchanges nothing again
    assert none[1] > kept[1] and half[1] - kept[1] == pytest.approx((none[1] - kept[1]) / 2)
    again = estimates(memory_budget=0.0, recompute_attention=True)
    assert again[0] > none[0] and again[1] > none[1]
    assert estimates(recompute_attention=True) == kept


def test_elementwise_results_are_computed_again() -> None:
    again, kept = (
        max(held(ledger(1024, layers=2, recompute_elementwise=is_again), "saved")) for is_again in (True, False)
    )
    # Of each token and block at least the input of the product behind gelu, which is four times as wide.
    assert kept - again >= 2 * 512 * 4 * WIDTH * 4


def test_refuses_a_model_without_blocks() -> None:
    with pytest.raises(ConfigError, match="no list of blocks"):
        cpcompile.explain(TinyLM(), batch(), world_size=2, memory_budget=0.5)
    with pytest.raises(ConfigError, match="not between 0"):
        cpcompile.Config(memory_budget=1.5)


def test_what_is_there_before_a_step() -> None:
    num = sum(p.numel() for p in Stack(1).parameters())
    of = ledger(layers=1, optimizer_states=2)
    assert [phase.name for phase in of.phases] == ["forward", "backward", "optimizer"]
    assert held(of, "parameters") == [4 * num] * 3
    assert held(of, "optimizer") == [8 * num] * 3
    assert held(of, "gradients")[0] == 0 and held(of, "gradients")[2] == 4 * num
    sharded = ledger(layers=1, fully_sharded=cpcompile.FullySharded(4))
    assert held(sharded, "parameters")[0] <= num + 4 * WIDTH * 4 and held(sharded, "gathered parameters")[0] > 0


def test_a_wrapper_that_averages_holds_gradients_twice() -> None:
    alone, wrapped = (ledger(layers=1, grad_sync="mean", ddp=ddp) for ddp in (False, True))
    buckets = sum(p.nbytes for p in Stack(1).parameters())
    assert held(alone, "buckets") == [0] * 3 and held(wrapped, "buckets") == [buckets] * 3
    assert wrapped.peak == alone.peak + buckets and wrapped.resident == alone.resident + buckets
    with pytest.raises(ConfigError, match="ddp or fully_sharded"):
        explained(ddp=True, fully_sharded=cpcompile.FullySharded(2))


def test_prints_and_gives_data() -> None:
    found = explained(layers=1)
    text, data = str(found), found.to_dict()
    assert "predicted memory of a rank" in text and "saved" in text and "test_memory.py:" in text
    assert data["memory"]["phases"][1]["name"] == "backward"
    assert "predicted" not in str(explained(memory=False))


def test_the_longest_sequence_fits_and_no_longer_one() -> None:
    room = ledger(8192).peak
    found = longest_sequence(Stack(2), tokens(64), device_bytes=room, world_size=2)
    assert found.ledger.peak <= room
    assert ledger(found.tokens + max(2048, found.tokens // 32), layers=2).peak > room
    assert longest_sequence(Stack(2), tokens(64), device_bytes=1000, world_size=2).tokens == 0


def graph_of(function: Any, *shapes: tuple[int, ...]) -> fx.GraphModule:
    return torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(*map(torch.empty, shapes))


def totals(gm: fx.GraphModule, room: int = 0) -> list[int]:
    moments = Timeline(gm.graph, lambda node: "any", lambda node: room, lambda node: True).run()
    return [moment.total // 4096 for moment in moments]


def test_chains_are_stored_where_products_read_them() -> None:
    """By hand, in units of a matrix of 32 x 32: one input, then one product at a time."""
    size = (32, 32)
    gm = graph_of(lambda a, b: (a @ b).sin().cos() @ b, size, size)
    # Two inputs; the product; `sin` and `cos` are one kernel that writes in its place; the second product, of which `b` and
    # the chain are the last readers.
    assert totals(gm) == [2, 3, 2, 3, 1]
    assert max(totals(gm, room=4096)) == 4


def test_one_kernel_frees_what_it_reads_behind_all_its_results() -> None:
    """By hand: the backward of an MLP with a gate. A kernel of three results may write none in the place of what others read."""
    size = (32, 32)

    def gated(gate: Tensor, up: Tensor, d: Tensor, w: Tensor) -> Tensor:
        gate, up, d = gate @ w, up @ w, d @ w
        return (gate.cos() * up @ w) + (d * gate.sin() @ w) + (d * up @ w)

    # Four inputs that are freed one by one; three products become six tensors, and then one after the other.
    found = totals(graph_of(gated, *[size] * 4))
    assert max(found) == 7  # six and w
    one = totals(graph_of(lambda gate, up, w: (gate @ w).cos() * (up @ w) @ w, *[size] * 3))
    assert max(one) == 4  # in the place of a product


def test_kernels_stand_where_their_first_operator_stands() -> None:
    """A sum over tokens and a later one of the same are one kernel, and the product between comes behind it."""
    gm = graph_of(lambda a, w: (a.sum(0), (a + 1) @ w, (a * 2).sum(0)), (32, 32), (32, 32))
    moments = Timeline(gm.graph, lambda node: "any", lambda node: 0, lambda node: True).run()
    order = [moment.node.target for moment in moments if moment.node is not None]
    assert order == [torch.ops.aten.sum.dim_IntList, torch.ops.aten.add.Tensor, torch.ops.aten.mm.default]


def test_views_hold_what_they_view() -> None:
    gm = graph_of(lambda a: (a @ a).t()[:1] @ a, (32, 32))
    assert totals(gm)[:2] == [1, 2]


@dataclass
class Line:
    """Predicts as if each block that keeps its results took one GiB, and tiles saved one more; remembers what was asked."""

    blocks: int = 10
    asked: list[float] = field(default_factory=list)

    def __call__(self, config: cpcompile.Config) -> tuple[Ledger, int]:
        self.asked.append(config.memory_budget)
        kept = round(config.memory_budget * self.blocks)
        size = (5 + kept - bool(config.tile)) * GIB
        return Ledger((Phase("backward", {"saved": size - GIB, "parameters": GIB}, ""),)), self.blocks


@pytest.mark.parametrize(
    ("limit", "budget", "tile"), [(15, 1.0, 0), (20, 1.0, 0), (11.5, 0.6, 0), (6, 0.1, 0), (5, 0.0, 0), (4, 0.0, 4096)]
)
def test_the_plan_that_fits_computes_least_again(limit: float, budget: float, tile: int) -> None:
    line, config = Line(), cpcompile.Config(memory="fit")
    level, found = fitting(config, line, line(config), int(limit * GIB))
    plan = level.of(config)
    assert plan.memory_budget == pytest.approx(budget) and plan.tile == tile
    assert found.peak <= limit * GIB and len(line.asked) <= 5
    assert level.numbered(level.number) == level


def test_what_does_not_fit_is_refused() -> None:
    config = cpcompile.Config(memory="fit")
    with pytest.raises(ConfigError, match=r"needs 4 GiB .* there are 3 GiB. It is most in backward .*saved 3,"):
        fitting(config, Line(), Line()(config), 3 * GIB)
    for wrong in ("fit:", "fit:0", "fit:0.0", "fti"):
        with pytest.raises(ConfigError, match="'fit:40' at most 40 GiB"):
            cpcompile.Config(memory=wrong)
    with pytest.raises(ConfigError, match="inner='eager' does not"):
        cpcompile.Config(memory="fit", inner="eager")
    assert wanted_bytes("fit:1.5") == 1.5 * GIB and wanted_bytes("fit") == 0


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="memory_budget"):
        cpcompile.verify(Stack(), tokens(8), world_size=2, memory="fit")
    with pytest.raises(ConfigError, match="memory_budget"):
        explained(memory="fit")
    with pytest.raises(ConfigError, match="whole groups"):
        explained(fully_sharded=cpcompile.FullySharded(3))


@pytest.mark.parametrize("num_outer", [1, 2])
def test_blocks_are_found_inside_of_what_holds_them(num_outer: int) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
            self.stages = nn.ModuleList(nn.Sequential(Block(), Block()) for _ in range(num_outer))

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for stage in self.stages:
                x = stage(x)
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    transformed = planned(Outer(), tokens(16), memory_budget=0.0)
    assert transformed.changes["recompute_blocks"] == 2 * num_outer
    plain = planned(Stack(3), tokens(16), memory_budget=0.0)
    assert plain.changes["recompute_blocks"] == 3


def test_what_a_caller_holds_counts() -> None:
    class Logits(Stack):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            x = self.embedding(input_ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    found = cpcompile.explain(Logits(1), {"input_ids": tokens(4096)["input_ids"]}, world_size=2, memory=True).memory
    assert found is not None
    logits = 2048 * VOCABULARY * 4
    backward = found.phases[1].held
    assert backward["returned"] >= logits and backward["temporary"] >= logits  # the logits, and their gradient


def test_a_batch_as_large_as_the_length_stays() -> None:
    ids = torch.zeros(16, 16, dtype=torch.long)
    of_labels = stretched(ids, 16, 64, None, {1})
    assert of_labels.shape == (16, 64) and stretched(ids, 16, 64, 1, {1}).shape == (16, 64)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    assert stretched(mask, 16, 64, None, {1}).shape == (1, 1, 64, 64)


def test_a_table_of_positions_that_ends_is_told() -> None:
    class Learned(Stack):
        def __init__(self) -> None:
            super().__init__(1)
            self.places = nn.Parameter(torch.zeros(1, 64, WIDTH))

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embedding(input_ids) + self.places[:, : input_ids.shape[1]]
            return F.cross_entropy(self.head(self.blocks[0](x)).flatten(0, 1), labels.flatten())

    with pytest.raises(ConfigError, match="takes 64 tokens, but not 2048"):
        longest_sequence(Learned(), tokens(64), device_bytes=GIB, world_size=2)
