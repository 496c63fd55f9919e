"""Layers have names for profiles: of each node, of each call of a function that stands for several, and in the ranges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from cpcompile import _torch
from cpcompile._torch.layer_marks import closing
from cpcompile.compile.layer_names import LayerNames
from cpcompile.compile.outline_layers import outline_layers
from cpcompile.errors import module_path
from cpcompile.runtime import layer_ranges
from cpcompile.runtime.layer_ranges import LayerRange, enter_layer, path_here
from tests.graph.small_models import planned
from tests.graph.test_profile import Block, Stack

INVOKE = torch.ops.higher_order.invoke_subgraph
IDS = {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}
CPU = torch.profiler.ProfilerActivity.CPU


class Inside(nn.Module):
    """What stands beside blocks, with modules of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.product = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.product(self.table(input_ids))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.layers = Inside(), nn.ModuleList(Block() for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.patches(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids))


def names_of(gm: fx.GraphModule) -> list[str]:
    names = LayerNames(gm)
    return [name for name in dict.fromkeys(map(names.of, gm.graph.nodes)) if name]


def test_a_layer_is_a_block_or_the_module_next_to_blocks() -> None:
    graph = planned(Whole(), IDS).graph
    assert names_of(graph) == ["encoder.patches", *(f"encoder.layers.{i}" for i in range(4)), "head"]


def test_each_call_of_equal_layers_has_its_own_name() -> None:
    graph = planned(Stack(), IDS).graph
    assert outline_layers(graph) == 4
    calls = graph.graph.find_nodes(op="call_function", target=INVOKE)
    assert [module_path(call) for call in calls] == [f"blocks.{i}" for i in range(4)]
    assert [[*call.meta["nn_module_stack"]] for call in calls] == [
        [f"blocks.{i}"] for i in range(4)
    ]  # all that it is of


def test_a_call_across_a_border_is_of_the_layer_whose_attention_it_has() -> None:
    graph = planned(Stack(), IDS).graph
    names, nodes = LayerNames(graph), [node for node in graph.graph.nodes if node.op == "call_function"]
    (first, second, *_) = [i for i, node in enumerate(nodes) if "ring_attention" in str(node.target)]
    assert names.of_call(nodes[first + 1 : second + 1]) == "blocks.1"
    assert names.of_call(nodes[first : second + 1]) == "blocks.{0,1}"


def test_programs_with_other_names_are_compiled_apart() -> None:
    """Inductor's caches know a program by what it computes, and not by the names of its modules."""

    class Other(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.layers = self.blocks
            del self.blocks

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            for layer in self.layers:
                x = layer(x)
            return x

    graphs = [planned(model, IDS).graph for model in (Stack(), Other())]
    keys = [LayerNames(graph).key for graph in graphs]
    assert keys[0] != keys[1] == keys[0].replace("blocks", "layers")


def test_nothing_is_recorded_where_no_profiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: pytest.fail(name))
    enter_layer("blocks.0")
    enter_layer("")


def test_ranges_follow_one_another() -> None:
    with torch.profiler.profile(activities=[CPU], acc_events=True) as profile:
        for name in ("blocks.0", "blocks.1", "", "blocks.1 backward", ""):
            enter_layer(name)
            torch.ones(2) + 1
    found = [event for event in profile.events() if LayerRange.of(event.name)]
    assert [str(LayerRange.of(event.name)) for event in found] == [event.name for event in found]
    assert [event.name.removeprefix("cpcompile.layer ") for event in found] == [
        "blocks.0",
        "blocks.1",
        "blocks.1 backward",
    ]
    for a, b in itertools.pairwise(found):
        assert a.time_range.end <= b.time_range.start


def test_a_range_is_not_continued_by_another_profiler() -> None:
    with torch.profiler.profile(activities=[CPU]):
        enter_layer("blocks.0")  # a step that raises leaves it open
    enter_layer("blocks.1")
    with torch.profiler.profile(activities=[CPU]) as profile:
        enter_layer("")
    assert not [event for event in profile.events() if LayerRange.of(event.name)]


def test_a_compiled_step_that_raises_leaves_no_range_open() -> None:
    marks = _torch.LayerMarks(lambda node: "", enter_layer)

    def step() -> None:
        enter_layer("blocks.3")
        raise ValueError("the user's")

    with torch.profiler.profile(activities=[CPU]), pytest.raises(ValueError, match="the user's"):
        closing(step, marks)()
    assert layer_ranges._OPEN.range is None
    assert path_here("blocks.{0..5}.attn") == "blocks.{0..5}.attn"


@pytest.mark.parametrize(
    ("layer", "shared", "expected"),
    [
        ("model.layers.7", "model.layers.{0..31}.self_attn", "model.layers.7.self_attn"),
        ("model.layers.7", "model.layers.{0,2,..,30}", "model.layers.7"),
        ("stages.1.blocks.3", "stages.{0,1}.blocks.{0..5}.attn", "stages.1.blocks.3.attn"),
        ("model.layers.{0,1}", "model.layers.{0,2,..,30}.attn", "model.layers.{0,2,..,30}.attn"),
        ("head", "model.layers.{0..31}.attn", "model.layers.{0..31}.attn"),
        ("", "blocks.3", "blocks.3"),
    ],
)
def test_a_shared_path_is_that_of_the_open_layer(
    monkeypatch: pytest.MonkeyPatch, layer: str, shared: str, expected: str
) -> None:
    monkeypatch.setattr(layer_ranges._OPEN, "layer", layer)
    assert path_here(shared) == expected


def test_generated_code_says_which_layer_it_comes_to() -> None:
    """Only where a layer begins and where the last ends; what backward adds up belongs to what came before."""

    def node(name: str) -> Any:
        return fx.Graph().create_node("placeholder", name)

    marks = _torch.LayerMarks(lambda node: {"a": "blocks.0", "b": "blocks.1"}.get(node.target, ""), enter_layer)
    forward, backward = [""], [""]
    for name in ("a", "x", "b", "x"):
        forward.append(marks.after(forward[-1], node(name), False))
        backward.append(marks.after(backward[-1], node(name), True))
    assert forward == ["", "blocks.0", "", "blocks.1", ""]
    assert backward == ["", *["blocks.0 backward"] * 2, *["blocks.1 backward"] * 2]
