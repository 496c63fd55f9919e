"""Whatever leaves the compiler is an error of ours, with the user's line, the reason and the remedy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import CPError, GraphBreakError, InputError, InternalError, NoRule, explain, verify
from cpcompile.capture.dynamo import compile_whole
from cpcompile.compile import inner as inner_module
from cpcompile.compile.inner import compile_inner
from cpcompile.options.config import Config
from cpcompile.rules import RULES
from tests.graph.small_models import Logits, TinyLM, batch, planned

aten = torch.ops.aten
IDS = {"input_ids": batch()["input_ids"]}


class Wrong:
    """A rule that raises what a fault of ours would."""

    notation = ""

    def push(self, *args: Any) -> Any:
        raise KeyError("no such thing")

    def pull(self, *args: Any) -> Any:
        return None


def test_a_fault_of_a_pass_names_pass_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, aten.linear.default, Wrong())
    with pytest.raises(InternalError) as error:
        explain(TinyLM(), batch(), world_size=2)
    text = str(error.value)
    assert "the pass place_tokens failed: KeyError: 'no such thing'" in text
    assert "self.qkv(x)" in text and "small_models.py:" in text, "the line of the node"
    assert "fault of cpcompile" in text and "report it" in text
    assert isinstance(error.value.__cause__, KeyError)
    assert isinstance(error.value, CPError)


def test_a_fault_outside_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("cpcompile.compile.transform.choose", fails)
    with pytest.raises(InternalError, match="the transformation failed: ZeroDivisionError: by nothing"):
        verify(TinyLM(), batch(), world_size=2)
    monkeypatch.setattr("cpcompile._torch.trace_pre_dispatch", fails)
    with pytest.raises(InternalError, match="the capture failed: ZeroDivisionError: by nothing") as error:
        verify(TinyLM(), batch(), world_size=2)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_inner_compiler_that_fails_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(name: str, *settings: Any) -> Callable[..., Any]:
        def compile_it(gm: Any, inputs: Any) -> Any:
            raise RuntimeError("cannot determine truth value of Relational")

        return compile_it

    monkeypatch.setattr(inner_module._torch, "inner_compiler", compiler)
    transformed = planned(TinyLM(), batch())
    with pytest.raises(InternalError, match=r"inner compiler \(inductor\) failed: RuntimeError: cannot") as error:
        compile_inner(transformed, [], Config())
    assert "inner='aot_eager'" in str(error.value)


def test_what_another_backend_raises_is_wrapped() -> None:
    def backend(gm: Any, inputs: Any) -> Any:
        raise LookupError("nothing here")

    with pytest.raises(InternalError, match="LookupError: nothing here"):
        compile_whole(TinyLM().forward, backend, Config())(**batch())


def test_what_dynamo_itself_raises_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("internal")

    monkeypatch.setattr("torch._dynamo.output_graph.OutputGraph.compile_and_call_fx_graph", fails)
    with pytest.raises(InternalError, match=r"Dynamo failed: .*internal") as error:
        compile_whole(TinyLM().forward, lambda gm, inputs: gm, Config())(**batch())
    assert "torch.compile(model, fullgraph=True)" in str(error.value)


class Raises(Logits):
    def forward(self, input_ids: Tensor, number: int = 0, **others: Any) -> Tensor:  # type: ignore[override]
        if others:
            raise ValueError("give a number")
        return self.logits(input_ids)


def test_what_the_model_raises_is_said_with_its_line() -> None:
    with pytest.raises(GraphBreakError, match=r"it raises ValueError\('give a number'\)") as error:
        explain(Raises(), IDS | {"nunber": 3}, world_size=2)
    assert 'raise ValueError("give a number")' in str(error.value)
    assert "Did you mean number for nunber?" in str(error.value)


def test_ids_that_are_no_integers() -> None:
    inputs = {"input_ids": torch.rand(2, 8)}
    with pytest.raises(InputError, match="fails on shapes and dtypes alone: RuntimeError: Expected tensor") as error:
        explain(Logits(), inputs, world_size=2)
    assert "input_ids float32[2, 8] on cpu" in str(error.value)
    assert "x = self.embedding(input_ids)" in str(error.value)
    with pytest.raises(InputError, match="fails on these inputs without cpcompile, on one device") as error:
        verify(Logits(), inputs, world_size=2)
    assert "x = self.embedding(input_ids)" in str(error.value)


def test_shapes_that_do_not_fit() -> None:
    inputs = batch() | {"labels": batch()["labels"][:, :5]}
    for look in (explain, verify):
        with pytest.raises(InputError, match=r"batch_size \(16\)") as error:
            look(TinyLM(), inputs, world_size=2)
        assert "F.cross_entropy(logits.flatten(0, 1), labels.flatten())" in str(error.value)


@pytest.mark.parametrize("look", [explain, verify])
def test_calls_that_cannot_be(look: Callable[..., Any]) -> None:
    for inputs, text in (
        (IDS["input_ids"], r"the inputs are a Tensor: give them by name, \{'input_ids': ...\}"),
        ({"inputids": IDS["input_ids"]}, "takes no input inputids: did you mean input_ids for inputids"),
        (IDS | {"banana": 1}, r"takes no input banana\. Its inputs are: input_ids, labels"),
        (IDS, "missing a required argument: 'labels'. Its inputs are: input_ids, labels; given by name: input_ids"),
        ({"input_ids": IDS["input_ids"][:, :0], "labels": IDS["input_ids"][:, :0]}, r"no tokens: input_ids \[2, 0\]"),
    ):
        with pytest.raises(InputError, match=text):
            look(TinyLM(), inputs, world_size=2)


class Passing(torch.nn.Module):
    """Passes on what it gets, as a wrapper does."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.inner = torch.nn.Dropout(0.0), TinyLM()

    def forward(self, input_ids: Tensor | None = None, **others: Any) -> Any:
        return self.inner(input_ids, **others)


