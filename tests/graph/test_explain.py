"""The plan as text, as data and as code, without processes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import nn

import cpcompile
from cpcompile import ConfigError, explain
from cpcompile.inspect.text import size, table
from tests.graph.small_models import TinyLM, batch, mean_loss
from tests.graph.test_memory import LAYERS, Stack, tokens

B, S, HEADS, DIM, P = 2, 8, 2, 4, 4
BYTES = 4  # float32
PARAMETERS = sum(p.numel() for p in TinyLM().parameters())


def plan(world_size: int = P, length: int = S, **options: Any) -> Any:
    return explain(TinyLM(), batch(length), world_size=world_size, **options)


def test_fields() -> None:
    found = plan(strategy="ring", balancer="zig_zag")
    assert (found.world_size, found.tokens, found.local_tokens, found.layout) == (P, S, S // P, "zig_zag")
    assert found.token_inputs == {"input_ids": 1}
    (site,) = found.sites
    assert (site.heads, site.kv_heads, site.head_dim) == (HEADS, HEADS, DIM)
    assert (site.mask, site.strategy, site.layout) == ("causal", "ring", "zig_zag")
    assert site.line.startswith("small_models.py:")
    assert {(i.value, i.shape, i.dim) for i in found.inputs} == {("input_ids", (B, S), 1), ("labels", (B, S), 1)}
    assert found.estimates.keys() == {"zig_zag/ring"}
    assert found.taken == "zig_zag/ring"


def test_refuses_more_ranks_than_a_plan_ends_for() -> None:
    with pytest.raises(ConfigError, match=r"world_size=100000: a plan without processes .* at most 4096 ranks"):
        plan(world_size=100_000)


class Windowed(TinyLM):
    """Two attentions, of which one has a window."""

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[1], device=x.device)
        near = (rows[:, None] >= rows) & (rows[:, None] - rows < 3)
        return super().attend(x) + torch.nn.functional.scaled_dot_product_attention(x, x, x, near)


def test_the_estimate_taken_is_that_of_all_attentions() -> None:
    found = explain(Windowed(), batch(64), world_size=2)
    assert {site.strategy for site in found.sites} == {"ring", "halo"}
    assert found.taken.endswith("/ring + halo")
    assert found.work is not None and found.work.seconds >= found.estimates[found.taken]
    (line,) = [line for line in str(found).splitlines() if line.endswith("taken")]
    assert line.split()[:4] == [found.layout, "ring", "+", "halo"]


def test_without_attention() -> None:
    class Plain(TinyLM):
        def attend(self, x: torch.Tensor) -> torch.Tensor:
            return x

    text = str(explain(Plain(), batch(S), world_size=P))
    assert "\nno attention\n" in text
    assert "attention(s)" not in text and "of all attentions" not in text


@pytest.mark.parametrize("returned", [None, 3])
def test_a_model_that_returns_no_tensor(returned: Any) -> None:
    class Silent(TinyLM):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:  # type: ignore[override]
            super().forward(input_ids, labels)
            return returned

    with pytest.raises(cpcompile.CPError, match=r"the model returns no tensor.*return the loss or the logits"):
        explain(Silent(), batch(S), world_size=P)


def test_gpus_are_not_for_a_model_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"device='h100' is GPUs, and the model is on the CPU.*meta"):
        plan(device="h100")
    inputs = {name: x.to("meta") for name, x in batch(S).items()}
    found = explain(TinyLM().to("meta"), inputs, world_size=P, device="h100")
    assert found.machine is not None and found.machine.name == "h100"


@pytest.mark.parametrize("look", [explain, cpcompile.verify])
def test_what_is_no_module(look: Any) -> None:
    with pytest.raises(cpcompile.InputError, match=r"the model is a function: give a torch\.nn\.Module"):
        look(lambda input_ids: input_ids, {"input_ids": torch.zeros(1, 4)}, world_size=2)


class Both(TinyLM):
    """Returns the logits too."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(input_ids, labels), self.logits(input_ids)


