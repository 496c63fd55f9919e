"""What cannot be sharded exactly is refused with the user's line, the reason and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import ConfigError, CPError, GraphBreakError, NoRule, explain
from tests.graph.small_models import Logits, TinyLM, batch

IDS = {"input_ids": batch()["input_ids"]}


class Applied(Logits):
    """Applies a function to the embedded tokens, then attends."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.function(self.embedding(input_ids))
        return self.head(x)


def refused(model: torch.nn.Module, inputs: dict[str, Any] = IDS, **options: Any) -> str:
    """Return the text of the refusal, on two ranks."""
    with pytest.raises(CPError) as error:
        explain(model, inputs, world_size=2, **options)
    return str(error.value)


def row(x: Tensor) -> Tensor:
    """Return one number for each token: there is no other dim that ranks could share."""
    return x[:1, :, 0]


ALONG_TOKENS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "no rule": (lambda x: torch.linalg.inv(x @ x.mT), "torch.linalg.inv(x @ x.mT)", "no rule for this operator"),
    "sort": (lambda x: row(x).sort(1)[0], "row(x).sort(1)[0]", "needs the order of all tokens by value"),
    "largest": (
        lambda x: x + row(x).topk(3, 1)[0].sum(),
        "row(x).topk(3, 1)[0]",
        "needs the order of all tokens by value",
    ),
    "middle": (lambda x: x + x.median(), "x.median()", "needs the order of all tokens by value"),
    "drawn": (lambda x: x + torch.empty_like(x).exponential_(), "exponential_()", "draw them before the model"),
    "pool": (
        lambda x: x + F.avg_pool1d(row(x), 3, 2).sum(),
        "F.avg_pool1d(row(x), 3, 2)",
        "a pool along the tokens leaves fewer tokens",
    ),
    "norm": (
        lambda x: F.group_norm(x[:1], 1),  # tokens are its channels
        "F.group_norm(x[:1], 1)",
        "runs over the tokens of the whole sequence",
    ),
}


@pytest.mark.parametrize(("function", "line", "reason"), ALONG_TOKENS.values(), ids=ALONG_TOKENS.keys())
def test_operator_along_tokens(function: Callable[[Tensor], Tensor], line: str, reason: str) -> None:
    text = refused(Applied(function))
    assert line in text
    assert "test_refusals.py:" in text
    assert reason in text
    assert "Sharded(" in text
    assert re.search(r"of \[(2, 8, 8|1, 8|1, 8, 8)\]", text)
    assert "register a rule for this case (cpcompile.rules.rule)" in text