@pytest.mark.parametrize("look", [explain, verify])
def test_names_that_a_module_inside_does_not_know(look: Callable[..., Any]) -> None:
    for inputs, text in (
        (batch() | {"lables": batch()["labels"]}, r"takes no input lables\. Its inputs are: input_ids, labels"),
        (IDS | {"lables": batch()["labels"]}, r"takes no input lables: did you mean labels for lables\?"),
        (batch() | {"banana": 1}, r"takes no input banana\. Its inputs are: input_ids, labels"),
    ):
        with pytest.raises(InputError, match=text) as error:
            look(Passing(), inputs, world_size=2)
        assert "return self.inner(input_ids, **others)" in str(error.value)


def test_calls_inside_the_model_that_cannot_be() -> None:
    with pytest.raises(GraphBreakError, match=r"it raises TypeError: .*labels") as error:
        explain(Passing(), IDS, world_size=2)
    assert "return self.inner(input_ids, **others)" in str(error.value)


def test_what_was_meant_by_the_argument_that_is_missing() -> None:
    with pytest.raises(
        InputError, match=r"missing a required argument: 'input_ids': did you mean input_ids for inputs_ids\?"
    ):
        explain(Raises(), {"inputs_ids": IDS["input_ids"]}, world_size=2)


def test_a_model_without_values() -> None:
    model = Logits().to("meta")
    with pytest.raises(InputError, match=r"embedding.weight is on the meta device.*to_empty"):
        verify(model, IDS, world_size=2)
    for device in ("cpu", "meta"):
        assert explain(model, {"input_ids": IDS["input_ids"].to(device)}, world_size=2).local_tokens == 4


class Cache:
    """Keys and values of earlier tokens, by the name that transformers gives their number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


class Decodes(Logits):
    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None) -> Tensor:  # type: ignore[override]
        return self.logits(input_ids)


def test_decoding_with_a_cache_is_refused() -> None:
    for look in (explain, verify):
        with pytest.raises(InputError, match=r"past_key_values is a cache that holds 5 tokens.*cpcompile.remove"):
            look(Decodes(), IDS | {"past_key_values": Cache(5)}, world_size=2)
        look(Decodes(), IDS | {"past_key_values": Cache(0)}, world_size=2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_token(world_size: int) -> None:
    inputs = {name: x[:, -1:] for name, x in batch().items()}
    found = verify(TinyLM(), inputs, world_size=world_size, dtype=torch.float64)
    assert found.ok, found


class Picks(Logits):
    """Attends to, or reads, as many tokens as their values say."""

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        if not self.is_attention:
            return x[torch.where(input_ids > 3)].pow(2).sum()
        places = (input_ids.flatten() > 3).nonzero().squeeze(1)
        torch._check(places.shape[0] > 2)
        q = x.flatten(0, 1)[places][None, None]
        return F.scaled_dot_product_attention(q, q, q).sum()


def test_sizes_that_depend_on_values() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for strict, is_attention in itertools.product((True, False), repeat=2):
            model = Picks(is_attention)
            assert verify(model, IDS, world_size=3, dtype=torch.float64, strict=strict).ok
            assert explain(model, IDS, world_size=2, strict=strict).collectives


def test_a_model_that_is_compiled_already() -> None:
    model = torch.compile(TinyLM(), backend="eager")
    assert verify(model, batch(), world_size=2).ok
    assert explain(model, batch(), world_size=2).local_tokens == 4


def test_an_error_of_ours_is_not_wrapped() -> None:
    class Integrates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(13, 8)

        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.trapezoid(self.embedding(input_ids), dim=1)

    with pytest.raises(NoRule) as error:
        explain(Integrates(), IDS, world_size=2)
    assert type(error.value) is NoRule and error.value.__cause__ is None