@pytest.mark.parametrize("outputs", ["local", "full"])
def test_what_is_returned(outputs: str) -> None:
    found = explain(Both(), batch(S), world_size=P, outputs=outputs)
    loss, logits = found.outputs
    assert (loss.shape, loss.dim, logits.shape[:2]) == ((), None, (B, S))
    assert logits.dim == (1 if outputs == "local" else None)
    lines = str(found).splitlines()
    (row,) = [line for line in lines if line.strip().startswith(logits.value)]
    assert ("local tokens of this rank along dim 1" if outputs == "local" else "whole") in row
    assert any("a number" in line and "whole" in line for line in lines)


def test_text_shows_what_matters() -> None:
    text = str(plan(strategy="ring", balancer="zig_zag"))
    for part in ("8 tokens on 4 ranks, 2 slots each, layout zig_zag; tokens of input_ids (dim 1)", "1 attention(s)",
                 "causal", "ring", "sharded where", "gradient sum of parameters", "estimated attention time"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) < 160


def test_is_plain_data() -> None:
    data = json.loads(json.dumps(plan().to_dict()))
    assert data["sites"][0]["heads"] == HEADS
    assert set(data) == set(type(plan()).__dataclass_fields__)


# Keys and values of one rank: batch, slots, heads, dim; two tensors.
KV = 2 * B * (S // P) * HEADS * DIM * BYTES
QUERY = KV // 2


@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_bytes_of_keys(strategy: str) -> None:
    """The first rank's keys are needed by all others, in backward once more; it fetches none, whose gradients it would send."""
    (site,) = plan(strategy=strategy, balancer="contiguous").sites
    assert (site.forward_bytes, site.backward_bytes) == ((P - 1) * KV, (P - 1) * KV)
    (site,) = plan(strategy=strategy, balancer="zig_zag").sites
    assert (site.forward_bytes, site.backward_bytes) == ((P - 1) * KV, 3 * (P - 1) * KV // 2)


def test_bytes_of_ulysses_with_a_head_for_each_rank() -> None:
    """A rank of P=2 keeps half of what it has, and sends the other half of q, k, v and of the output."""
    (site,) = plan(world_size=2, strategy="ulysses").sites
    whole = B * (S // 2) * HEADS * DIM * BYTES
    assert site.forward_bytes == (3 * whole + whole) // 2
    assert site.backward_bytes == (whole + 3 * whole) // 2


def test_work_of_each_rank() -> None:
    (site,) = plan(strategy="ring", balancer="contiguous").sites
    assert site.pairs == tuple(B * HEADS * pairs for pairs in (1 + 2, 3 + 4, 5 + 6, 7 + 8))
    assert site.imbalance == pytest.approx(15 / 9)
    (site,) = plan(strategy="ring", balancer="zig_zag").sites
    assert (len(set(site.pairs)), site.imbalance) == (1, 1.0)
    (site,) = plan(world_size=2, strategy="ulysses").sites
    assert site.pairs == (B * S * (S + 1) // 2,) * 2


def test_grid_of_ranks() -> None:
    """2 inner ranks have a head each; keys travel between the 2 outer ones only."""
    found = plan(strategy="usp", inner_size=2, balancer="contiguous")
    (site,) = found.sites
    assert site.strategy == "usp"
    assert site.forward_bytes == (3 + 1) * QUERY // 2 + KV
    assert site.pairs == tuple(B * pairs for pairs in (10, 10, 26, 26))
    assert "cp.usp_attention(" in found.after
    with pytest.raises(ConfigError, match=r"inner_size=3 does not divide world_size=4"):
        plan(inner_size=3)
    with pytest.raises(ConfigError, match=r"axis=\('ring axis', 'ulysses axis'\)"):
        plan(strategy="usp")


def test_memory_of_attention() -> None:
    (ring,), (ulysses,) = (plan(strategy=name, world_size=2).sites for name in ("ring", "ulysses"))
    assert ring.kept_bytes == B * (S // 2) * HEADS * 4 * (4 * DIM + 1)
    out = B * (S // 2) * HEADS * 4 * DIM
    assert (ulysses.kept_bytes, ulysses.received_bytes) == (ring.kept_bytes + out, 0)
    assert ring.received_bytes == 2 * B * (S // 2) * HEADS * DIM * BYTES
    assert "a rank keeps" in str(plan())


def test_heads_that_are_exchanged_again_are_told() -> None:
    kept, again = (plan(strategy="ulysses", world_size=2, heads_per_message=n) for n in (0, 1))
    assert [site.rounds_again for site in (*kept.sites, *again.sites)] == [0, HEADS // 2]
    assert again.sites[0].backward_bytes == 2 * kept.sites[0].backward_bytes
    assert "1 attention(s) keep nothing by heads" in str(again) and "nothing by heads" not in str(kept)


def test_kernels_and_why_no_faster_one() -> None:
    found = plan(strategy="ring", balancer="zig_zag")
    assert (found.sites[0].kernels, found.sites[0].reasons) == (("cpu_flash",), ())
    capped = explain(Capped(), batch(), world_size=2)
    assert capped.sites[0].kernels == ("math",)
    assert capped.sites[0].reasons == ("cpu_flash takes no softcap",)
    assert "math: cpu_flash takes no softcap" in str(capped)
    assert plan(kernel="math").sites[0].kernels == ("math",)


class Capped(TinyLM):
    """Caps its scores."""

    def attend(self, x: Any) -> Any:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = 3 * torch.tanh(q @ k.transpose(-1, -2) / 3)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(-2)


def test_a_kernel_that_cannot_is_refused_with_the_line() -> None:
    with pytest.raises(ConfigError) as caught:
        explain(Capped(), batch(), world_size=2, kernel="cpu_flash")
    text = str(caught.value)
    for part in (
        "kernel='cpu_flash'",
        "takes no softcap",
        "Kernels for this attention: auto, math",
        "test_explain.py:",
    ):
        assert part in text
    with pytest.raises(ConfigError, match=r"runs on cuda(.*\n)*.*scaled_dot_product_attention"):
        plan(kernel="cudnn")


def test_bytes_of_the_rest() -> None:
    found = plan(strategy="ring")
    sums = {c.operator: c for c in found.collectives}
    assert sums["cp.all_reduce"].calls == 2  # the loss and the count of its labels
    assert found.gradient_bytes == 2 * PARAMETERS * BYTES * (P - 1) // P
    assert plan(grad_sync="mean").gradient_bytes == 0


def test_bytes_of_the_count_are_those_of_integers() -> None:
    (reduce,) = [c for c in plan().collectives if c.operator == "cp.all_reduce"]
    assert reduce.forward_bytes == 2 * BYTES * (P - 1) // P + 2 * 8 * (P - 1) // P


def test_gathered_outputs_are_counted() -> None:
    found = explain(LogitsToo(), batch(), world_size=P, outputs="full")
    (gathered,) = [c for c in found.collectives if c.operator == "cp.gather_tokens"]
    assert gathered.forward_bytes == (P - 1) * B * (S // P) * 13 * BYTES


class LogitsToo(TinyLM):
    """Returns the logits beside the loss."""

    def forward(self, input_ids: Any, labels: Any) -> Any:
        logits = self.logits(input_ids)
        return self.loss(logits, labels), logits


def test_one_rank_sends_nothing() -> None:
    found = plan(world_size=1)
    assert [(s.forward_bytes, s.backward_bytes) for s in found.sites] == [(0, 0)]
    assert found.gradient_bytes == 0


def test_a_thousand_ranks_need_none() -> None:
    found = plan(world_size=1024, length=4096, balancer="contiguous", strategy="ring")
    assert (found.local_tokens, found.world_size) == (4, 1024)
    assert found.sites[0].forward_bytes == 1023 * 2 * B * 4 * HEADS * DIM * BYTES


def test_model_without_memory() -> None:
    with torch.device("meta"):
        model = TinyLM()
    inputs = {name: x.to("meta") for name, x in batch(1 << 17).items()}
    found = explain(model, inputs, world_size=64)
    assert (found.tokens, found.sites[0].mask) == (1 << 17, "causal")
    assert found.sites[0].forward_bytes > 0
    assert found.sites[0].kernels == ()


@pytest.mark.parametrize("part", ["before", "after"])
@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("= aten.embedding(", "x = self.embedding(input_ids)"),
        ("= aten.cross_entropy_loss(", "F.cross_entropy(logits.flatten(0, 1), labels.flatten())"),
    ],
)
def test_listing_is_under_the_lines_of_the_model(part: str, call: str, line: str) -> None:
    lines = getattr(plan(strategy="ring", loss_chunk=0), part).splitlines()
    (at,) = [i for i, text in enumerate(lines) if call in text]
    comment = next(text for text in reversed(lines[:at]) if text.startswith("#"))
    assert f"{line}    small_models.py:" in comment


def test_listing_after_shows_what_changed() -> None:
    found = plan(strategy="ring")
    assert "cp.ring_attention(" in found.after
    assert "cp.ring_attention(" not in found.before
    assert "f32[2, 8, 8] Sharded(1) = aten.embedding(" in found.after
    assert "Partial(sum) = aten.div.Tensor(" in found.after


def test_nothing_is_run() -> None:
    class Counted(TinyLM):
        calls = 0

        def attend(self, x: Any) -> Any:
            if not torch.compiler.is_compiling():
                Counted.calls += 1
            return super().attend(x)

    explain(Counted(), batch(), world_size=2)
    assert Counted.calls == 0


def test_sizes_and_tables_read_well() -> None:
    assert [size(n) for n in (0, 1023, 1 << 10, 3 << 19, 5 << 40)] == ["0 B", "1023 B", "1 KiB", "1.5 MiB", "5 TiB"]
    assert table(("a", "long"), [("xyz", 1)]) == ["  a    long", "  xyz  1"]


def test_lists_what_runs_behind_the_passes() -> None:
    found = explain(Stack(), tokens(64), world_size=2, offload="inputs", memory_budget=0.0)
    places = {each.name: each.changes for each in found.passes}
    assert places["recompute_blocks"] == places["outline_layers"] == LAYERS and places["move_to_host"] == LAYERS - 1
    assert all(each.seconds > 0 for each in found.passes) and found.memory is None
    assert "passes that changed the graph" in str(found) and "move_to_host" in str(found)


class Shifted(nn.Module):
    """Layers that read the token before, and one behind them that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(13, 8), nn.Linear(8, 13)
        self.layers = nn.ModuleList([Shift() for _ in range(3)])
        self.last = Shift()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return mean_loss(self.head(self.last(x)), labels)


class Shift(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return x + nn.functional.pad(x, (0, 0, 2, 0))[:, :-2].sin()


def test_collectives_are_told_by_module() -> None:
    found = explain(Shifted(), batch(S), world_size=2, balancer="contiguous")
    calls = {(c.operator, c.module): c.calls for c in found.collectives if c.module}
    ((operator, _), *_) = calls
    assert calls == {(operator, "layers.{0..2}"): 6, (operator, "last"): 2}
    assert re.search(rf"{operator} +layers\.{{0..2}} +6 ", str(found))
    sent = {c.module: (c.forward_bytes, c.backward_bytes) for c in found.collectives if c.module}
    assert sent["layers.{0..2}"] == tuple(3 * n for n in sent["last"])
    assert min(sent["last"]) > 0
