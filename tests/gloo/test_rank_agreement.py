"""What ranks must have alike and do not have: an error on every rank, which names it, before any rank waits for another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cpcompile
from cpcompile.errors import InputError, NoRule, RankFailed, RanksDiffer
from cpcompile.front import weights
from tests.models import VOCABULARY, batch, error, errors, gradients, loss_of, make

EXACT = 1e-12  # float64
SECONDS = 20  # on a busy machine; ranks that waited for each other would do so for the minute that gloo gives them


class Dropped(nn.Module):
    """Embeds, attends and drops."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.drop, self.kind = nn.Dropout(rate), "plain"
        self.register_buffer("shift", torch.zeros(8))

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, num_items: Any = None, **more: Any
    ) -> torch.Tensor:
        x = self.drop(self.embed(input_ids)) + self.shift
        h = x.unsqueeze(1)
        h = -h if self.kind == "negative" else h
        x = x + F.scaled_dot_product_attention(h, h, h, is_causal=True).squeeze(1)
        if self.kind == "no rule":
            x = x.renorm(p=2, dim=1, maxnorm=1.0)
        total = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (labels.numel() if num_items is None else num_items)


def fresh(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return Dropped(**changes).double()


def applied(rank: Any, model: nn.Module | None = None, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    return cpcompile.apply(fresh() if model is None else model, rank.mesh(), **{"inner": "eager"} | options)


def refused(call: Callable[[], Any], kind: type[Exception] = RanksDiffer) -> str:
    """Return what the call says, which must come within seconds."""
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        call()
    assert time.monotonic() - start < SECONDS
    return str(caught.value)


def inputs(length: int = 16) -> dict[str, torch.Tensor]:
    return batch(make("rotary", num_layers=1), length)


def other_weights(rank: Any) -> list[str]:
    """The first call, and calls after each way to come by other weights, with a good step between."""
    texts = [refused(lambda: applied(rank, fresh(seed=rank.rank))(**inputs()))]
    model = applied(rank)
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def replaced() -> None:
        model.head.weight = nn.Parameter(model.head.weight + rank.rank)

    def new_memory() -> None:
        model.embed.weight.data = model.embed.weight.data + rank.rank

    def loaded() -> None:
        model.load_state_dict({name: x + rank.rank for name, x in before.items()})

    def buffer() -> None:
        model.shift = model.shift + rank.rank

    def written_here_only() -> None:
        if rank.rank:
            with torch.no_grad():
                model.head.bias += 1

    for change in (replaced, new_memory, loaded, buffer, written_here_only):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model(**inputs()).backward()
        optimizer.step()
        change()
        texts.append(refused(lambda: model(**inputs())))
        model.load_state_dict(before)
    return texts


def test_weights_that_differ_are_named(pool: Any) -> None:
    names = ["embed.weight", "head.weight", "embed.weight", "shift", "shift", "head.bias"]
    for texts in pool.run(2, other_weights):
        for text, name in zip(texts, names, strict=True):
            assert text.startswith(
                f"the parameter or buffer '{name}' differs between rank 0 and rank(s) 1 (float64["
            ), text
            assert "torch.manual_seed" in text and "sync_weights=True" in text


def other_rank(rank: Any) -> str:
    model = fresh()
    if rank.rank == 2:
        with torch.no_grad():
            model.head.bias[3] = float("nan")
    return refused(lambda: applied(rank, model)(**inputs()))


def test_the_rank_and_the_one_element_that_differ_are_found(pool: Any) -> None:
    for text in pool.run(4, other_rank):
        assert text.startswith(
            "the parameter or buffer 'head.bias' differs between rank 0 and rank(s) 2 (float64[61], in its"
        )


def sent(rank: Any, when: str) -> dict[str, float]:
    """Errors of a step after the first rank has sent its weights, at the first call and after others were loaded."""
    model = applied(rank, fresh(seed=rank.rank, rate=0.0), sync_weights=True, check_inputs=when)
    model.head.bias.requires_grad_(False)
    model.embed.weight = nn.Parameter(model.embed.weight.detach().T.contiguous().T)  # not contiguous
    alone = fresh(rate=0.0)
    found = {}
    for step in range(2 if when == "always" else 1):
        if step:
            alone = fresh(seed=step * 10, rate=0.0)
            model.load_state_dict(fresh(seed=step * 10 + rank.rank, rate=0.0).state_dict())
        losses = [module(**inputs()) for module in (model, alone)]
        for loss in losses:
            loss.backward()
        grads, expected = gradients(model), gradients(alone)
        expected["head.bias"].zero_()
        found |= {f"{n} {step}": x for n, x in errors(grads, expected).items()} | {f"loss {step}": error(*losses)}
    return found


@pytest.mark.parametrize("when", ["always", "never"])
def test_the_first_rank_sends_its_weights(pool: Any, when: str) -> None:
    for found in pool.run(3, sent, when):
        assert max(found.values()) < EXACT, found


def unusual(rank: Any) -> list[int]:
    """Return how often weights were compared: tied and frozen weights, an optimizer, and steps that write a buffer."""
    model = make("nanogpt", num_layers=1)  # tied
    model.blocks[0].qkv.requires_grad_(False)
    model = applied(rank, model)
    optimizer, counts = torch.optim.AdamW(model.parameters(), lr=0.01), []
    with mock.patch.object(weights, "value_fingerprint", wraps=weights.value_fingerprint) as compared:
        for _ in range(3):
            loss_of(model(**batch(model, 16))).backward()
            optimizer.step()
            counts.append(compared.call_count)
    return counts


def test_weights_are_read_at_the_first_call_only(pool: Any) -> None:
    for counts in pool.run(2, unusual):
        assert counts[0] > 0 and len(set(counts)) == 1, counts


OPTIONS = {
    "strategy": (
        "ring",
        "ulysses",
        "the option 'strategy' differs between rank 0 and rank(s) 1 (rank 0: 'ring'; rank(s) 1: ",
    ),
    "outputs": (
        "local",
        "full",
        "the option 'outputs' differs between rank 0 and rank(s) 1 (rank 0: 'local'; rank(s) 1: 'full'",
    ),
    "balancer": ("zig_zag", "contiguous", "the option 'balancer' differs"),
    "grad_sync": ("sum", "none", "the option 'grad_sync' differs"),
}


def other_options(rank: Any, door: str) -> dict[str, str]:
    texts = {}
    for name, values in OPTIONS.items():
        options = {name: values[rank.rank]}
        if door == "apply":
            texts[name] = refused(lambda options=options: applied(rank, fresh(), **options)(**inputs()))
        else:
            torch._dynamo.reset()
            given = {"mesh": rank.mesh(), "inner": "eager", **options}
            compiled = torch.compile(fresh(), backend="cpcompile", options=given)
            texts[name] = refused(lambda compiled=compiled: compiled(**inputs()))
    return texts


@pytest.mark.parametrize("door", ["apply", "torch.compile"])
def test_options_that_differ(pool: Any, door: str) -> None:
    for texts in pool.run(2, other_options, door):
        for name, (_, _, start) in OPTIONS.items():
            assert texts[name].startswith(start), texts[name]
            assert "Every rank must pass the same options to cpcompile." in texts[name]


CALLS = {
    "eval": "the training mode of 'the model' differs between rank 0 and rank(s) 1 (rank 0: training; rank(s) 1: evaluation; 3",
    "eval of one": "the training mode of 'drop' differs between rank 0 and rank(s) 1 (rank 0: training; rank(s) 1: evaluation).",
    "no_grad": "torch.is_grad_enabled() differs between rank 0 and rank(s) 1 (rank 0: True; rank(s) 1: False).",
    "autocast": "autocast differs between rank 0 and rank(s) 1 (rank 0: off; rank(s) 1: torch.bfloat16).",
    "no_sync": "cpcompile.no_sync differs between rank 0 and rank(s) 1 (rank 0: False; rank(s) 1: True).",
    "frozen": "the parameter or buffer 'embed.weight' differs between rank 0 and rank(s) 1 "
    "(rank 0: float64[61, 8], requires grad; rank(s) 1: float64[61, 8]).",
    "int": "the input 'num_items' differs between rank 0 and rank(s) 1 (rank 0: 10; rank(s) 1: 20).",
    "float": "the input 'num_items' differs between rank 0 and rank(s) 1 (rank 0: 10.0; rank(s) 1: 20.0).",
    "tensor": "the input 'num_items' differs between rank 0 and rank(s) 1 (int64[], in its values).",
    "int and tensor": "the input 'num_items' differs between rank 0 and rank(s) 1 (rank 0: 10; rank(s) 1: int64[]).",
    "nested": "the input \"more['of'][1]\" differs between rank 0 and rank(s) 1 (float32[2], in its values).",
}


def called(model: nn.Module, kind: str, is_other: bool) -> None:
    given: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if is_other and kind in ("no_grad", "autocast", "no_sync"):
            contexts = {"no_grad": torch.no_grad(), "no_sync": cpcompile.no_sync(model)}
            stack.enter_context(contexts.get(kind) or torch.autocast("cpu", torch.bfloat16))
        model.train()
        for module in {"eval": [model], "eval of one": [model.drop]}.get(kind, []):
            module.train(not is_other)
        model.embed.requires_grad_(not (is_other and kind == "frozen"))
        number = 20 if is_other else 10
        if kind in ("int", "float", "tensor"):
            given["num_items"] = {"int": int, "float": float, "tensor": torch.tensor}[kind](number)
        elif kind == "int and tensor":
            given["num_items"] = torch.tensor(10) if is_other else 10
        elif kind == "nested":
            given["more"] = {"of": [1, torch.tensor([1.0, 1.0 + is_other])]}
        model(**inputs(), **given)


def other_calls(rank: Any) -> dict[str, str]:
    """What differs at the first call of its kind, and then with a compiled model."""
    model, texts = applied(rank), {}
    for kind in CALLS:
        texts[kind] = refused(lambda kind=kind: called(model, kind, rank.rank == 1))
        called(model, kind, is_other=False)
        if kind not in ("int", "float"):  # Dynamo would make the second one a symbol, on one rank only
            assert refused(lambda kind=kind: called(model, kind, rank.rank == 1)) == texts[kind]
    return texts


def test_calls_that_differ(pool: Any) -> None:
    for texts in pool.run(2, other_calls, timeout=120):
        for kind, start in CALLS.items():
            assert texts[kind].startswith(start), texts[kind]


def other_programs(rank: Any) -> dict[str, str]:
    """What only the graph shows: an attribute of the model, here, and a version, as if it were another one."""
    texts = {}
    model = applied(rank)
    model(**inputs())
    model.kind = "negative" if rank.rank else "plain"
    texts["attribute"] = refused(lambda: model(**inputs()))
    model.kind = "plain"
    model(**inputs()).backward()
    torch._dynamo.reset()
    compiled = torch.compile(fresh(), backend="cpcompile", options={"mesh": rank.mesh(), "inner": "eager"})
    compiled.drop.train(rank.rank == 0)
    texts["eval behind torch.compile"] = refused(lambda: compiled(**inputs()))
    with mock.patch.object(cpcompile, "__version__", f"0.{rank.rank}"):
        texts["version"] = refused(lambda: applied(rank)(**inputs()))
    return texts


def test_programs_that_differ(pool: Any) -> None:
    for texts in pool.run(2, other_programs):
        assert "of the transformed graph differs between rank 0 and rank(s) 1 (rank 0: %" in texts["attribute"]
        assert "test_rank_agreement.py:" in texts["attribute"]
        assert "of the transformed graph differs between" in texts["eval behind torch.compile"]
        assert texts["version"].startswith(
            "the version of 'cpcompile' differs between rank 0 and rank(s) 1 (rank 0: 0.0;"
        )


def explained(rank: Any) -> float:
    """The first rank has seen another batch size before, which would make it a symbol in its graph only."""
    model, alone = fresh(rate=0.0), fresh(rate=0.0)
    torch._dynamo.reset()
    if rank.rank == 0:
        cpcompile.explain(model, {name: x[:1] for name, x in inputs().items()}, world_size=2)
    cpcompile.apply(model, rank.mesh(), inner="eager")
    losses = [model(**inputs()) for _ in range(3)]
    return max(error(loss, alone(**inputs())) for loss in losses)


def test_a_model_that_one_rank_has_explained(pool: Any) -> None:
    assert max(pool.run(2, explained)) < EXACT


def one_fails(rank: Any, door: str) -> list[str]:
    """One rank cannot compile what the others run, at the first call and later; then one is called wrongly."""
    model = fresh()
    if door == "apply":
        compiled = applied(rank, model)
    else:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="cpcompile", options={"mesh": rank.mesh(), "inner": "eager"})
    texts = []
    for _ in range(2):
        model.kind = "no rule" if rank.rank == 1 else "plain"
        own = NoRule if door == "apply" else torch._dynamo.exc.BackendCompilerFailed
        texts.append(refused(lambda: compiled(**inputs()), own if rank.rank == 1 else RankFailed))
        model.kind = "plain"
        compiled(**inputs()).backward()
    if door == "apply":
        given = inputs() if rank.rank == 0 else {"input_ids": inputs()["input_ids"]}
        texts.append(refused(lambda: compiled(**given), RankFailed if rank.rank == 0 else InputError))
        compiled(**inputs()).backward()
    return texts


@pytest.mark.parametrize("door", ["apply", "torch.compile"])
def test_a_rank_that_fails_ends_the_others(pool: Any, door: str) -> None:
    (first, second, *rest), others = pool.run(2, one_fails, door)
    for text in (first, second):
        assert text.startswith(
            "rank(s) 1 ended this call with an error, so that the others cannot go on:\n\nNoRule: aten.renorm"
        )
    assert all("NoRule: aten.renorm" in text or text.startswith("aten.renorm.default") for text in others[:2])
    assert all(
        "InputError: the model cannot be called so: missing a required argument: 'labels'" in text for text in rest
    )


def same_failure(rank: Any) -> None:
    model = applied(rank)
    model.kind = "no rule"
    for _ in range(2):
        refused(lambda: model(**inputs()), NoRule)
    model.kind = "plain"
    model(**inputs()).backward()


def test_an_error_of_all_ranks_stays_what_it_is(pool: Any) -> None:
    pool.run(2, same_failure)


def messages(rank: Any, length: int) -> list[int]:
    """Return how many all-reduces the calls make that compare the ranks: dropout draws, modes and lengths change."""
    model = applied(rank, exact_dropout=True)
    torch.manual_seed(0)
    counts = []
    with mock.patch("cpcompile.front.rank_agreement.dist.all_reduce", wraps=torch.distributed.all_reduce) as reduced:
        for step in range(6):
            model.train(step < 4)
            model(**inputs(length + step), num_items=torch.tensor(step + 1))
            counts.append(reduced.call_count)
    return counts


def test_one_message_a_call(pool: Any) -> None:
    for counts in pool.run(2, messages, 16):
        steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
        calls_of_model = steps[1]  # the count of labels is no part of the comparison
        assert steps[1:4] == [calls_of_model] * 3
        assert steps[0] == steps[1] + 1, "a call of a new kind is compared before it is compiled"
        assert steps[4] == steps[5] + 1 == steps[1] + 1


def test_errors_are_those_of_inputs() -> None:
    assert issubclass(RankFailed, RanksDiffer) and issubclass(RanksDiffer, InputError)
