"""Repeated calls: Inductor does not look again at a graph that has not changed, nor prove strides that are there."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.ir import ExternKernel, FixedLayout, InputBuffer, TensorBox
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile._torch.repeated_calls import is_unchanged, strides_as_they_are, values_once

aten = torch.ops.aten
INVOKE = torch.ops.higher_order.invoke_subgraph


def graph_with_a_function() -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return a graph that calls a function, and the function."""
    body = make_fx(lambda x: (x.sin(),), tracing_mode="fake")(torch.ones(3))
    outer = make_fx(lambda x: x.cos(), tracing_mode="fake")(torch.ones(3))
    outer.body = body
    (cos,) = outer.graph.find_nodes(op="call_function", target=aten.cos.default)
    with outer.graph.inserting_before(cos):
        name = outer.graph.get_attr("body")
        call = outer.graph.call_function(INVOKE, (name, "body", cos.args[0]))
    call.meta["val"] = (cos.meta["val"],)
    return outer, body


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_change_is_seen_in_a_graph_and_in_what_it_calls(is_inside: bool) -> None:
    outer, body = graph_with_a_function()
    updater = FakeTensorUpdater(outer)
    assert is_unchanged(updater)
    old, gm = (aten.sin.default, body) if is_inside else (aten.cos.default, outer)
    (node,) = gm.graph.find_nodes(op="call_function", target=old)
    node.target = aten.exp.default
    assert not is_unchanged(updater)


def test_a_graph_is_looked_at_twice_only_if_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[FakeTensorUpdater] = []
    monkeypatch.setattr(FakeTensorUpdater, "incremental_update", lambda self: looked_at.append(self) or 1)
    outer, _ = graph_with_a_function()
    updater = FakeTensorUpdater(outer)
    with values_once():
        assert [updater.incremental_update() for _ in range(2)] == [1, 0]
        next(iter(outer.graph.find_nodes(op="call_function", target=aten.cos.default))).target = aten.exp.default
        assert updater.incremental_update() == 1
    assert len(looked_at) == 2


def test_strides_that_are_there_need_no_proof() -> None:
    layout = FixedLayout(torch.device("cpu"), torch.float32, [2, 3], [3, 1])
    x = TensorBox.create(InputBuffer(name="x", layout=layout))
    with strides_as_they_are():
        assert ExternKernel.require_exact_strides(x, [3, 1]) is x
        with pytest.raises(AttributeError):  # a proof, which needs a graph
            ExternKernel.require_exact_strides(x, [1, 2])
    with pytest.raises(AttributeError):
        ExternKernel.require_exact_strides(x, [3, 1])
