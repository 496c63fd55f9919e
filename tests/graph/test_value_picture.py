"""Which rank holds which tokens of a value, as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import ConfigError, explain
from cpcompile.balance.layout import positions
from tests.graph.small_models import TinyLM, batch, mean_loss
from tests.graph.test_cli import invoke

P, S = 3, 20


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
def test_tokens_of_ranks(layout: str) -> None:
    """The strip has each token's rank, of a length that the number of ranks does not divide."""
    plan = explain(TinyLM(), batch(S), world_size=P, balancer=layout)
    head, line, where, scale, strip = plan.value("transpose").splitlines()
    assert head == "transpose: f32[2, 2, 20, 4] Sharded(2)"
    assert line.startswith("  q, k, v = ")
    assert where == f"dim 2: 20 tokens, {layout}; all other dims are whole on each rank"
    assert scale.split() == ["0", "19"]
    held = [[at for at in positions(S, rank, P, layout).tolist() if at < S] for rank in range(P)]
    assert [[i for i, c in enumerate(strip.strip()) if c == str(rank)] for rank in range(P)] == [
        sorted(h) for h in held
    ]


def test_rows_of_the_loss_are_sharded_too() -> None:
    """Batch and tokens in one dim; what the loss is made of, as the passes behind the placement insert it."""
    plan = explain(TinyLM(), batch(S), world_size=P, balancer="contiguous")
    assert "dim 0: 2 x 20 tokens, contiguous" in plan.value("flatten_3")
    for name in ("reshape_default", "ne_scalar"):
        assert "[40] Sharded(0)" in plan.value(name)
        assert plan.value(name).splitlines()[-1].strip() == "0" * 7 + "1" * 7 + "2" * 6
    assert plan.value("sum_default").endswith("an addend on each of 3 ranks; the value is their sum")
    assert plan.value("all_reduce_default").endswith("whole on each of 3 ranks")


class InARow(TinyLM):
    """Reads all tokens but the last, and four features of each as tokens of their own."""

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        cut = x[:, :-1] * 2
        return super().attend(x) + x.unflatten(-1, (4, 2)).flatten(1, 2).sin().mean() + cut.mean()


def test_ranges_and_features_between_tokens() -> None:
    plan = explain(InARow(), batch(S), world_size=P, balancer="contiguous")
    assert "dim 1: 20 tokens of 4 in a row" in plan.value("sin")
    cut = plan.value("mul")
    assert "Sharded(1, tokens 0:-1)" in cut
    assert "dim 1: 19 tokens" in cut
    assert cut.splitlines()[-1].strip() == "0" * 7 + "1" * 7 + "2" * 5


class Documents(TinyLM):
    """A token attends to its own document, where the token 0 begins the next."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        documents = (input_ids == 0).cumsum(1)
        seen = documents[:, None, :, None] == documents[:, None, None]
        rows = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embedding(input_ids)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, seen & (rows[:, None] >= rows))
        return mean_loss(self.head(x + out.transpose(1, 2).flatten(-2)), labels)


def test_layout_that_follows_documents() -> None:
    plan = explain(Documents(), batch(S), world_size=P, balancer="zig_zag_by_document")
    assert plan.layout == "zig_zag_by_document"
    assert plan.value("transpose").endswith("which tokens a rank holds follows from the documents of each batch")


def test_long_sequences_fit_a_line() -> None:
    plan = explain(TinyLM(), batch(1000), world_size=P, balancer="contiguous")
    strip = plan.value("transpose").splitlines()[-1].strip()
    assert (len(strip), set(strip)) == (64, {"0", "1", "2"})


def test_unknown_value() -> None:
    with pytest.raises(ConfigError, match=r"no value of the graph is called 'transpos'.*Did you mean 'transpose'"):
        explain(TinyLM(), batch(S), world_size=P).value("transpos")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn.py").write_text(
        "from tests.graph.small_models import TinyLM, batch\n\ndef of_length(length):\n    return TinyLM(), batch(length)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    shown = invoke("explain", "drawn:of_length", "--length", "20", "--world-size", "2", "--value", "sum_default")
    assert shown.exit_code == 0, shown.output
    assert "an addend on each of 2 ranks" in shown.output