def test_all_refusals_are_named_at_once() -> None:
    def twice(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.linalg.qr(x)[0]
        return x + x.median()

    with pytest.raises(NoRule, match=r"aten.linalg_qr.default") as caught:
        explain(Applied(twice), IDS, world_size=2)
    (others,) = [note for note in caught.value.__notes__ if note.startswith("Refused as well")]
    _, again, other = others.splitlines()
    assert "x = x + torch.linalg.qr(x)[0]" in again and again.endswith(", 2 times")
    assert "needs the order of all tokens by value" in other and "x.median() test_refusals.py:" in other


def test_rows_that_hold_parts_of_two_sequences() -> None:
    inputs = {"input_ids": torch.arange(18).view(2, 9) % 8}
    text = refused(Applied(lambda x: x.reshape(3, 6, 8)), inputs)
    assert "x.reshape(3, 6, 8)" in text
    assert "[2, 9, 8] -> [3, 6, 8] moves tokens between ranks" in text
    assert "register a rule for this case (cpcompile.rules.rule)" in text


def test_refusals_are_value_errors() -> None:
    with pytest.raises(ValueError, match="topk") as error:
        explain(Applied(lambda x: x + row(x).topk(3, 1)[0].sum()), IDS, world_size=2)
    assert type(error.value) is NoRule


class Broken(Logits):
    """Breaks the graph."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        torch._dynamo.graph_break()
        return self.head(x)


def test_graph_break() -> None:
    with pytest.raises(GraphBreakError) as error:
        explain(Broken(), IDS, world_size=2)
    text = str(error.value)
    assert "does not trace as one graph" in text
    assert "torch._dynamo.graph_break()" in text
    assert "test_refusals.py:" in text
    assert "Change this line so that it traces" in text


class DataDependent(Logits):
    """Branches on values."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        if x.sum() > 0:
            x = -x
        return self.head(x)


def test_branch_on_values() -> None:
    text = refused(DataDependent())
    assert "if x.sum() > 0:" in text and "test_refusals.py:" in text
    assert "does not trace as one graph" in text
    assert "Write torch.where(condition, a, b)" in text


def choose_by_item(x: Tensor) -> Tensor:
    return -x if x.sum().item() > 0 else x


def choose_by_bool(x: Tensor) -> Tensor:
    return -x if bool((x > 0).all()) else x


@pytest.mark.parametrize("choose", [choose_by_item, choose_by_bool])
def test_branch_on_a_number_that_was_a_value(choose: Callable[[Tensor], Tensor]) -> None:
    text = refused(Applied(choose))
    assert "return -x if" in text and "Write torch.where(condition, a, b)" in text


def test_a_size_of_values_is_no_branch() -> None:
    text = refused(Applied(lambda x: x[:, : int(x.sum().item())]))
    assert "which operators run" not in text


def test_condition_on_tokens() -> None:
    text = refused(Applied(lambda x: torch.cond(x.sum() > 0, lambda x: -x, lambda x: x + 1, (x,))))
    assert "no rule for cond" in text and "Write torch.where(condition, a, b)" in text


class Named(TinyLM):
    """Calls its tokens otherwise, and embeds them without a lookup."""

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(features)


def test_no_token_input() -> None:
    text = refused(Named(), {"features": torch.rand(2, 8, 8)})
    assert "cannot tell which input holds the tokens (inputs of this graph: features [2, 8, 8])" in text
    assert "token_dims={'features': 1}" in text
    explain(Named(), {"features": torch.rand(2, 8, 8)}, world_size=2, token_dims={"features": 1})


def test_unknown_token_input() -> None:
    text = refused(TinyLM(), batch(), token_dims={"tokens": 1})
    assert text == "token_dims names tokens, but the inputs of the model are: input_ids, labels."


class TwoInputs(Logits):
    """Has token inputs of two lengths."""

    def forward(self, question: Tensor, answer: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(question).sum() + self.logits(answer).sum()


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown option 'stratgy': the options are strategy, balancer, kernel"):
        explain(TinyLM(), batch(), world_size=2, stratgy="ring")


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("strategy", "rings", "'auto', 'halo', 'ulysses', 'usp', 'ring', 'gather'"),
        ("balancer", "spiral", "'auto', 'contiguous', 'zig_zag'"),
        ("outputs", "some", "'local', 'full'"),
        ("grad_sync", "max", "'sum', 'mean', 'none'"),
    ],
)
def test_bad_choice_lists_the_good_ones(option: str, value: str, choices: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}='{value}' is not an option: choose one of {choices}"):
        explain(TinyLM(), batch(), world_size=2, **{option: value})


@pytest.mark.parametrize("balancer", ["zig_zag:2", "balanced:", "balanced:1", "balanced:x", "balanced:-2"])
def test_only_layouts_that_follow_documents_are_dealt_to_groups(balancer: str) -> None:
    with pytest.raises(ConfigError, match=f"balancer='{balancer}' is not an option"):
        explain(TinyLM(), batch(), world_size=4, inner_size=2, balancer=balancer)


def test_groups_are_those_of_the_mesh() -> None:
    with pytest.raises(
        ConfigError,
        match="balancer='balanced:4' is for 4 ranks that exchange heads, and here are 2: use balancer='balanced'",
    ):
        explain(TinyLM(), batch(), world_size=4, inner_size=2, balancer="balanced:4")
    with pytest.raises(ConfigError, match="and here are none"):
        explain(TinyLM(), batch(), world_size=4, balancer="balanced:2")


def test_nothing_to_shard() -> None:
    class Whole(Logits):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.embedding.weight.sum() + 0 * input_ids.sum()

    text = refused(Whole())
    assert "nothing in this model could be sharded" in text
    assert "token_dims={'name': dim}" in text


def test_no_rank() -> None:
    with pytest.raises(ConfigError, match="world_size=0"):
        explain(TinyLM(), batch(), world_size=0)
